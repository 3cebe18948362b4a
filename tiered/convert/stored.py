"""A block file of format version 1 as a source of weights: its bytes as they are, each chunk tested before it is used.

In: a file and its layout. Out: what `write_block` asks of a source. Nothing is quantized anew; what is compressed with
zstd is decoded. Called by `upgrade.py`.
"""

import errno
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch
import zstandard

from tiered.convert.blocks import RangeRecipe, TensorRecipe
from tiered.convert.source import Packed
from tiered.errors import StoreError
from tiered.files import reading
from tiered.process import shut_down
from tiered.store import CHUNK_NBYTES, FileInfo, TensorEntry, hash_chunk
from tiered.store.block import BlockLayout
from tiered.store.sweep import bypass_cache
from tiered.store.unit import Compressed
from tiered.units import MIB

_AHEAD: Final = 2
"""Chunks that are read while one is used; of scales and zeros, which come a few with many codes, none."""
_HELD: Final = _AHEAD + 3
"""Chunks in memory: the order of use may jump between codes, scales and zeros, in three places of the file."""
_FRAME_NBYTES: Final = 2 * MIB
"""Bytes that a zstd frame decodes to, at most; stores of version 1 have frames of just so many."""
READING_NBYTES: Final = (_HELD + 1) * CHUNK_NBYTES + 4 * _FRAME_NBYTES
"""Memory that reading takes: frames are put together and decoded one at a time."""


class StoredBlock:
    """The weights of `layout`, a block of the store at `folder`. A context manager; raises StoreError and ReadError."""

    def __init__(self, folder: Path, layout: BlockLayout) -> None:
        self._weights = layout.weights
        self._compressed = {item.target.name: item for item in layout.compressed}
        self._chunks = _Chunks(folder / layout.file.path, layout.file)
        # The header has been believed already: test it before anything follows from that.
        (unit,) = layout.units
        self._stored = unit.stored
        self._header_nbytes = min((entry.offset for entry in self._stored.values()), default=layout.file.nbytes)

    def __enter__(self) -> Self:
        try:
            for _ in self._chunks.pieces(0, self._header_nbytes):
                pass
        except BaseException:
            self._chunks.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._chunks.close()

    def dtype(self, tensor: TensorRecipe) -> torch.dtype:
        return next(iter(self._weights[tensor.name].parts.values())).dtype

    def plain(self, part: RangeRecipe) -> Iterator[memoryview]:
        return self._bytes(self._weights[part.whole.name].parts[""], part)

    def packed(self, part: RangeRecipe) -> Packed:
        parts = self._weights[part.whole.name].parts
        scale, zero = (self._bytes(parts[name], part, 0) for name in ("scale", "zero"))
        return Packed(self._bytes(parts["q"], part), scale, zero)

    def _bytes(self, entry: TensorEntry, part: RangeRecipe, ahead: int = _AHEAD) -> Iterator[memoryview]:
        """The bytes of the rows of `part` in `entry`, which has all rows of its tensor."""
        start, nbytes = 0, entry.nbytes
        if part.number is not None:
            row_nbytes = entry.nbytes // part.whole.matrix[0]
            start, nbytes = part.start * row_nbytes, len(part.rows) * row_nbytes
        if entry.name in self._compressed:
            return self._decoded(self._compressed[entry.name], start, nbytes)
        return self._chunks.pieces(self._stored[entry.name].offset + start, nbytes, ahead)

    def _decoded(self, item: Compressed, start: int, nbytes: int) -> Iterator[memoryview]:
        """Bytes [start, start + nbytes) of a tensor in zstd frames, which need not end where a range does."""
        stop, offset = start + nbytes, item.source.offset
        for number, size in enumerate(item.frames):
            begin = number * item.frame_nbytes
            end = min(begin + item.frame_nbytes, item.target.nbytes)
            if begin < stop and end > start:
                if max(size, end - begin) > 2 * _FRAME_NBYTES:
                    raise StoreError(f"{item.target.name}: a zstd frame of {max(size, end - begin):,} bytes is damaged")
                frame = b"".join(self._chunks.pieces(offset, size))
                yield _decompressed(frame, end - begin, item.target.name)[max(start - begin, 0) : stop - begin]
            offset += size


