"""What memory and arithmetic of this machine allow at most: bytes read, and operations in registers, per second.

    python tools/machine_limits.py                  one line of JSON; by as many threads as there are processors

The loops are in machine_limits.cpp, which is compiled with g++ or clang++ (or CXX) whenever this runs. Without a
compiler torch's sum reads memory, several times slower, and the peak is unknown. `bench_kernels.py` compares what
it measures with these figures.
"""

import contextlib
import ctypes
import json
import mmap
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch

from tiered.kernels import Level, load_library
from tiered.units import MIB, round_up

SOURCE: Final = Path(__file__).with_suffix(".cpp")
_PART_NBYTES: Final = 8 * MIB
_PART_ITEMS: Final = 100


class Limits:
    """What `threads` of this machine can do at most. A context manager; the memory that is read is `nbytes`."""

    def __init__(self, threads: int, nbytes: int = 1024 * MIB) -> None:
        self._loops, library = compile_loops(), load_library()
        # The library asks the kernel for AMX tiles, and says what this processor runs.
        self._level = Level.SCALAR if isinstance(library, str) else library.best_level()
        self._pool = ThreadPoolExecutor(threads)
        # Much larger than any cache, and filled: pages that were never written share one page of zeros.
        self._memory = settled(torch.ones(nbytes // 8, dtype=torch.int64))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._pool.shutdown()

    def read_bandwidth(self, repeats: int = 3) -> float:
        """Bytes per second, the best of `repeats`."""
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            total = self._sum()
            seconds.append(time.perf_counter() - began)
            assert total == self._memory.numel()
        return self._memory.nbytes / min(seconds)

    def peak(self, items: int = 4000) -> float | None:
        """Floating-point operations per second in registers, by the best level's instructions: bf16 tiles with AMX,
        else fp32. None without a compiler or such instructions."""
        if self._loops is None:
            return None
        loops, level = self._loops, int(self._level)
        parts = [min(_PART_ITEMS, items - start) for start in range(0, items, _PART_ITEMS)]
        rates = []
        for _ in range(3):
            began = time.perf_counter()
            operations = sum(self._pool.map(lambda count: int(loops.multiply(count, level)), parts))
            rates.append(operations / (time.perf_counter() - began))
        return max(rates) or None

    def _sum(self) -> int:
        if self._loops is None:
            return int(self._memory.sum())
        loops, level = self._loops, int(self._level)
        start, stop = self._memory.data_ptr(), self._memory.data_ptr() + self._memory.nbytes

        def part(at: int) -> int:
            return int(loops.read_words(at, min(_PART_NBYTES, stop - at), level))

        return sum(self._pool.map(part, range(start, stop, _PART_NBYTES)))


def compile_loops() -> ctypes.CDLL | None:
    """machine_limits.cpp, compiled and opened; None where that cannot be."""
    named = shlex.split(os.environ.get("CXX", ""))
    program = named or [name for name in ("g++", "clang++", "c++") if shutil.which(name)][:1]
    if not program or shutil.which(program[0]) is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "machine_limits.so"
        command = [*program, "-std=c++17", "-O3", "-fPIC", "-shared", str(SOURCE), "-o", str(made)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        loops = ctypes.CDLL(str(made))
    loops.read_words.restype, loops.read_words.argtypes = c_uint64, [c_void_p, c_int64, c_int32]
    loops.multiply.restype, loops.multiply.argtypes = c_int64, [c_int64, c_int32]
    return loops


def settled(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in huge pages, where the kernel has them."""
    if not tensor.nbytes:
        return tensor.clone()
    memory = mmap.mmap(-1, round_up(tensor.nbytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
    return copy.copy_(tensor)


def main() -> int:
    """Command line."""
    with Limits(len(os.sched_getaffinity(0))) as limits:
        print(json.dumps({"read_bandwidth": limits.read_bandwidth(), "peak_flops": limits.peak()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
