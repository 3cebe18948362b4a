"""Positioned transfers past the page cache: the one loop that reads and writes whole stretches of an open file.

In: an offset, page-aligned memory and the system call. Out: the memory filled, or written, in pieces of 2 MiB, and how
many bytes that were: fewer than asked for only where the file ends. Called by `disk.py` (a store's blocks), `spill.py`
(the KV cache's file) and `scrub.py` (all checksums), in their own threads.

How a file is accessed is a rung of the ladder of `modes.py`. Some file systems refuse a rung only when they read or
write: then the call is repeated on the next one, which also serves whatever is opened later.
"""

import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

from tiered.io.modes import ReadMode, is_refusal, probe_mode
from tiered.io.threads import Check
from tiered.store import PAGE
from tiered.store.sweep import bypass_cache

PIECE_NBYTES: Final = 2 << 20
"""Bytes per system call. With 8 threads 16 MiB are in flight, enough for any SSD; on a virtual disk, where the host
copies, pieces of 8 MiB were 15 % slower, because what is being copied no longer fits a cache (docs/benchmarks/disk.md).
"""

OnStepDown = Callable[[ReadMode, OSError, ReadMode], None]
"""Called with the rung that was refused, the error, and the rung that is used from now on."""


class Faults(Protocol):
    """`os.preadv` or `os.pwritev`, replaceable so that tests can make them fail."""

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int: ...


class TransferError(OSError):
    """A system call that failed for good, and the bytes it was asked for."""

    def __init__(self, error: OSError, offset: int, nbytes: int) -> None:
        super().__init__(error.errno, error.strerror)
        self.offset, self.nbytes = offset, nbytes


class ByteCounter:
    """Bytes moved so far, by any thread."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.nbytes += nbytes


class Ladder:
    """The rung on which a set of files is accessed, shared by all threads. It starts at `mode`; where that is None, a
    probe of the first file that is opened decides. After that it only steps down."""

    def __init__(self, mode: ReadMode | None = None, on_step_down: OnStepDown | None = None) -> None:
        self.mode = mode
        self.refused: tuple[str, ...] = ()
        """The rungs that were refused, and why, best rung first."""
        self._on_step_down = on_step_down
        self._lock = threading.Lock()

    def open(self, path: Path) -> "TransferFile":
        """Open for reading. Raises OSError."""
        with self._lock:
            if self.mode is None:
                probe = probe_mode(path)
                self.mode, self.refused = probe.mode, probe.refused
            mode = self.mode
        return TransferFile(os.open(path, mode.open_flags), mode, self)

    def step_down(self, file: "TransferFile", refused: ReadMode, error: OSError) -> None:
        """`file` has refused to be accessed like this: use the next rung for it and for all that are opened later."""
        with self._lock:
            if file.mode is not refused:
                return  # another thread has done it
            if self.mode is refused:
                self.mode = refused.next
                self.refused = (*self.refused, f"{refused.value}: {error.strerror}")
                if self._on_step_down is not None:
                    self._on_step_down(refused, error, self.mode)
            assert self.mode is not None, "a file is open"
            # First the descriptor: a thread that sees the new mode must find O_DIRECT off.
            bypass_cache(file.fd, False)
            file.mode = self.mode


class TransferFile:
    """An open file, used by any number of threads at once. Close it when none of them uses it any more."""

    def __init__(self, fd: int, mode: ReadMode, ladder: Ladder) -> None:
        self.fd, self.mode = fd, mode
        self._ladder = ladder

    def transfer(self, call: Faults, offset: int, memory: memoryview, check: Check, moved: ByteCounter) -> int:
        """Move all of `memory` from or to `offset`, however many system calls that takes; returns the bytes moved.

        `check` is called before each of them and may raise; `moved` counts what each has moved. Raises
        TransferError. Between two calls there is as little Python as can be: it waits for the interpreter, which the
        computation also wants, and the disk has one transfer less to do meanwhile.
        """
        done = 0
        while done < memory.nbytes:
            check()
            piece, mode = memory[done : done + PIECE_NBYTES], self.mode
            try:
                count = call(self.fd, [piece], offset + done, mode.read_flags)
            except InterruptedError:
                continue
            except OSError as error:
                if not is_refusal(error) or mode is ReadMode.BUFFERED:
                    raise TransferError(error, offset + done, piece.nbytes) from error
                self._ladder.step_down(self, mode, error)
                continue
            if count == 0:
                break
            if mode is ReadMode.BUFFERED:
                # Drops what was read, and starts writing back what was written.
                os.posix_fadvise(self.fd, offset + done, count, os.POSIX_FADV_DONTNEED)
            if count < piece.nbytes:
                # Direct access may move fewer bytes; it can only go on from a multiple of 4096.
                count = count // PAGE * PAGE or count
            done += count
            moved.add(count)
        return done

    def close(self) -> None:
        """Close the descriptor; a second time does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def describe(error: OSError) -> str:
    """What the system says, for messages: "Input/output error (EIO)"."""
    return f"{error.strerror} ({errno.errorcode.get(error.errno or 0, '?')})"
