"""The disk reader: positional reads of whole pieces, in a pool of its own threads, into memory it is given.

In: a file of the store and page-aligned memory. Out: the memory filled and, where the policy says so, verified.
The event loop only waits; the reads run in the pool. What is compressed is read into buffers of one chunk, and the same
threads decode it into its place.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
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
_URGENT_PART_NBYTES: Final = 4 * MIB
"""Of experts several are read at once, so few of them are cut into parts."""
_LOOK_SECONDS: Final = 0.05
"""Seconds between two looks whether a transfer that gives way is still wanted."""

OnEnd = Callable[[Exception | None], None]
"""Called when a read has ended, with its error."""


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
        scattered: int | None = None,
    ) -> None:
        """`scattered` small reads of `read_parts` are in flight at once; None: as many as others."""
        self._root = root
        self._verifier = verifier
        self._trace = trace
        self._preadv = preadv
        self._ladder = Ladder(mode, _warn)
        self._files: dict[str, TransferFile] = {}
        self._lock = threading.Lock()
        self._read_so_far = ByteCounter()
        self._most, self._count = threads, threads if scattered is None else scattered
        self._threads = IOThreads(threads, "tiered-read", clock)
        self._scattered = IOThreads(self._count, "tiered-rows", clock)
        self._urgent = IOThreads(threads, "tiered-urgent", clock)
        self._checks = IOThreads(threads, "tiered-check", clock)
        self._way = RightOfWay()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def start_threads(self) -> None:
        """Start the threads that read units and rows and test them, as `IOThreads.start`."""
        for threads in (self._threads, self._scattered, self._checks):
            threads.start(self._most)

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
        offset = file.chunks[chunk].offset
        await self._threads.transfer(*self._reads_of(file, offset, memory))
        if self._verifier.wants(file, chunk):
            await self.call(functools.partial(self._verifier.check, file, chunk, memory))

    async def read_unit(self, unit: Unit, memory: memoryview, buffers: ChunkBuffers) -> None:
        """Read the chunks of `unit` side by side to its `memory`, as `read_chunk` does. Those of a unit with compressed
        tensors are read into `buffers` and decoded from there, in the pool.

        All reads have ended when this returns or raises: only then may the memory be lent to another unit.
        """
        file = unit.file
        if not unit.compressed:
            chunks = [(number, _chunk_of(unit, number, memory)) for number in unit.chunks]
            if any(self._verifier.wants(file, number) for number in unit.chunks):
                await all_of(self.read_chunk(file, number, chunk) for number, chunk in chunks)
            else:
                reads = (self._reads_of(file, file.chunks[number].offset, chunk) for number, chunk in chunks)
                await self._threads.transfer(*itertools.chain.from_iterable(reads))
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

    def begin_unit(self, unit: Unit, memory: memoryview, check: Check, done: OnEnd) -> None:
        """Begin to read `unit`, which holds nothing compressed, to the start of `memory`; for any thread.

        Reads of `read_unit` and `read_chunk` give way between two system calls. `check` is called between two of this
        unit's and may raise. `done` is called in a thread of the reader when no thread touches the memory any more,
        with what reading raised.
        """
        chunks = [unit.file.chunks[number] for number in unit.chunks]
        extents = [part for chunk in chunks for part in _parts(chunk.offset, chunk.nbytes, _URGENT_PART_NBYTES)]
        reading = _UnitRead(len(extents))

        def read(start: int, nbytes: int) -> None:
            try:
                if reading.error is None:
                    self._read(unit.file, start, memory[start - unit.offset :][:nbytes], check)
            except Exception as error:
                reading.error = error
            if reading.is_last():
                self._way.end()
                done(reading.error or self._verify(unit, memory))

        self._way.begin()
        for start, nbytes in extents:
            self._urgent.begin(functools.partial(read, start, nbytes))

    def _verify(self, unit: Unit, memory: memoryview) -> Exception | None:
        """Test the checksums of `unit` that the policy wants tested; returns what that raises."""
        try:
            for number in unit.chunks:
                if self._verifier.wants(unit.file, number):
                    self._verifier.check(unit.file, number, _chunk_of(unit, number, memory))
        except Exception as error:
            return error
        return None

    def _reads_of(self, file: FileInfo, offset: int, memory: memoryview) -> Iterator[Callable[[Check], None]]:
        """Reads of the parts of a chunk at `offset`, which give way to what is urgent."""

        def read(start: int, nbytes: int, check: Check) -> None:
            def check_both() -> None:
                check()
                self._way.give(check)

            self._read(file, start, memory[start - offset :][:nbytes], check_both)

        return (functools.partial(read, start, nbytes) for start, nbytes in _parts(offset, memory.nbytes))

    async def read_pages(self, file: FileInfo, offset: int, memory: memoryview) -> None:
        """Read `memory.nbytes` from `offset` (both multiples of 4096) without touching checksums, as `read_parts`."""
        parts = _parts(offset, memory.nbytes)
        await self.read_parts([(file, start, memory[start - offset :][:nbytes]) for start, nbytes in parts])

    async def read_parts(self, parts: Sequence[tuple[FileInfo, int, memoryview]]) -> None:
        """Read triples (file, offset, memory), mostly small ones; each thread takes a share of them. The reads of units
        give way: nothing can be computed before these, and behind what is read ahead they would wait for most of a
        pass."""
        count = min(len(parts), self._count)

        def read(share: Sequence[tuple[FileInfo, int, memoryview]], check: Check) -> None:
            for file, offset, memory in share:
                self._read(file, offset, memory, check)

        self._way.begin()
        try:
            await self._scattered.transfer(*(functools.partial(read, parts[i::count]) for i in range(count)))
        finally:
            self._way.end()

    async def call(self, work: Callable[[], None]) -> None:
        """Run `work` (a checksum, a decompression) in a thread, beside reads that are queued: what has come can be
        used at once, and is still in the processor's cache."""
        await self._checks.call(lambda check: work())

    def close(self) -> None:
        """Drop queued reads, wait for running ones, close the files: nothing touches memory afterwards."""
        self._threads.close()
        self._urgent.close()
        self._scattered.close()
        self._checks.close()
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


