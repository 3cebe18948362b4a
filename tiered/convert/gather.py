"""Tensors gathered from slices of files: positional reads of row panels. Nothing is mapped: it would count as our
memory.

In: for each tensor, the pieces that it is put together from, and where in which files they lie. Out: panels of its
rows, which any thread reads, one at a time: the disk is asked for them in order.
"""

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch

from tiered.convert.panels import Panels, rooms_nbytes
from tiered.convert.source import PANEL_NBYTES, StoredTensor, WeightReader, panel_rows, tensor_bytes
from tiered.errors import CheckpointError, ReadError
from tiered.files import reading
from tiered.kernels import read_rows, room_in
from tiered.units import round_up

_MOST_OPEN: Final = 64
"""Files that are open at once: a checkpoint may have a thousand, about as many as a process may open."""
_AHEAD_NBYTES: Final = 128 << 10
"""Bytes that are asked for together where only some columns are read. Of more Linux reads no more at once than the
device's read-ahead, of which this is the usual size."""
_WINDOW_NBYTES: Final = 4 << 20
"""Bytes of whole rows between those that are read and the last ones that have been asked for."""


class Extent(NamedTuple):
    """Bytes of one file."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Region:
    """A tensor whose values, row after row, are the bytes of `extents`, one after the other."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> "Region":
        """Some of its rows."""
        nbytes = self.dtype.itemsize * prod(self.shape[1:])
        extents = cut(self.extents, start * nbytes, (stop - start) * nbytes)
        return Region(self.dtype, (stop - start, *self.shape[1:]), extents)


class Piece(NamedTuple):
    """A rectangle of a tensor's matrix, whose first value is at `row` and `column`."""

    row: int
    column: int
    region: Region

    @property
    def stop(self) -> int:
        return self.row + (self.region.shape[0] if self.region.shape else 1)


@dataclass(frozen=True)
class Gathered:
    """A tensor and the pieces that cover it."""

    stored: StoredTensor
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, regions: Sequence[Region], *, side_by_side: bool = False) -> "Gathered":
        """The tensor that `regions`, all of one shape, are: one below the other, or side by side."""
        shape, count = regions[0].shape, len(regions)
        if side_by_side:
            whole: tuple[int, ...] = (shape[0], count * shape[1])
            pieces = tuple(Piece(0, number * shape[1], region) for number, region in enumerate(regions))
        else:
            # A stack [experts, out, in] is one matrix, and so is a scalar.
            width = shape[-1] if len(shape) > 1 else 1
            rows = prod(shape) // width if width else 0
            folded = (rows, width) if len(shape) > 1 else (rows,)
            whole = (count * shape[0], *shape[1:]) if shape else shape
            pieces = tuple(
                Piece(number * rows, 0, Region(region.dtype, folded, region.extents))
                for number, region in enumerate(regions)
            )
        return cls(StoredTensor(regions[0].dtype, whole), pieces)


def cut(extents: Iterable[Extent], start: int, nbytes: int) -> tuple[Extent, ...]:
    """The `nbytes` from byte `start` on of `extents`, which have that many."""
    found = []
    for path, offset, length in extents:
        skipped = min(start, length)
        taken = min(length - skipped, nbytes)
        if taken:
            found.append(Extent(path, offset + skipped, taken))
        start -= skipped
        nbytes -= taken
        if not nbytes:
            break
    return tuple(found)


