"""The disk reader: positional reads of whole pieces, in a pool of its own threads, into memory it is given.

In: a file of the store and page-aligned memory. Out: the memory filled and, where the policy says so, verified.
The event loop only waits; the reads run in the pool.
"""

import errno
import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from tiered.errors import ReadError, StoreError
from tiered.io.modes import ReadMode, is_refusal, probe_mode
from tiered.io.threads import Check, IdleClock, IOThreads, all_of
from tiered.io.verify import ChunkVerifier
from tiered.store import CHUNK_NBYTES, PAGE, FileInfo
from tiered.trace import Tracer

PIECE_NBYTES: Final = 1 << 20
"""Bytes per system call. With 16 threads 16 MiB are in flight, enough for any SSD; on a virtual disk, where the host
copies, pieces of 8 MiB were 15 % slower, because what is being copied no longer fits a cache (docs/benchmarks/disk.md).
"""

logger = logging.getLogger(__name__)


class Faults(Protocol):
    """The system call, replaceable so that tests can make it fail."""

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int: ...


@dataclass
class _OpenFile:
    fd: int
    mode: ReadMode


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
        self._files: dict[str, _OpenFile] = {}
        self._retired: list[int] = []
        self._lock = threading.Lock()
        self._bytes_read = 0
        self.mode = mode
        self.refused: tuple[str, ...] = ()
        self._count = threads
        self._threads = IOThreads(threads, "tiered-read", clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def bytes_read(self) -> int:
        """Bytes the system calls have delivered so far."""
        return self._bytes_read

    @property
    def idle_seconds(self) -> float:
        """Seconds so far in which no read was queued or running."""
        return self._threads.idle_seconds

    async def read_chunk(self, file: FileInfo, chunk: int, memory: memoryview) -> None:
        """Read chunk number `chunk` of `file` into its place in `memory` (the whole file's), piece by piece.

        Pieces of different chunks run side by side; those of one chunk follow each other in one thread, which then
        tests the checksum while the data is still warm. Raises ReadError or StoreError.
        """
        start = chunk * CHUNK_NBYTES
        stop = min(start + CHUNK_NBYTES, file.nbytes)
        part = memory[start:stop]
        await self._threads.transfer(lambda check: self._read_chunk(file, chunk, start, part, check))

    async def read_pages(self, file: FileInfo, offset: int, memory: memoryview) -> None:
        """Read `memory.nbytes` from `offset` (both multiples of 4096) without touching checksums."""
        await self._threads.transfer(lambda check: self._read(file, offset, memory, check))

    async def read_parts(self, file: FileInfo, parts: Sequence[tuple[int, memoryview]]) -> None:
        """`read_pages` for several (offset, memory), small ones above all: each thread takes a share of them."""
        count = min(len(parts), self._count)

        def read(share: Sequence[tuple[int, memoryview]], check: Check) -> None:
            for offset, memory in share:
                self._read(file, offset, memory, check)

        await all_of(self._threads.transfer(functools.partial(read, parts[i::count])) for i in range(count))

    async def call(self, work: Callable[[], None]) -> None:
        """Run `work` (a decompression) in the pool."""
        await self._threads.call(lambda check: work())

    def close(self) -> None:
        """Drop queued reads, wait for running ones, close the files: nothing touches memory afterwards."""
        self._threads.close()
        with self._lock:
            for fd in (*self._retired, *(file.fd for file in self._files.values())):
                os.close(fd)
            self._files.clear()
            self._retired.clear()

    def _read_chunk(self, file: FileInfo, chunk: int, start: int, memory: memoryview, check: Check) -> None:
        self._read(file, start, memory, check)
        if self._verifier.wants(file, chunk):
            self._verifier.check(file, chunk, memory)

    def _read(self, file: FileInfo, offset: int, memory: memoryview, check: Check) -> None:
        """Fill `memory`, piece by piece, however many system calls that takes.

        Whatever Python does between two of them waits for the interpreter that the computation also wants, while the
        disk has one read less to do: everything that can be is done once.
        """
        done, opened = 0, self._open(file)
        with self._trace.span("disk", file.path, memory.nbytes):
            while done < memory.nbytes:
                check()
                piece = memory[done : done + PIECE_NBYTES]
                try:
                    count = self._preadv(opened.fd, [piece], offset + done, opened.mode.read_flags)
                except InterruptedError:
                    continue
                except OSError as error:
                    opened = self._after(error, file, opened, offset + done, piece.nbytes)
                    continue
                if opened.mode is ReadMode.BUFFERED:
                    os.posix_fadvise(opened.fd, offset + done, count, os.POSIX_FADV_DONTNEED)
                if count == 0:
                    raise StoreError(
                        f"{self._root / file.path}: ends at byte {offset + done:,}, expected {file.nbytes:,}; "
                        "it was truncated while in use, convert the model again"
                    )
                # An O_DIRECT read may come back short; it can only go on from a page boundary.
                step = count if offset + done + count >= file.nbytes else count // PAGE * PAGE or count
                done += step
                with self._lock:
                    self._bytes_read += step

    def _after(self, error: OSError, file: FileInfo, opened: _OpenFile, offset: int, nbytes: int) -> _OpenFile:
        """How to go on after `error`: by the next rung of the ladder, if it was a refusal. Raises ReadError."""
        if is_refusal(error) and opened.mode is not ReadMode.BUFFERED:
            self._step_down(file, opened, error)
            return self._open(file)
        name = errno.errorcode.get(error.errno or 0, "?")
        raise ReadError(
            f"{self._root / file.path}: read of {nbytes:,} bytes at {offset:,} failed: {error.strerror} ({name}); "
            "check the disk and the kernel log"
        ) from error

    def _open(self, file: FileInfo) -> _OpenFile:
        with self._lock:
            opened = self._files.get(file.path)
            if opened is not None:
                return opened
            path = self._root / file.path
            try:
                if self.mode is None:
                    probe = probe_mode(path)
                    self.mode, self.refused = probe.mode, probe.refused
                    if probe.refused:
                        logger.warning("reading with %s (%s)", probe.mode.value, "; ".join(probe.refused))
                opened = _OpenFile(os.open(path, self.mode.open_flags), self.mode)
            except FileNotFoundError:
                raise StoreError(f"{path}: missing; it was removed while in use, convert the model again") from None
            except OSError as error:
                raise ReadError(f"{path}: cannot be opened: {error.strerror}") from error
            self._files[file.path] = opened
            return opened

    def _step_down(self, file: FileInfo, opened: _OpenFile, error: OSError) -> None:
        """A refusal at read time: use the next rung of the ladder for this file and all that are opened later."""
        with self._lock:
            current = self._files.get(file.path)
            if current is not opened or self.mode is None:
                return
            # Other threads may be reading from the old descriptor: it is closed with the reader.
            self._retired.append(opened.fd)
            del self._files[file.path]
            if self.mode is opened.mode:
                self.mode = opened.mode.next
                self.refused = (*self.refused, f"{opened.mode.value}: {error.strerror}")
                logger.warning("%s refused while reading; using %s", opened.mode.value, self.mode.value)
