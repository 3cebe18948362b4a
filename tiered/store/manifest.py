"""manifest.json: what a store holds. Plain data in, frozen dataclasses out, every field checked.

The manifest is written last and atomically: a folder without one is an unfinished conversion.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from tiered.errors import ConfigError, StoreError
from tiered.quant import GroupScheme, QuantizedTensor, QuantizedWeight
from tiered.store.format import CHUNK_NBYTES, PAGE, TensorEntry

MANIFEST_NAME: Final = "manifest.json"
FORMAT: Final = "tiered-store"
VERSION: Final = 1


@dataclass(frozen=True)
class FileInfo:
    """One file of the store, with a checksum for each CHUNK_NBYTES of it."""

    path: str
    """Relative to the store, with forward slashes."""
    nbytes: int
    checksums: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "nbytes": self.nbytes, "xxh3_64": list(self.checksums)}


@dataclass(frozen=True)
class BlockInfo:
    """One block: the unit of streaming. Repeated synthetic layers are different blocks over one file."""

    name: str
    role: str
    """"embed", "outer", "layer" or "head"."""
    file: FileInfo
    prefix: str
    """What to strip from the file's tensor names to get the names inside the block's module."""

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "role": self.role, "file": self.file.path, "prefix": self.prefix}


@dataclass(frozen=True)
class Weight:
    """One logical weight of a block and where its parts lie in the block's memory.

    `scheme` is None for a plain tensor (`parts` holds one entry, ""); a quantized one has parts "q", "scale" and
    "zero".
    """

    name: str
    shape: tuple[int, ...]
    scheme: GroupScheme | None
    parts: Mapping[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.parts.values())

    def view(self, memory: torch.Tensor) -> torch.Tensor | QuantizedWeight:
        """This weight inside `memory`, a uint8 tensor that holds the block from its first byte. Nothing is copied."""
        views = {
            part: memory[e.offset : e.offset + e.nbytes].view(e.dtype).view(e.shape) for part, e in self.parts.items()
        }
        if self.scheme is None:
            return views[""]
        return QuantizedWeight(QuantizedTensor(views["q"], views["scale"], views["zero"]), self.scheme)


@dataclass(frozen=True)
class Manifest:
    """Everything manifest.json says."""

    source: Mapping[str, Any]
    """Where the weights come from: kind, name, revision, and a fingerprint of the checkpoint."""
    architecture: Mapping[str, Any]
    """model_type, layers, and the names of the embedding and head weights."""
    quantization: Mapping[str, Any]
    """Scheme of the layers, of embedding and head, clip rule, and what stayed unquantized."""
    files: tuple[FileInfo, ...]
    blocks: tuple[BlockInfo, ...]
    tape: tuple[str, ...]
    """Names of the blocks of one pass, in order."""
    tied: bool
    """The head streams the embedding's file."""
    synthetic: bool = False
    """Random weights: good for benchmarks, not for text."""
    distinct_blocks: int | None = None
    """How many layer files there are where the manifest repeats them; None where every layer has its own."""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of manifest.json; equal manifests give equal bytes."""
        value = {
            "format": FORMAT,
            "version": VERSION,
            "synthetic": self.synthetic,
            "distinct_blocks": self.distinct_blocks,
            "source": dict(self.source),
            "architecture": dict(self.architecture),
            "quantization": dict(self.quantization),
            "tied": self.tied,
            "checksum_chunk_nbytes": CHUNK_NBYTES,
            "files": [file.to_json() for file in self.files],
            "blocks": [block.to_json() for block in self.blocks],
            "tape": list(self.tape),
        }
        return json.dumps(value, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> "Manifest":
        """Parse and check the text of the manifest at `path`; raises StoreError naming it."""
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise StoreError(f"{path}: not valid JSON ({error}); the store is damaged, convert it again") from None
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise StoreError(f"{path}: not a tiered store's manifest; pass the folder that 'tiered convert' wrote")
        if value.get("version") != VERSION:
            raise StoreError(
                f"{path}: store format version {value.get('version')!r}, this tiered reads version {VERSION}; "
                "convert the model again, or use the tiered that wrote it"
            )
        try:
            return cls._from_value(value)
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise StoreError(f"{path}: {reason}; the store is damaged, convert it again") from None

    @classmethod
    def _from_value(cls, value: dict[str, Any]) -> "Manifest":
        files = {}
        for raw in value["files"]:
            file = FileInfo(str(raw["path"]), int(raw["nbytes"]), tuple(map(str, raw["xxh3_64"])))
            chunks = -(-file.nbytes // CHUNK_NBYTES)
            if file.nbytes <= 0 or file.nbytes % PAGE or len(file.checksums) != chunks:
                raise ValueError(f"{file.path}: {file.nbytes} bytes with {len(file.checksums)} checksums is impossible")
            if Path(file.path).is_absolute() or ".." in Path(file.path).parts:
                raise ValueError(f"{file.path}: points outside the store")
            files[file.path] = file
        blocks = tuple(
            BlockInfo(str(raw["name"]), str(raw["role"]), files[raw["file"]], str(raw["prefix"]))
            for raw in value["blocks"]
        )
        tape = tuple(map(str, value["tape"]))
        unknown = set(tape) - {block.name for block in blocks}
        if unknown or not tape:
            raise ValueError(f"tape names unknown blocks {sorted(unknown)}" if unknown else "tape is empty")
        return cls(
            source=dict(value["source"]),
            architecture=dict(value["architecture"]),
            quantization=dict(value["quantization"]),
            files=tuple(files.values()),
            blocks=blocks,
            tape=tape,
            tied=bool(value["tied"]),
            synthetic=bool(value["synthetic"]),
            distinct_blocks=value["distinct_blocks"],
        )
