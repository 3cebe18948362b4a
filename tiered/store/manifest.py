"""manifest.json: what a store holds. Plain data in, frozen dataclasses out, every field checked.

The manifest is written last and atomically: a folder without one is an unfinished conversion.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from tiered.errors import ConfigError, StoreError
from tiered.files import parse_json
from tiered.quant import QuantizedTensor, QuantizedWeight, Scheme
from tiered.store.file import FileInfo, field
from tiered.store.format import CHUNK_NBYTES, TensorEntry
from tiered.store.rows import ROWS, RowLayout

MANIFEST_NAME: Final = "manifest.json"
FORMAT: Final = "tiered-store"
VERSION: Final = 2
DAMAGED: Final = "the store is damaged, convert it again"
RANGE: Final = "#"
"""Between the name of a weight that is stored in several ranges of its rows and the number of a range."""
ROLES: Final = ("embed", "outer", "table", "layer", "head")


class OldStoreError(StoreError):
    """The store is of format version 1, which can be upgraded."""


@dataclass(frozen=True)
class BlockInfo:
    """One block: the unit of streaming. Repeated synthetic layers are different blocks over one file."""

    name: str
    role: str
    """"embed", "outer", "table", "layer" or "head"."""
    file: FileInfo
    prefix: str
    """What to strip from the file's tensor names to get the names inside the block's module."""

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "role": self.role, "file": self.file.path, "prefix": self.prefix}


@dataclass(frozen=True)
class Weight:
    """One logical weight of a block and where its parts lie in the memory of its unit.

    `scheme` is None for a plain tensor (`parts` holds one entry, ""); a quantized one has those of its scheme: "q",
    "scale" and, if it has zeros, "zero"; one of `rows` has the part "rows", whatever its scheme. Where `shape` is a
    stack's, [experts, out, in], the parts have the rows of all its matrices.
    """

    name: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    parts: Mapping[str, TensorEntry]
    whole: tuple[int, ...] | None = None
    """Where this is part NAME#k of a weight NAME that is stored in several: the shape of NAME."""
    rows: RowLayout | None = None
    """How its rows lie, where each is a record of its own."""

    @property
    def whole_name(self) -> str:
        """NAME, where this is part NAME#k of it; else its own name."""
        return self.name if self.whole is None else self.name.rpartition(RANGE)[0]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.parts.values())

    @property
    def dtype(self) -> torch.dtype:
        """That of its numbers, or of its codes."""
        return next(iter(self.parts.values())).dtype if self.rows is None else self.rows.dtype

    def view(self, memory: torch.Tensor) -> torch.Tensor | QuantizedWeight:
        """This weight inside `memory`, a uint8 tensor that holds the unit from its first byte. Nothing is copied."""
        views = {
            part: memory[e.offset : e.offset + e.nbytes].view(e.dtype).view(e.shape) for part, e in self.parts.items()
        }
        if self.rows is not None:
            return self.rows.view(views[ROWS])
        if self.scheme is None:
            return views[""]
        q, scale = views["q"], views["scale"]
        zero = views["zero"] if self.scheme.has_zero else q.new_empty(len(q), 0)
        return QuantizedWeight(QuantizedTensor(q, scale, zero), self.scheme)


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
    def from_json(cls, text: bytes | str, path: Path, version: int = VERSION) -> "Manifest":
        """Parse and check the text of the manifest at `path`, which must be of `version`; raises StoreError naming it.

        Only the upgrade of a store asks for version 1.
        """
        value = parse_json(text, path, StoreError, DAMAGED)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise StoreError(f"{path}: not a tiered store's manifest; pass the folder that 'tiered convert' wrote")
        found = value.get("version")
        if type(found) is not int or found != version:
            told = f"{path}: store format version {found!r}, this tiered reads version {version}"
            if type(found) is int and found == 1:
                raise OldStoreError(f"{told}; 'tiered convert {shlex.quote(str(path.parent))}' upgrades it in place")
            raise StoreError(f"{told}; convert the model again, or use the tiered that wrote it")
        try:
            return cls._from_value(value)
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise StoreError(f"{path}: {reason}; {DAMAGED}") from None

    @classmethod
    def _from_value(cls, value: dict[str, Any]) -> "Manifest":
        if field(value, "checksum_chunk_nbytes", int) != CHUNK_NBYTES:
            raise ValueError(f"checksum_chunk_nbytes is {value['checksum_chunk_nbytes']}, expected {CHUNK_NBYTES}")
        found = (FileInfo.from_json(raw, value["version"]) for raw in field(value, "files", list))
        files = {file.path: file for file in found}
        blocks = {block.name: block for block in (_block(raw, files) for raw in field(value, "blocks", list))}
        if len(blocks) != len(value["blocks"]):
            names = [raw["name"] for raw in value["blocks"]]
            raise ValueError(f"several blocks are named {next(name for name in names if names.count(name) > 1)}")
        if "embed" not in blocks:
            raise ValueError("there is no block embed")
        tape = tuple(map(str, field(value, "tape", list)))
        unknown = set(tape) - set(blocks)
        if unknown or not tape:
            raise ValueError(f"tape names unknown blocks {sorted(unknown)}" if unknown else "tape is empty")
        # In another order, or without the head, a pass would compute something else, or wait without end.
        in_order = sorted(name for name, block in blocks.items() if block.role == "layer")
        in_order += [name for name, block in blocks.items() if block.role == "head"]
        if list(tape) != in_order:
            raise ValueError(f"tape is {', '.join(tape)}; expected every layer in order, then the head")
        kept = value["quantization"].get("unquantized", []) if isinstance(value["quantization"], dict) else []
        if not isinstance(kept, list):
            raise TypeError(f"unquantized is {kept!r}, expected a list of names")
        distinct = None if value["distinct_blocks"] is None else field(value, "distinct_blocks", int)
        if distinct is not None and distinct < 1:
            raise ValueError(f"distinct_blocks is {distinct}, expected at least 1")
        return cls(
            source=field(value, "source", dict),
            architecture=field(value, "architecture", dict),
            quantization=field(value, "quantization", dict),
            files=tuple(files.values()),
            blocks=tuple(blocks.values()),
            tape=tape,
            tied=field(value, "tied", bool),
            synthetic=field(value, "synthetic", bool),
            distinct_blocks=distinct,
        )


def _block(raw: Any, files: Mapping[str, FileInfo]) -> BlockInfo:
    name, role, path = field(raw, "name", str), field(raw, "role", str), field(raw, "file", str)
    if role not in ROLES:
        raise ValueError(f"block {name}: role is {role!r}, expected one of {', '.join(ROLES)}")
    if path not in files:
        raise ValueError(f"block {name}: its file {path} is not among the files")
    return BlockInfo(name, role, files[path], field(raw, "prefix", str))
