"""The ways to read past the page cache, best first (a ladder), and the real read that finds the best one that works.

    O_DIRECT        no page cache at all: no double copy, no reclaim at the memory limit, honest figures
    RWF_DONTCACHE   page cache whose pages are dropped on completion (Linux 6.14)
    buffered        page cache, dropped behind the reads with posix_fadvise

Opening with O_DIRECT may succeed where reading fails (FUSE, network and overlay file systems), so only a read counts.
"""

import errno
import mmap
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from tiered.store import PAGE

RWF_DONTCACHE: Final = 0x80
_REFUSALS: Final = (errno.EINVAL, errno.EOPNOTSUPP, errno.EFAULT, errno.ENOTSUP, errno.EPERM)


class ReadMode(Enum):
    """A rung of the ladder, best first."""

    DIRECT = "O_DIRECT"
    DONTCACHE = "RWF_DONTCACHE"
    BUFFERED = "buffered + fadvise"

    @property
    def open_flags(self) -> int:
        direct = os.O_DIRECT if self is ReadMode.DIRECT else 0
        return os.O_RDONLY | os.O_CLOEXEC | direct

    @property
    def read_flags(self) -> int:
        return RWF_DONTCACHE if self is ReadMode.DONTCACHE else 0

    @property
    def next(self) -> "ReadMode":
        """The rung below; the last rung returns itself."""
        return ReadMode.DONTCACHE if self is ReadMode.DIRECT else ReadMode.BUFFERED


@dataclass(frozen=True)
class ProbeResult:
    """The best mode that worked, and why the better ones did not."""

    mode: ReadMode
    refused: tuple[str, ...]


def is_refusal(error: OSError) -> bool:
    """Whether `error` means "not this way" rather than "these bytes cannot be read"."""
    return error.errno in _REFUSALS


def probe_mode(path: Path, first: ReadMode = ReadMode.DIRECT) -> ProbeResult:
    """Find the best mode, from `first` downwards, that reads the first 4096 bytes of `path`.

    Raises OSError for a failure that is no refusal.
    """
    refused = []
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        for mode in list(ReadMode)[list(ReadMode).index(first) :]:
            try:
                fd = os.open(path, mode.open_flags)
                try:
                    os.preadv(fd, [page], 0, mode.read_flags)
                finally:
                    os.close(fd)
            except OSError as error:
                if not is_refusal(error) or mode is ReadMode.BUFFERED:
                    raise
                refused.append(f"{mode.value}: {error.strerror}")
                continue
            return ProbeResult(mode, tuple(refused))
    raise AssertionError("the last mode either returns or raises")
