"""How fast memory is read, and touched for the first time: numpy's sums of more of it than any cache holds, by several
threads, and a write to each page of a mapping that nothing has touched.

No compiler is needed: on the one machine where both were measured, beside other programs, these sums read 6 to 11 %
more per second than hand-written loops (`tools/machine_limits.cpp`). Linear layers with few rows cannot be faster, as
each weight is read once.
"""

import mmap
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from tiered.bench.raw import huge_pages
from tiered.units import MIB

_PART_NBYTES: Final = 8 * MIB
_REPEATS: Final = 5


def measure_touch(nbytes: int = 256 * MIB) -> float:
    """Bytes per second in which one thread touches `nbytes` of new memory, in huge pages if the kernel has them. Where
    the host of a virtual machine has to find it that is slower than many disks, and differs from look to look."""
    with huge_pages(nbytes) as memory:
        pages = np.frombuffer(memory, dtype=np.uint8)[:: mmap.PAGESIZE]
        began = time.perf_counter()
        pages[:] = 1
        seconds = time.perf_counter() - began
        del pages  # the mapping cannot be closed while there is a view
    return nbytes / seconds


def measure_memory(threads: int, nbytes: int = 512 * MIB) -> float:
    """Bytes per second that `threads` threads read of `nbytes`, the best of some repeats."""
    with huge_pages(nbytes) as memory:
        return _read(memory, threads)


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
