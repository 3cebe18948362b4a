"""Writing a block: units and their tensors stream in one after the other, the file appears whole or not at all."""

import contextlib
import errno
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import xxhash

from tiered.errors import DiskFullError
from tiered.files import errors_of
from tiered.quant import Scheme
from tiered.store.block import METADATA_KEY, PAD_PREFIX, PLANES_SUFFIX, WeightInfo, block_metadata
from tiered.store.file import FileInfo, Kind, UnitInfo
from tiered.store.format import (
    ALIGNMENT,
    CHUNK_NBYTES,
    TensorEntry,
    hash_chunk,
    header_bytes,
    header_room_nbytes,
    tensor_nbytes,
)
from tiered.store.rows import RowLayout
from tiered.store.sweep import Sweep
from tiered.store.unit import Compressed
from tiered.units import PAGE, format_size, round_up


class BlockWriter:
    """Writes one block to `path`.part, then fsyncs and renames it.

    Tensors belong to the unit that was started last. Room for the header follows from the `names` of the weights to
    come and the number of `frames` that compressed ones may have, so that the data can be written in one forward
    sweep; the header goes in last. Use as a context manager: an exception leaves the .part file, which the next attempt
    overwrites.
    """

    def __init__(self, path: Path, root: Path, names: Sequence[str], frames: int = 0) -> None:
        self._path, self._root = path, root
        self._part = path.with_name(path.name + ".part")
        self._entries: list[TensorEntry] = []
        self._weights: dict[str, WeightInfo] = {}
        self._compressed: list[Compressed] = []
        self._data_start = header_room_nbytes(names, frames)
        self._file: io.BufferedRandom | None = None
        self._sweep: Sweep | None = None
        self._written = 0
        self._units: list[UnitInfo] = []
        """The finished ones."""
        self._unit: UnitInfo | None = None
        """The one that is being written, without its size."""
        self._hasher = xxhash.xxh3_64()
        self._chunk_nbytes = 0
        """Bytes of the chunk that is being written."""
        self._checksums: list[str] = []

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with _writing(self._part):
            self._file = self._part.open("w+b")
        self._sweep = self._start_sweep(self._file.raw)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._sweep is not None:
            self._sweep.close()
            self._sweep = None
        if self._file is not None:
            # Closing writes what is still buffered; on a full disk that fails once more, and must not hide the error.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    @property
    def folder(self) -> Path:
        """Where the block is written."""
        return self._path.parent

    def start_unit(self, name: str, kind: Kind = "dense") -> None:
        """What is added from now on is part of unit `name`, until the next one is started."""
        if self._unit is None:
            # Room for the header, whose checksums are made when it is known.
            with _writing(self._part):
                self._open_sweep().append(memoryview(bytes(self._data_start)))
            self._written = self._data_start
        self._end_unit()
        self._unit = UnitInfo(name, kind, self._written, 0)

    def add(self, name: str, dtype: torch.dtype, shape: Sequence[int], pieces: Iterable[memoryview]) -> None:
        """Append one tensor, whose bytes come in `pieces`, in order and of any sizes."""
        self._append(name, dtype, shape, pieces)

    def add_weight(
        self,
        name: str,
        shape: Sequence[int],
        scheme: Scheme | None,
        ranges: int | None = None,
        rows: RowLayout | None = None,
    ) -> None:
        """Record that the parts of `scheme`, NAME.q and so on, together are weight NAME; or, where it is stored in
        `ranges` of its rows, those of NAME#0, NAME#1 and so on. Without a `scheme` a range is the tensor NAME#k. With
        `rows` the tensor NAME.rows has all of it."""
        self._weights[name] = WeightInfo(tuple(shape), scheme, ranges, rows)

    def add_planes(
        self, name: str, dtype: torch.dtype, shape: Sequence[int], frames: Iterable[memoryview], frame_nbytes: int
    ) -> None:
        """Append a tensor as `frames` of at most a chunk each, under NAME.planes; each decodes to `frame_nbytes`, the
        last to what is left. Where a frame would cross a chunk there is a gap, which counts to the frame before it."""
        sizes: list[int] = []
        self._pad_to(ALIGNMENT)
        for frame in frames:
            left = CHUNK_NBYTES - self._chunk_nbytes
            if frame.nbytes > left and sizes:
                self._write(memoryview(bytes(left)))
                sizes[-1] += left
            elif frame.nbytes > left:
                self._pad(left)
            self._write(frame)
            sizes.append(frame.nbytes)
        total = sum(sizes)
        source = TensorEntry(name + PLANES_SUFFIX, torch.uint8, (total,), self._written - total, total)
        self._entries.append(source)
        # Where it decodes to is decided when the block is read.
        target = TensorEntry(name, dtype, tuple(shape), 0, tensor_nbytes(dtype, shape))
        self._compressed.append(Compressed(source, target, tuple(sizes), frame_nbytes))

    def finish(self) -> FileInfo:
        """Write the header, fsync, rename, fsync the folder. The block now exists; returns its entry."""
        file = self._open_file()
        if self._unit is None:
            self.start_unit("")  # a block of no tensors is its header
        self._end_unit()
        metadata = {"format": "pt", METADATA_KEY: block_metadata(self._weights, self._compressed)}
        header = header_bytes(self._entries, metadata, self._data_start)
        starts = range(0, len(header), CHUNK_NBYTES)
        checksums = [hash_chunk(header[start : start + CHUNK_NBYTES]) for start in starts] + self._checksums
        with _writing(self._part):
            self._open_sweep().finish()
            file.seek(0)
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.close()
        self._file = None
        self._part.replace(self._path)
        fsync_folder(self._path.parent)
        path = self._path.relative_to(self._root).as_posix()
        return FileInfo(path, self._written, tuple(checksums), tuple(self._units))

    def _open_file(self) -> io.BufferedRandom:
        assert self._file is not None, "BlockWriter is used inside its with block"
        return self._file

    def _open_sweep(self) -> Sweep:
        assert self._sweep is not None, "BlockWriter is used inside its with block"
        return self._sweep

    def _append(self, name: str, dtype: torch.dtype, shape: Sequence[int], pieces: Iterable[memoryview]) -> TensorEntry:
        assert self._unit is not None, "start_unit comes first"
        self._pad_to(ALIGNMENT)
        entry = TensorEntry(name, dtype, tuple(shape), self._written, tensor_nbytes(dtype, shape))
        self._entries.append(entry)
        for piece in pieces:
            self._write(memoryview(piece).cast("B"))
        written = self._written - entry.offset
        assert written == entry.nbytes, f"{name}: {written} bytes written, {entry.nbytes} expected"
        return entry

    def _end_unit(self) -> None:
        """Fill up the unit that is being written, if any; one of no bytes is left out."""
        self._pad_to(PAGE)
        self._end_chunk()
        if self._unit is not None and self._written > self._unit.offset:
            self._units.append(replace(self._unit, nbytes=self._written - self._unit.offset))

    def _pad_to(self, multiple: int) -> None:
        self._pad(round_up(self._written, multiple) - self._written)

    def _pad(self, gap: int) -> None:
        if gap:
            self._entries.append(
                TensorEntry(f"{PAD_PREFIX}{len(self._entries)}", torch.uint8, (gap,), self._written, gap)
            )
            self._write(memoryview(bytes(gap)))

    def _write(self, data: memoryview) -> None:
        with _writing(self._part):
            self._open_sweep().append(data)
        while data.nbytes:
            part = data[: CHUNK_NBYTES - self._chunk_nbytes]
            self._hash(part)
            self._written += part.nbytes
            self._chunk_nbytes += part.nbytes
            data = data[part.nbytes :]
            if self._chunk_nbytes == CHUNK_NBYTES:
                self._end_chunk()

    def _start_sweep(self, file: io.RawIOBase) -> Sweep:
        return Sweep(file)

    def _hash(self, data: memoryview) -> None:
        self._hasher.update(data)

    def _end_chunk(self) -> None:
        if self._chunk_nbytes:
            self._checksums.append(self._hasher.hexdigest())
            self._hasher.reset()
            self._chunk_nbytes = 0


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`, durably: either the old file or the whole new one is there after a crash."""
    part = path.with_name(path.name + ".part")
    with _writing(part):
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        fsync_folder(path.parent)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Have errors of the operating system name `path`; where the disk is full, raise DiskFullError instead."""
    try:
        with errors_of(path):
            yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        stat = os.statvfs(path.parent)
        raise DiskFullError(
            f"{path}: the disk is full ({format_size(stat.f_bavail * stat.f_frsize)} free); "
            "finished blocks are kept: free some space and run the same command again to resume"
        ) from error


def fsync_folder(folder: Path) -> None:
    """Make durable that names were added to `folder` or removed from it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with errors_of(folder):
            os.fsync(fd)
    finally:
        os.close(fd)
