"""Raw disk bandwidth: the fastest these files can be read here, by code that knows nothing of stores or schedulers.

A sweep over sizes of reads and numbers of threads with plain positional reads finds the best combination, which is then
measured once more, for longer: that second figure counts. The best of twelve short looks is the luckiest of them, and
has been seen 10 % above what the same reads sustain for a second (docs/benchmarks/disk.md). Nothing is computed
meanwhile, and the memory is lent by the caller so that measuring stays within a budget.

Reads land all over that memory, as streaming does. Reading into the same few MiB again and again measures the
processor's cache as well as the disk: it has been seen 40 % faster on a virtual disk, for data that nobody can use
before it is overwritten (docs/benchmarks/disk.md).
"""

import itertools
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tiered.errors import ReadError
from tiered.units import MIB

BLOCK_SIZES: Final = (MIB // 2, MIB, 4 * MIB, 8 * MIB)
THREADS: Final = (2, 4, 8)
SECONDS_EACH: Final = 0.08
SUSTAINED: Final = 10.0
"""How many times longer the best combination is measured than a short look takes."""


@dataclass(frozen=True)
class RawBandwidth:
    """The best combination of a sweep, and what it sustains."""

    bytes_per_second: float
    """What the best combination sustains."""
    best_look: float
    """Bytes per second of the fastest short look, which chose the combination."""
    block_nbytes: int
    """Bytes per read."""
    threads: int
    bytes_read: int
    """Bytes that the whole measurement has read."""


@dataclass(frozen=True)
class _File:
    path: str
    fd: int
    nbytes: int


def measure_raw(files: Sequence[Path], memory: memoryview, direct: bool, seconds: float = SECONDS_EACH) -> RawBandwidth:
    """Sweep over `files`, reading into `memory` (page-aligned), `seconds` per look. `direct` reads with O_DIRECT.

    Raises ReadError where the files cannot be read.
    """
    best = RawBandwidth(0.0, 0.0, 0, 0, 0)
    total = 0
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    opened: list[_File] = []
    try:
        for path in dict.fromkeys(files):
            fd = os.open(path, flags)
            opened.append(_File(str(path), fd, os.fstat(fd).st_size))
        largest = max(file.nbytes for file in opened)
        turn = itertools.count()
        for block, threads in itertools.product(BLOCK_SIZES, THREADS):
            piece = min(block, largest)
            if piece * threads > memory.nbytes:
                continue
            rate, nbytes = _run(opened, memory, piece, threads, seconds, next(turn))
            total += nbytes
            if rate > best.best_look:
                best = RawBandwidth(0.0, rate, piece, threads, 0)
        if not best.threads:
            return best
        rate, nbytes = _run(opened, memory, best.block_nbytes, best.threads, seconds * SUSTAINED, 0)
    except OSError as error:
        raise ReadError(f"{error.filename or files[0]}: cannot be read: {error.strerror}") from error
    finally:
        for file in opened:
            os.close(file.fd)
    return replace(best, bytes_per_second=rate, bytes_read=total + nbytes)


def _run(
    files: Sequence[_File], memory: memoryview, piece: int, threads: int, seconds: float, turn: int
) -> tuple[float, int]:
    """Bytes per second, and bytes read, of one combination; each `turn` starts at another place in the files."""
    pieces = [(file, start) for file in files for start in range(0, max(file.nbytes - piece, 0) + 1, piece)]
    position = itertools.count(turn * len(pieces) // (len(BLOCK_SIZES) * len(THREADS)))
    lap = memory.nbytes // (piece * threads)
    counts, errors = [0] * threads, list[OSError]()
    deadline = time.perf_counter() + seconds
    stopped = threading.Event()

    def read(worker: int) -> None:
        try:
            for number in itertools.count():
                if stopped.is_set() or time.perf_counter() >= deadline:
                    return
                file, start = pieces[next(position) % len(pieces)]
                place = (number % lap * threads + worker) * piece
                counts[worker] += os.preadv(file.fd, [memory[place : place + piece]], start)
        except OSError as error:
            error.filename = file.path
            errors.append(error)

    workers = [threading.Thread(target=read, args=(worker,)) for worker in range(threads)]
    began = time.perf_counter()
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        # An interruption ends the wait, not the reads: the caller is about to take back files and memory.
        stopped.set()
        for worker in workers:
            if worker.ident is not None:
                worker.join()
    if errors:
        raise errors[0]
    return sum(counts) / (time.perf_counter() - began), sum(counts)
