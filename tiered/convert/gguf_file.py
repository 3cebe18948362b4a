"""A file in GGUF, llama.cpp's format: its metadata, and where in it each tensor lies. Nothing of the tensors is read.

In: the path of a file. Out: its header, checked against the file's size. Called by `gguf.py`. All is little-endian:

    "GGUF", version u32, tensors u64, metadata entries u64
    metadata:  key, type u32, value          strings: length u64, UTF-8; arrays: type u32, length u64, values
    tensors:   name, dimensions u32, sizes u64 each, the fastest first, type u32, offset u64
    from the next multiple of general.alignment on, the tensors at their offsets
"""

import importlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np

from tiered.convert.gather import Extent
from tiered.errors import CheckpointError, ConfigError
from tiered.files import check_regular, reading
from tiered.units import MIB, round_up

MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)  # they differ in what may be big-endian, nothing else
_FIXED: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Metadata types of fixed size, as `struct` calls them."""
_STRING: Final = 8
_ARRAY: Final = 9
_MOST_ENTRIES: Final = 1 << 16
_MOST_TENSORS: Final = 1 << 20
_MOST_ELEMENTS: Final = 1 << 24
_MOST_TEXT_NBYTES: Final = 16 * MIB
"""Counts and lengths that no real file comes near: more means damage, and reading them would take hours."""
_MOST_KEPT: Final = 4096
"""Numbers of an array that are kept: one for each layer, say. Vocabularies are the tokenizer's business."""
_MOST_DIMENSIONS: Final = 4
_DAMAGED: Final = "it is damaged or truncated: download it again"

Metadata = Mapping[str, Any]
"""By key: a string, a number, a bool, a tuple of numbers, or `Omitted`."""


@dataclass(frozen=True)
class Omitted:
    """An array that is not kept: of strings, or a long one."""

    count: int


class GgufTensor(NamedTuple):
    """A tensor as a file holds it: `extent` are rows of blocks, in the order of `shape`, whose last size is a row's."""

    kind: str
    """The name of its type: F32, Q4_0, ..."""
    shape: tuple[int, ...]
    extent: Extent


@dataclass(frozen=True)
class GgufFile:
    """What the header of one file says."""

    metadata: Metadata
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def read(cls, path: Path) -> "GgufFile":
        """The header of `path`.

        Raises CheckpointError where it is damaged, of another version or byte order, or holds a type that cannot be
        read here, and ConfigError where the package gguf is missing.
        """
        gguf_package()
        size = check_regular(path, CheckpointError)
        with reading(path), path.open("rb") as file:
            header = _Header(path, file, size)
            tensors, entries = header.begin()
            metadata = header.metadata(entries)
            return cls(metadata, header.tensors(tensors, metadata.get("general.alignment", 32)))


