"""A block file of format version 1 as a source of weights: its bytes as they are, each chunk tested before it is used.

In: a file and its layout. Out: what `write_block` asks of a source. Nothing is quantized or compressed anew. Called by
`upgrade.py`.
"""

import errno
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch

from tiered.convert.blocks import RangeRecipe, TensorRecipe
from tiered.convert.source import Frames, Packed
from tiered.errors import StoreError
from tiered.files import reading
from tiered.quant.zstd import decompress_frame
from tiered.store import CHUNK_NBYTES, FileInfo, TensorEntry, hash_chunk
from tiered.store.block import BlockLayout, Compressed
from tiered.store.sweep import bypass_cache

_AHEAD: Final = 2
"""Chunks that are read while one is used."""
_HELD: Final = 2 * _AHEAD + 1
"""Chunks in memory: the order of use may jump back and forth between two places of the file."""
READING_NBYTES: Final = _HELD * CHUNK_NBYTES
"""Memory that reading takes."""


class StoredBlock:
    """The weights of `layout`, a block of the store at `folder`. A context manager; raises StoreError and ReadError."""

    def __init__(self, folder: Path, layout: BlockLayout) -> None:
        self._weights = layout.weights
        self._compressed = {item.target.name: item for item in layout.compressed}
        self._chunks = _Chunks(folder / layout.file.path, layout.file)
        # The header has been believed already: test it before anything follows from that.
        entries = (entry for weight in self._weights.values() for entry in weight.parts.values())
        self._header_nbytes = min((self._stored(entry).offset for entry in entries), default=layout.file.nbytes)

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

    def plain(self, part: RangeRecipe) -> Iterator[memoryview] | Frames:
        return self._codes(self._weights[part.whole.name].parts[""], part)

    def packed(self, part: RangeRecipe) -> Packed:
        parts = self._weights[part.whole.name].parts
        scale, zero = (self._chunks.pieces(*_extent(parts[name], part)) for name in ("scale", "zero"))
        return Packed(self._codes(parts["q"], part), scale, zero)

    def _codes(self, entry: TensorEntry, part: RangeRecipe) -> Iterator[memoryview] | Frames:
        if entry.name not in self._compressed:
            return self._chunks.pieces(*_extent(entry, part))
        item = self._compressed[entry.name]
        if part.number is not None:
            return self._decoded(item, *_extent(replace(entry, offset=0), part))
        pieces = self._chunks.pieces(item.source.offset, item.source.nbytes)
        return Frames(item.frames, entry.nbytes, pieces, item.frame_nbytes)

    def _decoded(self, item: Compressed, start: int, nbytes: int) -> Iterator[memoryview]:
        """Bytes [start, start + nbytes) of a tensor that is compressed: a frame need not end where a range does."""
        stop, offset = start + nbytes, item.source.offset
        for number, size in enumerate(item.frames):
            begin = number * item.frame_nbytes
            end = min(begin + item.frame_nbytes, item.target.nbytes)
            if begin < stop and end > start:
                frame = b"".join(self._chunks.pieces(offset, size))
                out = memoryview(bytearray(end - begin))
                decompress_frame(frame, out, name=item.target.name)
                yield out[max(start - begin, 0) : stop - begin]
            offset += size

    def _stored(self, entry: TensorEntry) -> TensorEntry:
        """The tensor as the file has it."""
        return self._compressed[entry.name].source if entry.name in self._compressed else entry


def _extent(entry: TensorEntry, part: RangeRecipe) -> tuple[int, int]:
    """Offset and size of the rows of `part` in `entry`, which has all rows of its tensor."""
    if part.number is None:
        return entry.offset, entry.nbytes
    row_nbytes = entry.nbytes // part.whole.matrix[0]
    return entry.offset + part.start * row_nbytes, len(part.rows) * row_nbytes


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
        """By number, the one that was used last at the end."""

    def pieces(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Bytes [offset, offset + nbytes) of the file, in pieces. Each is valid until the next is asked for."""
        stop = offset + nbytes
        while offset < stop:
            number = offset // CHUNK_NBYTES
            chunk = self._chunks[number]
            for ahead in range(min(number + _AHEAD, len(self._chunks) - 1), number, -1):
                self._begin(ahead)
            read, memory = self._begin(number)
            read.result()
            piece = memoryview(memory)[offset - chunk.offset : min(stop, chunk.stop) - chunk.offset]
            yield piece
            offset += piece.nbytes

    def close(self) -> None:
        """Wait for reads in flight and free the memory."""
        self._threads.shutdown(cancel_futures=True)
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