class Gatherer:
    """Reads panels of gathered tensors; it keeps the last files open."""

    def __init__(self) -> None:
        self._reading = threading.Lock()  # of the only thread that opens and reads weight files just now
        self._open: dict[Path, int] = {}

    def panels(self, tensor: Gathered, rows: range | None = None) -> Panels[torch.Tensor]:
        """The tensor, or these of its rows, as `WeightReader.panels` says."""
        dtype, shape = tensor.stored.dtype, tensor.stored.shape
        count, row_numel, step = panel_rows(shape, dtype.itemsize)
        rows = range(count) if rows is None else rows
        starts = range(rows.start, rows.stop if row_numel else rows.start, step)
        row_nbytes = row_numel * dtype.itemsize

        def make(number: int, room: torch.Tensor) -> torch.Tensor:
            start = starts[number]
            flat = room_in(room, (min(step, rows.stop - start) * row_numel,), dtype)
            # As bytes: numpy knows no bfloat16, and torch would wake its own threads for a copy.
            target = np.frombuffer(tensor_bytes(flat), np.uint8).reshape(-1, row_nbytes)
            with self._reading:
                for piece in tensor.pieces:
                    self._fill(piece, start, target)
            return flat.view(-1, row_numel) if len(shape) > 1 else flat.view(shape and (-1,))

        return Panels(len(starts), make, min(step, len(rows)) * row_nbytes)

    def rectangle(
        self, extent: Extent, row_nbytes: int, rows: range, columns: range, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """u8 [rows, columns], counted in bytes, of the matrix of rows of `row_nbytes` that lies in `extent`; in `out`,
        u8, if that is large enough."""
        target = room_in(out, (len(rows), len(columns)), torch.uint8)
        with self._reading:
            self._fill_rectangle(target, extent, row_nbytes, rows.start, columns)
        return target

    def close(self) -> None:
        with self._reading:
            self._close_files()

    def _fill_rectangle(
        self, target: torch.Tensor, extent: Extent, row_nbytes: int, first: int, columns: range
    ) -> None:
        fd, begin = self._fd(extent.path), extent.offset + first * row_nbytes + columns.start
        data, width = tensor_bytes(target), len(columns)
        if width == row_nbytes:
            _read(fd, extent.path, begin, data)
            return
        # Short reads far apart, and those beside them come next: asked for together, the disk does many at a time.
        count, together, asked = target.shape[0], target.shape[0], 0
        is_whole = row_nbytes <= _AHEAD_NBYTES and columns.start == 0
        if is_whole:
            together = max(1, _WINDOW_NBYTES // row_nbytes)
        elif row_nbytes > _AHEAD_NBYTES:
            for start in range(round_up(columns.start, _AHEAD_NBYTES), columns.stop, _AHEAD_NBYTES):
                for row in range(count):
                    place = extent.offset + (first + row) * row_nbytes + start
                    os.posix_fadvise(fd, place, min(_AHEAD_NBYTES, row_nbytes - start), os.POSIX_FADV_WILLNEED)
        for row in range(0, count, together):
            stop = min(count, row + together)
            while is_whole and asked < (wanted := min(count, stop + together) * row_nbytes):
                nbytes = min(_AHEAD_NBYTES, wanted - asked)
                os.posix_fadvise(fd, extent.offset + first * row_nbytes + asked, nbytes, os.POSIX_FADV_WILLNEED)
                asked += nbytes
            done = read_rows(fd, begin + row * row_nbytes, row_nbytes, width, target[row:stop])
            for each in range(row + done, stop):
                _read(fd, extent.path, begin + each * row_nbytes, data[each * width : (each + 1) * width], keep=True)
        if columns.stop == row_nbytes:  # the rows have been read through
            os.posix_fadvise(fd, extent.offset, extent.nbytes, os.POSIX_FADV_DONTNEED)

    def _fill(self, piece: Piece, start: int, target: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> None:
        """Read what `target` [rows, bytes of a row], which begins at row `start`, has of `piece`."""
        first, stop = max(start, piece.row), min(start + target.shape[0], piece.stop)
        if first >= stop:
            return
        itemsize, shape = piece.region.dtype.itemsize, piece.region.shape
        width = itemsize * (shape[-1] if len(shape) > 1 else 1)
        extents = cut(piece.region.extents, (first - piece.row) * width, (stop - first) * width)
        part = target[first - start : stop - start]
        if width == target.shape[1]:
            self._read(extents, part.reshape(-1).data)
            return
        columns = np.empty((stop - first, width), np.uint8)
        self._read(extents, columns.reshape(-1).data)
        part[:, piece.column * itemsize : piece.column * itemsize + width] = columns

    def _read(self, extents: Iterable[Extent], data: memoryview) -> None:
        done = 0
        for path, offset, nbytes in extents:
            _read(self._fd(path), path, offset, data[done : done + nbytes])
            done += nbytes

    def _fd(self, path: Path) -> int:
        if path not in self._open:
            if len(self._open) == _MOST_OPEN:
                self._close_files()
            try:
                with reading(path):
                    self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise CheckpointError(f"{path}: gone since the conversion began; put it back to resume") from None
        return self._open[path]

    def _close_files(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()


class GatheredReader(WeightReader):
    """A `WeightReader` of one checkpoint whose tensors are spread over its files: a path says nothing of them."""

    def __init__(self, tensors: Mapping[str, Gathered]) -> None:
        self._gathered, self._gatherer = tensors, Gatherer()
        self._stored = {name: tensor.stored for name, tensor in tensors.items()}

    def tensors(self, path: Path) -> Mapping[str, StoredTensor]:
        return self._stored

    def panels(self, path: Path, name: str, rows: range | None = None) -> Panels[torch.Tensor]:
        return self._gatherer.panels(self._gathered[name], rows)

    def known(self, path: Path) -> Mapping[str, StoredTensor]:
        return self._stored

    def working_nbytes(self, path: Path) -> int:
        # Columns of one piece, before they are put side by side, besides the panels.
        return panels_nbytes(self._stored.values()) + PANEL_NBYTES

    def close(self) -> None:
        self._gatherer.close()


def panels_nbytes(tensors: Iterable[StoredTensor]) -> int:
    """Bytes of memory that the panels of `tensors` take at most."""
    largest = max((tensor.nbytes for tensor in tensors), default=0)
    return rooms_nbytes(min(PANEL_NBYTES, largest))


def _read(fd: int, path: Path, offset: int, data: memoryview, *, keep: bool = False) -> None:
    """Fill `data` from `offset` of the file, leaving nothing of it in the page cache unless it is to `keep` it."""
    done = 0
    while done < len(data):
        try:
            count = os.preadv(fd, [data[done:]], offset + done)
        except OSError as error:
            raise ReadError(f"{path}: reading {len(data):,} bytes at {offset:,} failed: {error.strerror}") from error
        if count == 0:
            raise CheckpointError(f"{path}: ends at byte {offset + done:,}, its header promises more; it was truncated")
        done += count
    if not keep:
        os.posix_fadvise(fd, offset, len(data), os.POSIX_FADV_DONTNEED)