def gguf_package() -> Any:
    """The package gguf; raises ConfigError, which says how to get it, where it is missing."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigError(
            f"reading a GGUF file takes the package gguf, tiered's extra of that name ({error}); "
            "\"pip install 'gguf>=0.19,<0.20'\", then run the same command again"
        ) from None


@lru_cache
def block_of(type_id: int) -> tuple[str, int, int] | None:
    """(name, values of a block, bytes of a block) of a type; None for one that cannot be turned into numbers."""
    gguf = gguf_package()
    try:
        kind = gguf.GGMLQuantizationType(type_id)
        values, nbytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, nbytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        return None
    return kind.name, values, nbytes


class _Header:
    """Reads a header from front to back."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._left = path, file, size
        self._size = size

    def begin(self) -> tuple[int, int]:
        """(tensors, metadata entries) that follow."""
        if self._left < 24 or self._take(4) != MAGIC:
            raise CheckpointError(f"{self._path}: not a GGUF file, or one that was cut off; download it again")
        version = self._number("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            found = f"GGUF version {version}" if swapped not in (1, *_VERSIONS) else "big-endian"
            raise CheckpointError(
                f"{self._path}: {found}, expected little-endian GGUF of version 2 or 3; convert the original Hugging "
                "Face checkpoint, or make the file anew with today's llama.cpp"
            )
        tensors, entries = self._number("Q"), self._number("Q")
        self._check(tensors <= _MOST_TENSORS and entries <= _MOST_ENTRIES, f"claims {tensors:,} tensors")
        return tensors, entries

    def metadata(self, entries: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(entries):
            key = self._text()
            self._check(key not in found, f"has {key!r} twice")
            found[key] = self._value(self._number("I"))
        return found

    def tensors(self, count: int, alignment: object) -> dict[str, GgufTensor]:
        entries = [self._tensor() for _ in range(count)]
        if type(alignment) is not int or not 0 < alignment <= MIB:
            raise CheckpointError(f"{self._path}: general.alignment is {alignment!r}; {_DAMAGED}")
        start = round_up(self._size - self._left, alignment)
        found: dict[str, GgufTensor] = {}
        for name, shape, type_id, offset in entries:
            self._check(name not in found, f"has tensor {name!r} twice")
            block = block_of(type_id)
            if block is None:
                raise CheckpointError(
                    f"{self._path}: {name} is of type {_type_name(type_id)}, which is not read here; convert the "
                    "original Hugging Face checkpoint, or a GGUF file of another type"
                )
            kind, values, nbytes = block
            self._check(shape[-1] % values == 0, f"{name} has rows of {shape[-1]:,}, no multiple of {kind}'s {values}")
            extent = Extent(self._path, start + offset, prod(shape) // values * nbytes)
            self._check(offset % alignment == 0, f"{name} is at {offset:,}, no multiple of {alignment}")
            self._check(
                extent.offset + extent.nbytes <= self._size,
                f"{name} ends at byte {extent.offset + extent.nbytes:,}, the file has {self._size:,}",
            )
            found[name] = GgufTensor(kind, shape, extent)
        return found

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._text(), self._number("I")
        self._check(0 < dimensions <= _MOST_DIMENSIONS, f"{name} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        self._check(all(shape) and prod(shape) < 1 << 62, f"{name} is of shape {list(shape)}")
        return name, shape, self._number("I"), self._number("Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind in _FIXED:
            return self._number(_FIXED[kind])
        self._check(kind == _ARRAY, f"has metadata of type {kind}")
        element, count = self._number("I"), self._number("Q")
        self._check(element in _FIXED or element == _STRING, f"has an array of type {element}")
        self._check(count <= _MOST_ELEMENTS, f"has an array of {count:,}")
        if element == _STRING:
            for _ in range(count):
                self._skip(self._number("Q"))
            return Omitted(count)
        width = struct.calcsize(f"<{_FIXED[element]}")
        if count > _MOST_KEPT:
            self._skip(count * width)
            return Omitted(count)
        return struct.unpack(f"<{count}{_FIXED[element]}", self._take(count * width))

    def _text(self) -> str:
        length = self._number("Q")
        self._check(length <= _MOST_TEXT_NBYTES, f"has a string of {length:,} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self._path}: has a string that is not UTF-8; {_DAMAGED}") from None

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))
        return value

    def _take(self, nbytes: int) -> bytes:
        self._pass(nbytes)
        return self._file.read(nbytes)

    def _skip(self, nbytes: int) -> None:
        self._pass(nbytes)
        self._file.seek(nbytes, 1)

    def _pass(self, nbytes: int) -> None:
        self._check(nbytes <= self._left, f"ends inside its header, at byte {self._size:,}")
        self._left -= nbytes

    def _check(self, holds: bool, found: str) -> None:
        if not holds:
            raise CheckpointError(f"{self._path}: {found}; {_DAMAGED}")


def _type_name(type_id: int) -> str:
    try:
        return str(gguf_package().GGMLQuantizationType(type_id).name)
    except ValueError:
        return f"number {type_id}"
