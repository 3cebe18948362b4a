"""A file written in one forward sweep, past the page cache where the file system allows it.

In: bytes in any portions. Out: the same bytes in the file. A thread writes them in pieces while the caller makes the
next ones. Called by `write.py`. Direct writes cost no processor time for a second copy, leave no dirty pages to
pile up for the last fsync, and push nothing else out of memory.
"""

import contextlib
import errno
import fcntl
import io
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from tiered.process import shut_down

PIECE_NBYTES: Final = 4 << 20
"""Bytes written at a time: as fast as any larger piece where this was measured."""
_PIECES: Final = 3
"""One that is being filled, and those that are being written."""
SWEEP_NBYTES: Final = _PIECES * PIECE_NBYTES
"""Memory that a sweep takes."""
_WRITEBACK_NBYTES: Final = 64 << 20
"""Through the page cache, start write-back this often, so that dirty pages never pile up to a limit."""


class Sweep:
    """Appends to `file`, whose position must be 0. An error in the writing thread is raised by the next call."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file, self._fd = file, file.fileno()
        self._direct = bypass_cache(self._fd, True)
        # Direct writes need multiples of 4096: mapped memory starts at one, and so does every piece in the file.
        self._pieces = [mmap.mmap(-1, PIECE_NBYTES) for _ in range(_PIECES)]
        self._filled = 0
        self._written = self._synced = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tiered-write")
        self._writing: deque[Future[None]] = deque()

    def append(self, data: memoryview) -> None:
        """Copy `data`; waits until there is a free piece for it."""
        while data.nbytes:
            count = min(data.nbytes, PIECE_NBYTES - self._filled)
            self._pieces[0][self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == PIECE_NBYTES:
                self._send()

    def finish(self) -> None:
        """Write the rest, a multiple of 4096 bytes, wait for all writes, and end direct access to the file."""
        self._send()
        self._wait(0)
        bypass_cache(self._fd, False)

    def close(self) -> None:
        """Wait for the thread and free the pieces, finished or not; the file must still be open."""
        shut_down(self._thread)
        for piece in self._pieces:
            with contextlib.suppress(BufferError):  # an error's traceback may still refer to the piece
                piece.close()

    def _send(self) -> None:
        self._writing.append(self._thread.submit(self._write, memoryview(self._pieces[0])[: self._filled]))
        self._pieces.append(self._pieces.pop(0))
        self._filled = 0
        self._wait(_PIECES - 1)

    def _wait(self, most: int) -> None:
        """Wait until at most `most` pieces are being written."""
        while len(self._writing) > most:
            self._writing.popleft().result()

    def _write(self, data: memoryview) -> None:
        while data.nbytes:
            try:
                count = self._file.write(data)
            except OSError as error:
                # Some file systems refuse direct writes only now, or only of this length.
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = bypass_cache(self._fd, False)
                continue
            assert count is not None, "the file is one that waits"
            self._written += count
            data = data[count:]
        if not self._direct and self._written - self._synced >= _WRITEBACK_NBYTES:
            self._write_back()

    def _write_back(self) -> None:
        os.fdatasync(self._fd)
        os.posix_fadvise(self._fd, self._synced, self._written - self._synced, os.POSIX_FADV_DONTNEED)
        self._synced = self._written


def bypass_cache(fd: int, bypass: bool) -> bool:
    """Turn direct access to an open file on or off; returns whether it is on, which not every file system allows."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    wanted = flags | os.O_DIRECT if bypass else flags & ~os.O_DIRECT
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETFL, wanted)
        return bypass
    return False
