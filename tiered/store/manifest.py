"""manifest.json: what a store holds. Plain data in, frozen dataclasses out, every field checked.

The manifest is written last and atomically: a folder without one is an unfinished conversion.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from tiered.errors import ConfigError, StoreError
from tiered.files import parse_json
from tiered.quant import GroupScheme, QuantizedTensor, QuantizedWeight
from tiered.store.format import CHUNK_NBYTES, TensorEntry
from tiered.units import PAGE

MANIFEST_NAME: Final = "manifest.json"
FORMAT: Final = "tiered-store"
VERSION: Final = 1
DAMAGED: Final = "the store is damaged, convert it again"
ROLES: Final = ("embed", "outer", "layer", "head")

_CHECKSUM: Final = re.compile("[0-9a-f]{16}")
T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """Bytes of a file that one checksum covers."""

    offset: int
    nbytes: int
    checksum: str

    @property
    def stop(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True)
class FileInfo:
    """One file of the store, with a checksum for each CHUNK_NBYTES of it."""

    path: str
    """Relative to the store, with forward slashes."""
    nbytes: int
    checksums: tuple[str, ...]

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """Every byte of the file, in the order of `checksums`."""
        return tuple(
            Chunk(number * CHUNK_NBYTES, min(CHUNK_NBYTES, self.nbytes - number * CHUNK_NBYTES), checksum)
            for number, checksum in enumerate(self.checksums)
        )

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
    "zero". Where `shape` is a stack's, [experts, out, in], the parts have the rows of all its matrices.
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
    def from_json(cls, text: bytes | str, path: Path) -> "Manifest":
        """Parse and check the text of the manifest at `path`; raises StoreError naming it."""
        value = parse_json(text, path, StoreError, DAMAGED)
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
            raise StoreError(f"{path}: {reason}; {DAMAGED}") from None

    @classmethod
    def _from_value(cls, value: dict[str, Any]) -> "Manifest":
        if _field(value, "checksum_chunk_nbytes", int) != CHUNK_NBYTES:
            raise ValueError(f"checksum_chunk_nbytes is {value['checksum_chunk_nbytes']}, expected {CHUNK_NBYTES}")
        files = {file.path: file for file in map(_file, _field(value, "files", list))}
        blocks = {block.name: block for block in (_block(raw, files) for raw in _field(value, "blocks", list))}
        if len(blocks) != len(value["blocks"]):
            names = [raw["name"] for raw in value["blocks"]]
            raise ValueError(f"several blocks are named {next(name for name in names if names.count(name) > 1)}")
        if "embed" not in blocks:
            raise ValueError("there is no block embed")
        tape = tuple(map(str, _field(value, "tape", list)))
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
        distinct = None if value["distinct_blocks"] is None else _field(value, "distinct_blocks", int)
        if distinct is not None and distinct < 1:
            raise ValueError(f"distinct_blocks is {distinct}, expected at least 1")
        return cls(
            source=_field(value, "source", dict),
            architecture=_field(value, "architecture", dict),
            quantization=_field(value, "quantization", dict),
            files=tuple(files.values()),
            blocks=tuple(blocks.values()),
            tape=tape,
            tied=_field(value, "tied", bool),
            synthetic=_field(value, "synthetic", bool),
            distinct_blocks=distinct,
        )


def _field(value: Any, key: str, kind: type[T]) -> T:
    """Field `key` of the object `value`, whose type must be exactly `kind`: neither 1.0 nor true passes for an int."""
    if not isinstance(value, dict):
        raise TypeError(f"expected an object with {key}, found {value!r}")
    found = value[key]
    if type(found) is not kind:
        raise TypeError(f"{key} is {found!r}, expected a {kind.__name__}")
    return found


def _file(raw: Any) -> FileInfo:
    path, nbytes = _field(raw, "path", str), _field(raw, "nbytes", int)
    checksums = tuple(_field({"xxh3_64": checksum}, "xxh3_64", str) for checksum in _field(raw, "xxh3_64", list))
    if wrong := [checksum for checksum in checksums if not _CHECKSUM.fullmatch(checksum)]:
        raise ValueError(f"{path}: checksum {wrong[0]!r}, expected 16 hexadecimal digits")
    if nbytes <= 0 or nbytes % PAGE or len(checksums) != -(-nbytes // CHUNK_NBYTES):
        raise ValueError(f"{path}: {nbytes} bytes with {len(checksums)} checksums is impossible")
    parts = Path(path).parts
    if not parts or Path(path).is_absolute() or ".." in parts or "\0" in path:
        raise ValueError(f"{path!r}: points outside the store")
    return FileInfo(path, nbytes, checksums)


def _block(raw: Any, files: Mapping[str, FileInfo]) -> BlockInfo:
    name, role, path = _field(raw, "name", str), _field(raw, "role", str), _field(raw, "file", str)
    if role not in ROLES:
        raise ValueError(f"block {name}: role is {role!r}, expected one of {', '.join(ROLES)}")
    if path not in files:
        raise ValueError(f"block {name}: its file {path} is not among the files")
    return BlockInfo(name, role, files[path], _field(raw, "prefix", str))
