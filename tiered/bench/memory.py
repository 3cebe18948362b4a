"""How fast memory is read: numpy's sums of more of it than any cache holds, by several threads.

No compiler is needed: on the one machine where both were measured, beside other programs, these sums read 6 to 11 %
more per second than hand-written loops (`tools/machine_limits.cpp`). Linear layers with few rows cannot be faster, as
each weight is read once.
"""

import contextlib
import mmap
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from tiered.units import MIB

_PART_NBYTES: Final = 8 * MIB
_REPEATS: Final = 5


def measure_memory(threads: int, nbytes: int = 512 * MIB) -> float:
    """Bytes per second that `threads` threads read of `nbytes`, the best of some repeats."""
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        with contextlib.suppress(OSError):  # kernels without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        rate = _read(memory, threads)
    return rate


def _read(memory: mmap.mmap, threads: int) -> float:
    words = np.frombuffer(memory, dtype=np.int64)
    words[:] = 1  # pages that were never written share one page of zeros
    step = _PART_NBYTES // words.itemsize
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_REPEATS):
            began = time.perf_counter()
            total = sum(pool.map(lambda start: int(words[start : start + step].sum()), range(0, len(words), step)))
            seconds.append(time.perf_counter() - began)
            assert total == len(words)
    return words.nbytes / min(seconds)
