"""The disk reader: positional reads of whole pieces, in a pool of its own threads, into memory it is given.

In: a file of the store and page-aligned memory. Out: the memory filled and, where the policy says so, verified.
The event loop only waits; the reads run in the pool. What is compressed is read into buffers of one chunk, and the same
threads decode it into its place.
"""

import asyncio
import contextlib
import functools
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np

from tiered.errors import ReadError, StoreError
from tiered.io.modes import ReadMode
from tiered.io.threads import Check, IdleClock, IOThreads, all_of
from tiered.io.transfer import ByteCounter, Faults, Ladder, TransferError, TransferFile, describe
from tiered.io.verify import ChunkVerifier
from tiered.kernels import decode_planes
from tiered.store import FileInfo, Move, Unit
from tiered.trace import Tracer
from tiered.units import MIB, PAGE, round_up

logger = logging.getLogger(__name__)

_PARTS: Final = 4
_LEAST_PART_NBYTES: Final = 2 * MIB
"""A chunk is read in so many parts side by side, none smaller than this. A ring may hold two units of one chunk each,
and a disk wants 8 to 16 MiB in flight; but each part costs a turn of the interpreter."""


CHUNK_BUFFERS: Final = 3
"""Buffers for chunks of compressed units: two that are being read keep a disk busy while a third is decoded."""


class ChunkBuffers:
    """Memory for chunks of compressed units, one chunk each, lent in the order in which it is asked for.

    For one event loop. `buffers` may be none: then nothing may be asked for.
    """

    def __init__(self, buffers: Sequence[memoryview] = ()) -> None:
        self._free: asyncio.Queue[memoryview] = asyncio.Queue()
        self.is_empty = not buffers
        for buffer in buffers:
            self._free.put_nowait(buffer)

    @contextlib.asynccontextmanager
    async def borrow(self) -> AsyncIterator[memoryview]:
        """A buffer until the context ends."""
        buffer = await self._free.get()
        try:
            yield buffer
        finally:
            self._free.put_nowait(buffer)


