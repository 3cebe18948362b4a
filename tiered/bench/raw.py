"""Raw disk bandwidth: the fastest these files can be read here, by code that knows nothing of stores or schedulers.
Also what reads at random places reach, and what writing a file does.

A sweep over sizes of reads and numbers of threads with plain positional reads finds the best combination, which is then
measured once more, for longer: that second figure counts. The best of twelve short looks is the luckiest of them, and
has been seen 10 % above what the same reads sustain for a second (docs/benchmarks/disk.md). Nothing is computed
meanwhile, and the memory is lent by the caller so that measuring stays within a budget.

Reads land all over that memory, as streaming does. Reading into the same few MiB again and again measures the
processor's cache as well as the disk: it has been seen 40 % faster on a virtual disk, for data that nobody can use
before it is overwritten (docs/benchmarks/disk.md).
"""

import contextlib
import itertools
import math
import mmap
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from tiered.errors import ReadError
from tiered.outcome import run_threads
from tiered.units import MIB, PAGE, round_up

BLOCK_SIZES: Final = (MIB // 2, MIB, 4 * MIB, 8 * MIB)
THREADS: Final = (2, 4, 8)
SECONDS_EACH: Final = 0.08
SUSTAINED: Final = 10.0
"""How many times longer the best combination is measured than a short look takes."""
RANDOM_THREADS: Final = 8
"""Reads at random places that are in flight: as many as a layer asks for experts, as a rule."""
_REQUEST_NBYTES: Final = MIB
"""Bytes per system call of a larger read at a random place, as everything that streams does it."""
_RANDOM_PLACES: Final = 4096
_WRITERS: Final = 4
_WRITE_NBYTES: Final = 4 * MIB


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


@dataclass(frozen=True)
class _Look:
    """What is read, or written, to measure once."""

    pieces: Sequence[tuple[_File, int]]
    """File and offset of each, in their order; read again and again, written once."""
    nbytes: int
    """Of a piece."""
    threads: int
    seconds: float
    first: int = 0
    """The piece to begin with."""
    request_nbytes: int | None = None
    """Most bytes of a system call; None: all of a piece."""
    writes: bool = False


def huge_pages(nbytes: int) -> mmap.mmap:
    """`nbytes` of memory that nothing has touched yet, in huge pages, as an arena's, if the kernel has them. A direct
    read into pages of 4 KiB is cut at the disk's limit of segments: a virtual disk gave 1.04 GB/s instead of 2.7."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def measure_raw(files: Sequence[Path], memory: memoryview, direct: bool, seconds: float = SECONDS_EACH) -> RawBandwidth:
    """Sweep over `files`, reading into `memory` (page-aligned), `seconds` per look. `direct` reads with O_DIRECT.

    Raises ReadError where the files cannot be read.
    """
    best = RawBandwidth(0.0, 0.0, 0, 0, 0)
    total = 0
    with _opened(files, direct) as opened:
        largest = max(file.nbytes for file in opened)
        turn = itertools.count()
        for block, threads in itertools.product(BLOCK_SIZES, THREADS):
            piece = min(block, largest)
            if piece * threads > memory.nbytes:
                continue
            pieces = _in_order(opened, piece)
            # Each look starts at another place in the files.
            first = next(turn) * len(pieces) // (len(BLOCK_SIZES) * len(THREADS))
            rate, nbytes = _run(_Look(pieces, piece, threads, seconds, first), memory)
            total += nbytes
            if rate > best.best_look:
                best = RawBandwidth(0.0, rate, piece, threads, 0)
        if not best.threads:
            return best
        pieces = _in_order(opened, best.block_nbytes)
        rate, nbytes = _run(_Look(pieces, best.block_nbytes, best.threads, seconds * SUSTAINED), memory)
    return replace(best, bytes_per_second=rate, bytes_read=total + nbytes)


def measure_random(
    files: Sequence[Path],
    memory: memoryview,
    nbytes: int,
    direct: bool = True,
    threads: int = RANDOM_THREADS,
    seconds: float = 1.0,
) -> float:
    """Bytes per second of reads of `nbytes`, rounded up to 4096, at random places of `files`, `threads` at a time.

    The places are others each time, so that no cache of a virtual disk's host knows them. `memory` (page-aligned) holds
    a read of each thread. Raises ReadError where the files cannot be read, or none of them holds `nbytes`.
    """
    numbers, size = random.Random(), round_up(nbytes, PAGE)
    with _opened(files, direct) as opened:
        large = [file for file in opened if file.nbytes >= size]
        if not large or size * threads > memory.nbytes:
            raise ReadError(f"{files[0]}: no file, or no memory, for reads of {size:,} bytes by {threads} threads")
        drawn = numbers.choices(large, weights=[file.nbytes - size + 1 for file in large], k=_RANDOM_PLACES)
        places = [(file, numbers.randrange((file.nbytes - size) // PAGE + 1) * PAGE) for file in drawn]
        return _run(_Look(places, size, threads, seconds, request_nbytes=_REQUEST_NBYTES), memory)[0]


def measure_write(fd: int, nbytes: int, memory: memoryview, seconds: float) -> tuple[float, int]:
    """Write what is in `memory` (page-aligned), over and over, to the file `fd` until it has `nbytes` or `seconds` are
    over; returns bytes per second, with the disk's own caches flushed, and the bytes written, from 0 on without gaps.

    Raises OSError where the file cannot be written.
    """
    file = _File("", fd, nbytes)
    pieces = _in_order([file], _WRITE_NBYTES)
    began = time.perf_counter()
    _, written = _run(_Look(pieces, _WRITE_NBYTES, _WRITERS, seconds, writes=True), memory)
    os.fdatasync(fd)
    return written / (time.perf_counter() - began), written


@contextmanager
def _opened(files: Sequence[Path], direct: bool) -> Iterator[list[_File]]:
    """`files`, each once, open for reading; raises ReadError for whatever fails meanwhile."""
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    opened: list[_File] = []
    try:
        for path in dict.fromkeys(files):
            fd = os.open(path, flags)
            opened.append(_File(str(path), fd, os.fstat(fd).st_size))
        yield opened
    except OSError as error:
        raise ReadError(f"{error.filename or files[0]}: cannot be read: {error.strerror}") from error
    finally:
        for file in opened:
            os.close(file.fd)


def _in_order(files: Sequence[_File], piece: int) -> list[tuple[_File, int]]:
    """All of `files`, in pieces; what is left over at a file's end is left out."""
    return [(file, start) for file in files for start in range(0, max(file.nbytes - piece, 0) + 1, piece)]


def _run(look: _Look, memory: memoryview) -> tuple[float, int]:
    """Bytes per second, and bytes read or written, of one look."""
    pieces, size, threads = look.pieces, look.nbytes, look.threads
    request = look.request_nbytes or size
    position = itertools.count(look.first)
    last = len(pieces) if look.writes else math.inf
    lap = memory.nbytes // (size * threads)
    counts, errors = [0] * threads, list[OSError]()
    deadline = time.perf_counter() + look.seconds
    stopped = threading.Event()

    def transfer(worker: int) -> None:
        call = os.pwritev if look.writes else os.preadv
        try:
            for number in itertools.count():
                # A thread that others keep from the processor until the time is over still finds out something.
                is_over = number > 0 and time.perf_counter() >= deadline
                if is_over or stopped.is_set() or (at := next(position)) >= last:
                    return
                file, start = pieces[at % len(pieces)]
                place = (number % lap * threads + worker) * size
                for done in range(0, size, request):
                    part = slice(place + done, place + min(done + request, size))
                    counts[worker] += call(file.fd, [memory[part]], start + done)
        except OSError as error:
            error.filename = file.path
            errors.append(error)

    began = time.perf_counter()
    # The caller is about to take back files and memory.
    run_threads([partial(transfer, worker) for worker in range(threads)], stopped)
    if errors:
        raise errors[0]
    return sum(counts) / (time.perf_counter() - began), sum(counts)
