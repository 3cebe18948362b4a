"""The spill file: scratch space on a disk for the KV cache, read and written past the page cache.

In: offsets and page-aligned memory. Out: the bytes in the file, or back in memory. The file has no name, so nothing is
left behind however the process ends; its space is taken when it is made, not in the middle of a run. Called by
`stream/kv.py`.
"""

import ctypes
import errno
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tiered.errors import ConfigError, DiskFullError, ReadError, TieredError
from tiered.io.filesystem import free_nbytes, kind_of
from tiered.io.modes import ReadMode
from tiered.io.threads import Check, IdleClock, IOThreads
from tiered.io.transfer import PIECE_NBYTES, ByteCounter, Faults, Ladder, TransferError, TransferFile, describe
from tiered.plan.system import MEMORY_FILE_SYSTEMS
from tiered.store import PAGE
from tiered.store.sweep import bypass_cache
from tiered.trace import Tracer
from tiered.units import format_size, round_up

_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_PART_NBYTES: Final = 2 * PIECE_NBYTES
"""Fewest bytes that are given to one thread: a hand-over takes as long as a tenth of a piece."""

logger = logging.getLogger(__name__)


class SpillFile:
    """A file of `nbytes` in `folder`, with `threads` reads and writes in flight. Leaving the context waits for them.

    Raises ConfigError where the folder cannot hold it: no folder, in memory, read-only, not enough space.
    """

    def __init__(
        self,
        folder: Path,
        nbytes: int,
        threads: int,
        trace: Tracer,
        preadv: Faults = os.preadv,
        pwritev: Faults = os.pwritev,
        allocate: Callable[[int, int], None] | None = None,
        clock: IdleClock | None = None,
    ) -> None:
        self._folder, self._count, self._trace = folder, threads, trace
        self.nbytes = round_up(max(nbytes, PAGE), PAGE)
        self._preadv, self._pwritev = preadv, pwritev
        self._read_so_far, self._written_so_far = ByteCounter(), ByteCounter()
        _check_folder(folder, self.nbytes)
        fd = _open_nameless(folder)
        try:
            _take_space(folder, fd, self.nbytes, allocate or _fallocate)
        except BaseException:
            os.close(fd)
            raise
        mode = ReadMode.DIRECT if bypass_cache(fd, True) else ReadMode.DONTCACHE
        self._file = TransferFile(fd, mode, Ladder(mode, self._warn))
        self._threads = IOThreads(threads, "tiered-spill", clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def mode(self) -> ReadMode:
        """How the file is read and written."""
        return self._file.mode

    @property
    def bytes_read(self) -> int:
        """Bytes that have come back into memory so far."""
        return self._read_so_far.nbytes

    @property
    def bytes_written(self) -> int:
        """Bytes that have gone to the file so far."""
        return self._written_so_far.nbytes

    @property
    def idle_seconds(self) -> float:
        """Seconds so far in which nothing was to be read or written."""
        return self._threads.idle_seconds

    async def read(self, offset: int, memory: memoryview) -> None:
        """Fill `memory` from `offset`. Both, and its size, are multiples of 4096.

        Large memory is filled by several threads. Raises ReadError; when it returns or raises, no thread writes into
        `memory` any more.
        """
        await self._transfer(self._read, offset, memory)

    async def write(self, offset: int, memory: memoryview) -> None:
        """Write `memory` at `offset`, aligned as for `read`; `memory` must not change meanwhile.

        Raises DiskFullError where space is lacking that could not be taken beforehand, TieredError for other failures.
        """
        await self._transfer(self._write, offset, memory)

    def close(self) -> None:
        """Drop what is queued, wait for what runs, and give the space back."""
        self._threads.close()
        self._file.close()

    async def _transfer(self, work: Callable[[int, memoryview, Check], None], offset: int, memory: memoryview) -> None:
        assert offset % PAGE == 0 and memory.nbytes % PAGE == 0, "direct access needs whole pages"
        assert 0 <= offset <= self.nbytes - memory.nbytes, f"{offset:,} + {memory.nbytes:,} of {self.nbytes:,} bytes"
        part = max(_PART_NBYTES, round_up(-(-memory.nbytes // self._count), PAGE))

        def start(begin: int) -> Callable[[Check], None]:
            return lambda check: work(offset + begin, memory[begin : begin + part], check)

        await self._threads.transfer(*map(start, range(0, memory.nbytes, part)))

    def _read(self, offset: int, memory: memoryview, check: Check) -> None:
        self._whole(self._preadv, "read", offset, memory, check, self._read_so_far)

    def _write(self, offset: int, memory: memoryview, check: Check) -> None:
        self._whole(self._pwritev, "write", offset, memory, check, self._written_so_far)

    def _whole(
        self, call: Faults, verb: str, offset: int, memory: memoryview, check: Check, moved: ByteCounter
    ) -> None:
        with self._trace.span("disk", f"KV {verb}", memory.nbytes):
            try:
                count = self._file.transfer(call, offset, memory, check, moved)
            except TransferError as error:
                raise self._failed(verb, error) from error
            if count < memory.nbytes:
                raise ReadError(
                    f"{self._folder}: the KV cache's file ends at byte {offset + count:,}, expected {self.nbytes:,}; "
                    "something has truncated it, run again"
                )

    def _warn(self, refused: ReadMode, error: OSError, used: ReadMode) -> None:
        logger.warning("%s: %s refused (%s); using %s", self._folder, refused.value, error.strerror, used.value)

    def _failed(self, verb: str, error: TransferError) -> TieredError:
        if error.errno in _NO_SPACE:
            return _full(self._folder, self.nbytes, error)
        kind = ReadError if verb == "read" else TieredError
        return kind(
            f"{self._folder}: {verb} of {error.nbytes:,} bytes at {error.offset:,} of the KV cache's file failed: "
            f"{describe(error)}; check the disk and the kernel log"
        )


def _check_folder(folder: Path, nbytes: int) -> None:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder for the KV cache, found none; name one with --kv-dir")
    kind = kind_of(folder)  # where it is not told, the folder is assumed to be on a disk
    if kind in MEMORY_FILE_SYSTEMS:
        raise ConfigError(
            f"{folder}: expected a disk for the KV cache, found {kind}, which is memory itself; "
            "name a folder on a disk with --kv-dir"
        )
    free = free_nbytes(folder)
    if free < nbytes:
        raise ConfigError(
            f"{folder}: the KV cache needs {format_size(nbytes)} there, {format_size(free)} are free; "
            "name a folder on another disk with --kv-dir, or use fewer or shorter sequences"
        )


def _open_nameless(folder: Path) -> int:
    """A descriptor of a new file in `folder` that no name leads to."""
    try:
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            # Not every file system makes files without a name; old kernels try to open the folder itself.
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                raise
        fd, path = tempfile.mkstemp(prefix=".tiered-kv-", dir=folder)
        Path(path).unlink()
    except OSError as error:
        raise ConfigError(
            f"{folder}: no file for the KV cache can be made here: {error.strerror}; name another folder with --kv-dir"
        ) from error
    return fd


def _take_space(folder: Path, fd: int, nbytes: int, allocate: Callable[[int, int], None]) -> None:
    """Make the file `nbytes` long, and take its space on the disk where the file system can do that."""
    try:
        try:
            allocate(fd, nbytes)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            os.ftruncate(fd, nbytes)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _full(folder, nbytes, error) from error
        raise ConfigError(
            f"{folder}: no file of {format_size(nbytes)} for the KV cache can be made here: {error.strerror}; "
            "name another folder with --kv-dir"
        ) from error


def _fallocate(fd: int, nbytes: int) -> None:
    """fallocate(2). `os.posix_fallocate` would write all of the file where the file system cannot do it."""
    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, "fallocate64", None) or libc.fallocate
    while function(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _full(folder: Path, nbytes: int, error: OSError) -> DiskFullError:
    return DiskFullError(
        f"{folder}: no space for the {format_size(nbytes)} of the KV cache: {error.strerror}; free some, name a folder "
        "on another disk with --kv-dir, or use fewer or shorter sequences"
    )