class RightOfWay:
    """Lets some transfers go ahead of others, which wait between two system calls while there are any."""

    def __init__(self) -> None:
        self._urgent = 0
        self._changed = threading.Condition()

    def begin(self) -> None:
        """An urgent transfer begins."""
        with self._changed:
            self._urgent += 1

    def end(self) -> None:
        """An urgent transfer has ended."""
        with self._changed:
            self._urgent -= 1
            if not self._urgent:
                self._changed.notify_all()

    def give(self, check: Check) -> None:
        """Wait while there are urgent transfers; `check` may raise."""
        while self._urgent:
            with self._changed:
                if self._urgent:
                    self._changed.wait(_LOOK_SECONDS)
            check()


class _UnitRead:
    """A unit that is read in parts."""

    def __init__(self, parts: int) -> None:
        self._left, self._lock = parts, threading.Lock()
        self.error: Exception | None = None
        """The last error of a part: the others are not begun any more."""

    def is_last(self) -> bool:
        """A part has ended: whether it was the last one."""
        with self._lock:
            self._left -= 1
            return not self._left


def _chunk_of(unit: Unit, number: int, memory: memoryview) -> memoryview:
    """The part of the unit's `memory`, which is as its extent, that chunk `number` of its file is in."""
    chunk = unit.file.chunks[number]
    return memory[chunk.offset - unit.offset : chunk.stop - unit.offset]


def _parts(offset: int, nbytes: int, least: int = _LEAST_PART_NBYTES) -> Iterator[tuple[int, int]]:
    """Offset and size of the parts in which a chunk is read, none but the last smaller than `least`."""
    step = round_up(max(least, -(-nbytes // _PARTS)), PAGE)
    for start in range(0, nbytes, step):
        yield offset + start, min(step, nbytes - start)


def _warn(refused: ReadMode, error: OSError, used: ReadMode) -> None:
    logger.warning("%s refused while reading; using %s", refused.value, used.value)