def _decompressed(frame: bytes, nbytes: int, name: str) -> memoryview:
    """The `nbytes` bytes that a zstd frame decodes to. Raises StoreError."""
    try:
        # The header is checked first: a damaged one may claim any size, which would be allocated.
        claimed = zstandard.get_frame_parameters(frame).content_size
        if claimed != nbytes:
            raise StoreError(
                f"{name}: expected a zstd frame of {nbytes:,} bytes, found one of {claimed:,}; convert the model again"
            )
        return memoryview(zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False))
    except zstandard.ZstdError as error:
        raise StoreError(f"{name}: damaged zstd frame ({error}); convert the model again") from error


class _Chunks:
    """The chunks of one file, read past the page cache and tested ahead of their use, in threads."""

    def __init__(self, path: Path, file: FileInfo) -> None:
        self._path, self._chunks = path, file.chunks
        with reading(path):
            self._file = path.open("rb", buffering=0)
        bypass_cache(self._file.fileno(), True)
        self._threads = ThreadPoolExecutor(_AHEAD, "tiered-upgrade")
        self._memory = [mmap.mmap(-1, CHUNK_NBYTES) for _ in range(_HELD)]
        self._free = list(self._memory)
        self._read: OrderedDict[int, tuple[Future[None], mmap.mmap]] = OrderedDict()
        """By number, in the order in which they are given up: the one that was used last at the end."""

    def pieces(self, offset: int, nbytes: int, ahead: int = _AHEAD) -> Iterator[memoryview]:
        """Bytes [offset, offset + nbytes) of the file, in pieces, while so many chunks `ahead` are being read. Each is
        valid until the next is asked for."""
        stop = offset + nbytes
        while offset < stop:
            number = offset // CHUNK_NBYTES
            chunk = self._chunks[number]
            for following in range(min(number + ahead, len(self._chunks) - 1), number, -1):
                self._begin(following)
            read, memory = self._begin(number)
            read.result()
            piece = memoryview(memory)[offset - chunk.offset : min(stop, chunk.stop) - chunk.offset]
            yield piece
            offset += piece.nbytes
            if offset == chunk.stop and number in self._read:
                self._read.move_to_end(number, last=False)  # what comes next is not in it

    def close(self) -> None:
        """Wait for reads in flight and free the memory."""
        shut_down(self._threads, cancel_futures=True)
        self._file.close()
        for memory in self._memory:
            with suppress(BufferError):  # an error's traceback may still refer to it
                memory.close()

    def _begin(self, number: int) -> "tuple[Future[None], mmap.mmap]":
        """Chunk `number`, which is being read or has been, and its memory."""
        if number not in self._read:
            if not self._free:
                _, (unused, memory) = self._read.popitem(last=False)
                wait([unused])
                self._free.append(memory)
            memory = self._free.pop()
            self._read[number] = self._threads.submit(self._read_chunk, number, memory), memory
        self._read.move_to_end(number)
        return self._read[number]

    def _read_chunk(self, number: int, memory: mmap.mmap) -> None:
        chunk = self._chunks[number]
        with memoryview(memory) as whole, whole[: chunk.nbytes] as data:
            done = 0
            with reading(self._path):
                while done < chunk.nbytes and (count := self._pread(data[done:], chunk.offset + done)):
                    done += count
            found = hash_chunk(data[:done])
        if done < chunk.nbytes or found != chunk.checksum:
            raise StoreError(
                f"{self._path}: chunk {number} (bytes {chunk.offset:,} to {chunk.stop:,}) is corrupt: expected xxh3 "
                f"{chunk.checksum}, found {found}; convert the model again"
            )

    def _pread(self, data: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._file.fileno(), [data], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Some file systems refuse direct reads only now, or where a file was cut off.
            bypass_cache(self._file.fileno(), False)
            return os.preadv(self._file.fileno(), [data], offset)
