"""A unit, which is what moves, and how what is read of it becomes its memory. Plain data, made by `block.py`.

A unit's memory is its extent as the file has it, unless tensors in it are compressed: then it holds all tensors of the
unit as they are used, one behind the other, and nothing of the extent.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from tiered.errors import StoreError
from tiered.store.file import FileInfo, Kind
from tiered.store.format import CHUNK_NBYTES, DTYPE_NAMES, TensorEntry
from tiered.store.manifest import Weight
from tiered.units import MIB

_MOVED_NBYTES: Final = 8 * MIB
"""Bytes of memory that one thread fills at a time: a chunk is shared out, and a thread is worth asking."""


@dataclass(frozen=True)
class Compressed:
    """A tensor stored as independent frames, which lie end to end: bytes [source] of the extent decode to bytes
    [target] of memory. A frame may be followed by gaps, which its size includes: none crosses a chunk of its unit."""

    source: TensorEntry
    target: TensorEntry
    frames: tuple[int, ...]
    """The size of each."""
    frame_nbytes: int
    """What each decodes to; the last may be less."""

    def to_json(self) -> dict[str, Any]:
        return {
            "dtype": DTYPE_NAMES[self.target.dtype],
            "shape": list(self.target.shape),
            "frames": list(self.frames),
            "frame_nbytes": self.frame_nbytes,
        }


@dataclass(frozen=True)
class Move:
    """Bytes of a chunk that become bytes of a unit's memory: of one tensor, all within one chunk."""

    tensor: TensorEntry
    source: int
    """Where they start, counted from the chunk's start."""
    target: int
    """Where in the unit's memory they go."""
    nbytes: int
    """How many bytes of memory they become."""
    frames: tuple[int, ...] = ()
    """Sizes of the frames that they are; none: they are copied as they are."""
    frame_nbytes: int = 0


@dataclass(frozen=True)
class Unit:
    """What moves: one extent of a block's file, and the weights in it.

    Its memory is the extent as it is in the file, if nothing in it is compressed. Otherwise it is the tensors alone,
    and each chunk is read elsewhere and then moved, as `moves` says. Offsets of `weights`, and of targets, count from
    the start of the unit's memory.
    """

    name: str
    """Unique in its block, and shown in traces and errors."""
    file: FileInfo
    offset: int
    """Where the extent starts in the file: a multiple of `PAGE`."""
    nbytes: int
    """Bytes of the extent: a multiple of `PAGE`."""
    chunks: range
    """Numbers of the file's chunks that lie in the extent: together they are the extent."""
    weights: Mapping[str, Weight]
    """By full name."""
    compressed: tuple[Compressed, ...]
    copied: tuple[tuple[TensorEntry, TensorEntry], ...]
    """Of a unit with compressed tensors, the others: as in the extent, and as in memory."""
    memory_nbytes: int
    kind: Kind = "dense"
    """"small": norms, biases and the like, which stay in memory for good; "expert": one of a mixture; "dense": whatever
    every token uses, streamed in the order of use."""

    @property
    def stored(self) -> Mapping[str, TensorEntry]:
        """Every tensor as it lies in the extent, by the name that it has in memory."""
        if not self.compressed:
            return {entry.name: entry for weight in self.weights.values() for entry in weight.parts.values()}
        return {item.target.name: item.source for item in self.compressed} | {e.name: e for e, _ in self.copied}

    @cached_property
    def moves(self) -> tuple[tuple[Move, ...], ...]:
        """For each chunk of a unit with compressed tensors, what becomes of its bytes.

        Raises StoreError where a frame does not lie within one chunk.
        """
        moves: list[list[Move]] = [[] for _ in self.chunks]
        for source, target in self.copied:
            start, stop = source.offset, source.offset + source.nbytes
            for cut in range(start // CHUNK_NBYTES * CHUNK_NBYTES, stop, CHUNK_NBYTES):
                first, last = max(start, cut), min(stop, cut + CHUNK_NBYTES)
                move = Move(target, first - cut, target.offset + first - start, last - first)
                moves[cut // CHUNK_NBYTES].append(move)
        for item in self.compressed:
            for number, move in _decoded(item, f"{self.file.path}: {item.target.name}"):
                moves[number].append(move)
        return tuple(map(tuple, moves))


def joined(units: Sequence[Unit]) -> Unit:
    """One unit of `units`, which follow each other in a file and hold nothing compressed."""
    first, last = units[0], units[-1]
    assert not any(unit.compressed for unit in units), "compressed units are not joined"
    if first is last:
        return first
    weights = {
        name: replace(weight, parts={part: _shifted(e, unit.offset - first.offset) for part, e in weight.parts.items()})
        for unit in units
        for name, weight in unit.weights.items()
    }
    nbytes = last.offset + last.nbytes - first.offset
    name, chunks = f"{first.name}+{len(units) - 1}", range(first.chunks.start, last.chunks.stop)
    return replace(first, name=name, nbytes=nbytes, chunks=chunks, weights=weights, memory_nbytes=nbytes)


def _shifted(entry: TensorEntry, nbytes: int) -> TensorEntry:
    return replace(entry, offset=entry.offset + nbytes)


def _decoded(item: Compressed, name: str) -> Iterator[tuple[int, Move]]:
    """How the frames of `item` come into memory: runs of them, each with the number of its chunk in the unit."""
    offset, target, stop = item.source.offset, item.target.offset, item.target.offset + item.target.nbytes
    most, first = max(1, _MOVED_NBYTES // item.frame_nbytes), 0
    while first < len(item.frames):
        number, start, count = offset // CHUNK_NBYTES, offset % CHUNK_NBYTES, 0
        room = CHUNK_NBYTES - start
        while count < most and first + count < len(item.frames) and item.frames[first + count] <= room:
            room -= item.frames[first + count]
            count += 1
        if not count:
            raise StoreError(f"{name}: a frame crosses a chunk of its unit; convert the model again")
        frames, nbytes = item.frames[first : first + count], min(count * item.frame_nbytes, stop - target)
        yield number, Move(item.target, start, target, nbytes, frames, item.frame_nbytes)
        offset, target, first = offset + sum(frames), target + nbytes, first + count
