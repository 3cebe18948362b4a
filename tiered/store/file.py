"""One block file as the manifest lists it: its units, and a checksum for every piece of at most 16 MiB.

A file is its header and then its units, one behind the other without gaps. A *chunk* is what one checksum covers: the
header and each unit are cut into chunks of CHUNK_NBYTES, the last of each may be shorter. So no chunk crosses a unit,
and whoever reads a unit whole can test it. Plain data in, frozen dataclasses out, every field checked.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, cast

from tiered.store.format import CHUNK_NBYTES
from tiered.units import PAGE, round_up

Kind = Literal["small", "dense", "expert"]

KINDS: Final = ("small", "dense", "expert")
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
class UnitInfo:
    """One unit of a file: its extent, which starts and ends on multiples of `PAGE`."""

    name: str
    """Unique in its file."""
    kind: Kind
    offset: int
    nbytes: int

    @property
    def stop(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True)
class FileInfo:
    """One file of the store. Without `units` it is a header and nothing else."""

    path: str
    """Relative to the store, with forward slashes."""
    nbytes: int
    checksums: tuple[str, ...]
    """One for each of `chunks`."""
    units: tuple[UnitInfo, ...] = ()

    @property
    def header_nbytes(self) -> int:
        """Bytes before the first unit."""
        return self.units[0].offset if self.units else self.nbytes

    @property
    def units_nbytes(self) -> int:
        """Bytes of all units: what is read where the file's block is streamed."""
        return self.nbytes - self.header_nbytes

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """Every byte of the file, in order: the header's chunks, then those of each unit."""
        return tuple(Chunk(*extent, checksum) for extent, checksum in zip(self.extents(), self.checksums, strict=False))

    def chunks_around(self, start: int, stop: int) -> range:
        """Numbers of the chunks that hold bytes [start, stop), of which there is at least one."""
        offset = attrgetter("offset")
        first = bisect_right(self.chunks, start, key=offset) - 1
        return range(first, bisect_left(self.chunks, stop, lo=first, key=offset))

    def extents(self) -> Iterator[tuple[int, int]]:
        """Offset and size of every chunk."""
        for begin, stop in pairwise((0, *(unit.offset for unit in self.units), self.nbytes)):
            for start in range(begin, stop, CHUNK_NBYTES):
                yield start, min(CHUNK_NBYTES, stop - start)

    def unit_chunks(self) -> Iterator[range]:
        """For each unit, the numbers of its chunks."""
        start = chunk_count(self.header_nbytes)
        for unit in self.units:
            stop = start + chunk_count(unit.nbytes)
            yield range(start, stop)
            start = stop

    def to_json(self) -> dict[str, Any]:
        header = list(self.checksums[: chunk_count(self.header_nbytes)])
        units = [
            {
                "name": unit.name,
                "kind": unit.kind,
                "offset": unit.offset,
                "nbytes": unit.nbytes,
                "xxh3_64": list(self.checksums[chunks.start : chunks.stop]),
            }
            for unit, chunks in zip(self.units, self.unit_chunks(), strict=True)
        ]
        return {"path": self.path, "nbytes": self.nbytes, "xxh3_64": header, "units": units}

    @classmethod
    def from_json(cls, raw: Any, version: int) -> "FileInfo":
        """The file that `raw` describes; raises KeyError, TypeError or ValueError, which name it.

        Files of format version 1 have no units: one covers all of the file, header and all, and so do its chunks.
        """
        path, nbytes = _path(raw), field(raw, "nbytes", int)
        checksums = _checksums(raw, path)
        if nbytes <= 0 or nbytes % PAGE:
            raise ValueError(f"{path}: {nbytes} bytes, expected a multiple of {PAGE}")
        if version == 1:
            _check_count(path, nbytes, len(checksums))
            return cls(path, nbytes, tuple(checksums), (UnitInfo("file", "dense", 0, nbytes),))
        header = len(checksums)
        units = []
        for value in field(raw, "units", list):
            units.append(_unit(value, path))
            found = _checksums(value, f"{path}: unit {units[-1].name}")
            _check_count(f"{path}: unit {units[-1].name}", units[-1].nbytes, len(found))
            checksums += found
        info = cls(path, nbytes, tuple(checksums), tuple(units))
        info.check_units()
        _check_count(f"{path}: header", info.header_nbytes, header)
        return info

    def check_units(self) -> None:
        """Raise ValueError unless the units begin behind a header, follow each other and end with the file."""
        position = round_up(max(self.header_nbytes, 1), PAGE)
        for unit in self.units:
            if unit.offset != position:
                raise ValueError(f"{self.path}: unit {unit.name} starts at byte {unit.offset}, expected {position}")
            if unit.nbytes <= 0 or unit.nbytes % PAGE:
                raise ValueError(
                    f"{self.path}: unit {unit.name} has {unit.nbytes} bytes, expected a multiple of {PAGE}"
                )
            position = unit.stop
        if position != self.nbytes:
            raise ValueError(f"{self.path}: its units end at byte {position}, the file at {self.nbytes}")
        names = [unit.name for unit in self.units]
        if len({*names}) != len(names):
            raise ValueError(f"{self.path}: several units are named {next(n for n in names if names.count(n) > 1)}")


def chunk_count(nbytes: int) -> int:
    """How many chunks the header or a unit of `nbytes` has."""
    return -(-nbytes // CHUNK_NBYTES)


def field(value: Any, key: str, kind: type[T]) -> T:
    """Field `key` of the object `value`, whose type must be exactly `kind`: neither 1.0 nor true passes for an int."""
    if not isinstance(value, dict):
        raise TypeError(f"expected an object with {key}, found {value!r}")
    found = value[key]
    if type(found) is not kind:
        raise TypeError(f"{key} is {found!r}, expected a {kind.__name__}")
    return found


def _path(raw: Any) -> str:
    path = field(raw, "path", str)
    parts = Path(path).parts
    if not parts or Path(path).is_absolute() or ".." in parts or "\0" in path:
        raise ValueError(f"{path!r}: points outside the store")
    return path


def _unit(raw: Any, path: str) -> UnitInfo:
    name, kind = field(raw, "name", str), field(raw, "kind", str)
    offset, nbytes = field(raw, "offset", int), field(raw, "nbytes", int)
    if kind not in KINDS:
        raise ValueError(f"{path}: unit {name} is {kind!r}, expected one of {', '.join(KINDS)}")
    return UnitInfo(name, cast(Kind, kind), offset, nbytes)


def _checksums(raw: Any, what: str) -> list[str]:
    found = field(raw, "xxh3_64", list)
    for checksum in found:
        if type(checksum) is not str or not _CHECKSUM.fullmatch(checksum):
            raise ValueError(f"{what}: checksum {checksum!r}, expected 16 hexadecimal digits")
    return list(found)


def _check_count(what: str, nbytes: int, checksums: int) -> None:
    if checksums != chunk_count(nbytes):
        raise ValueError(f"{what}: {nbytes} bytes with {checksums} checksums is impossible")