class DiskReader:
    """Reads files below `root` with `threads` reads in flight. A context manager: leaving it waits for all reads."""

    def __init__(
        self,
        root: Path,
        verifier: ChunkVerifier,
        trace: Tracer,
        threads: int = 4,
        mode: ReadMode | None = None,
        preadv: Faults = os.preadv,
        clock: IdleClock | None = None,
    ) -> None:
        self._root = root
        self._verifier = verifier
        self._trace = trace
        self._preadv = preadv
        self._ladder = Ladder(mode, _warn)
        self._files: dict[str, TransferFile] = {}
        self._lock = threading.Lock()
        self._read_so_far = ByteCounter()
        self._count = threads
        self._threads = IOThreads(threads, "tiered-read", clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def mode(self) -> ReadMode | None:
        """How files are read; None until the first one is opened, unless a mode was given."""
        return self._ladder.mode

    @property
    def refused(self) -> tuple[str, ...]:
        """Better ways to read that the file system has refused, and why."""
        return self._ladder.refused

    @property
    def bytes_read(self) -> int:
        """Bytes the system calls have delivered so far."""
        return self._read_so_far.nbytes

    @property
    def idle_seconds(self) -> float:
        """Seconds so far in which no read was queued or running."""
        return self._threads.idle_seconds

    async def read_chunk(self, file: FileInfo, chunk: int, memory: memoryview) -> None:
        """Read chunk number `chunk` of `file` into `memory`, which is as large as the chunk, in parts side by side.

        Each part is read piece after piece in one thread. If the policy says so, a thread tests the checksum then.
        All reads have ended when this returns or raises. Raises ReadError or StoreError.
        """
        offset, nbytes = file.chunks[chunk].offset, memory.nbytes
        step = round_up(max(_LEAST_PART_NBYTES, -(-nbytes // _PARTS)), PAGE)
        await all_of(
            self.read_pages(file, offset + start, memory[start : start + step]) for start in range(0, nbytes, step)
        )
        if self._verifier.wants(file, chunk):
            await self.call(functools.partial(self._verifier.check, file, chunk, memory))

    async def read_unit(self, unit: Unit, memory: memoryview, buffers: ChunkBuffers) -> None:
        """Read the chunks of `unit` side by side to its `memory`, as `read_chunk` does. Those of a unit with compressed
        tensors are read into `buffers` and decoded from there, in the pool.

        All reads have ended when this returns or raises: only then may the memory be lent to another unit.
        """
        chunks, file = unit.file.chunks, unit.file
        if not unit.compressed:
            await all_of(
                self.read_chunk(
                    file, number, memory[chunks[number].offset - unit.offset : chunks[number].stop - unit.offset]
                )
                for number in unit.chunks
            )
            return
        if buffers.is_empty:
            raise StoreError(
                f"{self._root / file.path}: unit {unit.name} has compressed tensors, expected only what is streamed to "
                "have them; convert the model again"
            )
        await all_of(
            self._read_moved(unit, number, moves, memory, buffers)
            for number, moves in zip(unit.chunks, unit.moves, strict=True)
        )

    async def _read_moved(
        self, unit: Unit, number: int, moves: Sequence[Move], memory: memoryview, buffers: ChunkBuffers
    ) -> None:
        """Read chunk `number` of the unit's file into a buffer, and from there move it into the unit's `memory`."""
        async with buffers.borrow() as buffer:
            chunk = buffer[: unit.file.chunks[number].nbytes]
            await self.read_chunk(unit.file, number, chunk)
            await all_of(self.call(functools.partial(self._move, unit, move, chunk, memory)) for move in moves)

    def _move(self, unit: Unit, move: Move, chunk: memoryview, memory: memoryview) -> None:
        target = memory[move.target : move.target + move.nbytes]
        with self._trace.span("decode", move.tensor.name, move.nbytes):
            if move.frames:
                frames = chunk[move.source : move.source + sum(move.frames)]
                name = f"{self._root / unit.file.path}: {move.tensor.name}"
                decode_planes(frames, move.frames, move.frame_nbytes, target, move.tensor.dtype, name)
            else:
                # By numpy, which lets other threads run meanwhile.
                np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(chunk, np.uint8)[move.source :][: move.nbytes])

    async def read_pages(self, file: FileInfo, offset: int, memory: memoryview) -> None:
        """Read `memory.nbytes` from `offset` (both multiples of 4096) without touching checksums."""
        await self._threads.transfer(lambda check: self._read(file, offset, memory, check))

    async def read_parts(self, file: FileInfo, parts: Sequence[tuple[int, memoryview]]) -> None:
        """`read_pages` for several pairs (offset, memory), mostly small ones: each thread takes a share of them."""
        count = min(len(parts), self._count)

        def read(share: Sequence[tuple[int, memoryview]], check: Check) -> None:
            for offset, memory in share:
                self._read(file, offset, memory, check)

        await all_of(self._threads.transfer(functools.partial(read, parts[i::count])) for i in range(count))

    async def call(self, work: Callable[[], None]) -> None:
        """Run `work` (a test, a copy, decoding) in the pool."""
        await self._threads.call(lambda check: work())

    def close(self) -> None:
        """Drop queued reads, wait for running ones, close the files: nothing touches memory afterwards."""
        self._threads.close()
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def _read(self, file: FileInfo, offset: int, memory: memoryview, check: Check) -> None:
        """Fill `memory` from `offset`."""
        opened = self._open(file)
        with self._trace.span("disk", file.path, memory.nbytes):
            try:
                count = opened.transfer(self._preadv, offset, memory, check, self._read_so_far)
            except TransferError as error:
                raise ReadError(
                    f"{self._root / file.path}: read of {error.nbytes:,} bytes at {error.offset:,} failed: "
                    f"{describe(error)}; check the disk and the kernel log"
                ) from error
            if count < memory.nbytes:
                raise StoreError(
                    f"{self._root / file.path}: ends at byte {offset + count:,}, expected {file.nbytes:,}; "
                    "it was truncated while in use, convert the model again"
                )

    def _open(self, file: FileInfo) -> TransferFile:
        with self._lock:
            opened = self._files.get(file.path)
            if opened is not None:
                return opened
            path, is_first = self._root / file.path, self._ladder.mode is None
            try:
                opened = self._ladder.open(path)
            except FileNotFoundError:
                raise StoreError(f"{path}: missing; it was removed while in use, convert the model again") from None
            except OSError as error:
                raise ReadError(f"{path}: cannot be opened: {error.strerror}") from error
            if is_first and self.refused:
                logger.warning("reading with %s (%s)", opened.mode.value, "; ".join(self.refused))
            self._files[file.path] = opened
            return opened


def _warn(refused: ReadMode, error: OSError, used: ReadMode) -> None:
    logger.warning("%s refused while reading; using %s", refused.value, used.value)
