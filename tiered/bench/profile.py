"""A profile: this machine in numbers, and the disk of one folder, measured in some two minutes.

In: a folder, the files of a store that are to be read (or none), a number of threads. Out: a `Hardware`. Called by
`tiered profile`, which keeps it where `plan/machines.py` finds it.

What is written goes to a temporary file without a name, so nothing is left however the process ends. The same file is
read where there is no store: all over it, because the host of a virtual disk may keep a part of it in memory.
"""

import datetime
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch

from tiered.bench.gpu import measure_gpu
from tiered.bench.memory import measure_memory, measure_touch
from tiered.bench.passes import measure_passes
from tiered.bench.rates import measure_attention, measure_compute, measure_prefill_attention, measure_quantizing
from tiered.bench.raw import RANDOM_THREADS, huge_pages, measure_random, measure_raw, measure_write
from tiered.errors import ConfigError, DiskFullError
from tiered.io import ReadMode, probe_mode
from tiered.io.filesystem import free_nbytes, kind_of
from tiered.kernels import Kernels
from tiered.kernels import Mode as KernelMode
from tiered.plan import ComputeRate, system
from tiered.plan.hardware import ROWS, AttendedRate, CpuRates, DiskRates, Hardware, LinearRate, Mode
from tiered.plan.kv import BITS_BY_NAME, KVShape
from tiered.quant import GroupScheme
from tiered.store.sweep import bypass_cache
from tiered.units import GIB, MIB, PAGE, format_size, round_down, round_up

RANDOM_NBYTES: Final = (1_000_000, 2_500_000, 5_000_000, 10_000_000, 20_000_000)
"""Reads at random places: from a small expert to a large one."""
_READ_NBYTES: Final = 2 * GIB
"""Of the temporary file, where it is read too."""
_WRITE_NBYTES: Final = 512 * MIB
_LEAST_NBYTES: Final = 256 * MIB
_WRITE_SECONDS: Final = 10.0
_SWEEP_SECONDS: Final = 0.15
_MEMORY_NBYTES: Final = 2 * RANDOM_THREADS * round_up(RANDOM_NBYTES[-1], PAGE)

_FEATURES: Final = 8192
_FEW_ROWS: Final = tuple(rows for rows in ROWS if rows <= 16)
_LARGE_NBYTES: Final = 128 * MIB
"""Codes of the weight that few rows pass through, and pages that few queries attend over: more than most caches hold,
as memory is what bounds them."""
_HEADS: Final = 32
_HEAD_DIM: Final = 128
_QUERIES: Final = (1, 4, 16)
"""That share a key."""
_SEQUENCES: Final = 16
"""That attend at once, so that there is work for many threads where few heads have keys."""
_SCHEMES: Final = {"int4-g64": GroupScheme(4), "int8-g64": GroupScheme(8), "none": None}
_MODES: Final[tuple[Mode, ...]] = ("invariant", "fast")

_MOST_OTHERS: Final = 0.1
"""The share of the processors that others may take before somebody is told."""
_DISTURBED: Final = "other programs took"
"""In the source of a profile, where they took more than that."""
_LOG: Final = logging.getLogger(__name__)

Say = Callable[[str], None]


def measure_hardware(folder: Path, files: Sequence[Path], threads: int, say: Say = lambda text: None) -> Hardware:
    """This machine by `threads` threads, and the disk of `folder`, of which `files` are read; `say` is told what is
    being measured. Where `files` are none, or too small to say much, the temporary file is read.

    Raises ConfigError where the folder is none, or no place for a temporary file; ReadError where files cannot be read.
    """
    cpu, others = system.cpu(), _Others()
    # At several moments, of which the slowest counts: memory that has just been given back is touched twenty times as
    # fast as memory that the host of a virtual machine has to find, with which a run begins.
    touches = [measure_touch()]
    disk, how = _measure_disk(folder, files, say)
    say("measuring memory")
    ram = system.meminfo("MemTotal")
    memory = measure_memory(threads, min(512 * MIB, round_down(ram // 8, MIB)))
    rates, kernels = _measure_cpu(threads, memory, say)
    touches.append(measure_touch())
    say("measuring passes over a small model")
    passes = measure_passes(folder, threads)
    touches.append(measure_touch())
    rates = replace(rates, touch=min(touches))
    if passes is None:
        how += "; no memory for passes over a small model"
    else:
        disk = replace(disk, streamed=passes.streamed, kept=passes.kept)
        beside = {name: getattr(passes, name) for name in ("operation_seconds", "element_seconds", "reading_seconds")}
        rates = replace(rates, **beside)
    say("measuring the GPU")
    gpu = measure_gpu()
    if (share := others.share()) > _MOST_OTHERS:
        how += f"; {_DISTURBED} {share:.0%} of the processors meanwhile"
        _LOG.warning(
            "other programs took %.0f%% of the processors meanwhile: measure again when nothing else runs", 100 * share
        )
    return Hardware(
        name=f"{platform.node() or 'this machine'}: {cpu.model}, {cpu.allowed} processors",
        source=f"measured {datetime.date.today().isoformat()}; kernels {kernels}; disk of {folder.resolve()}: {how}",
        is_measured=True,
        ram=ram,
        disk=disk,
        cpu=rates,
        gpu=gpu,
    )


def is_disturbed(hardware: Hardware) -> bool:
    """Whether other programs took much of the processors while `hardware` was measured."""
    return _DISTURBED in hardware.source


def _measure_disk(folder: Path, files: Sequence[Path], say: Say) -> tuple[DiskRates, str]:
    """The disk, and how it was measured."""
    nbytes = sum(file.stat().st_size for file in files)
    is_store = nbytes >= _LEAST_NBYTES
    wanted = _WRITE_NBYTES if is_store else _READ_NBYTES
    with _temporary(folder, wanted) as (fd, size), _memory() as memory:
        say(f"writing up to {format_size(size)} to a temporary file in {folder}")
        try:
            write, written = measure_write(fd, size, memory, _WRITE_SECONDS)
        except OSError as error:
            raise DiskFullError(f"{folder}: a temporary file cannot be written: {error.strerror}") from error
        os.ftruncate(fd, written)
        bypass_cache(fd, False)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        # A file without a name can be opened once more by its descriptor.
        read = list(files) if is_store else [Path(f"/proc/self/fd/{fd}")]
        what = f"{format_size(nbytes)} of a store" if is_store else f"a temporary file of {format_size(written)}"
        mode = probe_mode(read[0]).mode
        direct = mode is ReadMode.DIRECT
        say(f"reading {what}")
        raw = measure_raw(read, memory, direct, _SWEEP_SECONDS)
        largest = max(file.stat().st_size for file in read)
        random = []
        for size in RANDOM_NBYTES:
            if round_up(size, PAGE) <= largest:
                say(f"reading {size / 1e6:g} MB at random places")
                random.append((size, measure_random(read, memory, size, direct)))
    how = f"{what}, {mode.value if direct else 'through the page cache'}, {raw.threads} threads, "
    how += f"{format_size(raw.block_nbytes)} each"
    return DiskRates(raw.bytes_per_second, write, tuple(random)), how


class _Others:
    """What other programs take of the processors, from now on."""

    def __init__(self) -> None:
        self._began = self._now()

    def share(self) -> float:
        """0 to 1; 0 where the kernel does not tell."""
        wall, own, busy = (now - then for now, then in zip(self._now(), self._began, strict=True))
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        try:
            return time.monotonic(), time.process_time(), system.busy_seconds()
        except (OSError, ValueError):
            return time.monotonic(), time.process_time(), 0.0


@contextmanager
def _temporary(folder: Path, wanted: int) -> Iterator[tuple[int, int]]:
    """A file without a name in `folder`, open for direct writing, and how large it may become: `wanted` bytes, or half
    of what is free."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a store or a folder, found none; name one with --dir")
    check_on_disk(folder, "name a folder on one with --dir")
    free = free_nbytes(folder)
    size = min(wanted, round_down(free // 2, 4 * MIB))
    if size < _LEAST_NBYTES:
        raise ConfigError(
            f"{folder}: {format_size(free)} are free, expected at least {format_size(2 * _LEAST_NBYTES)} for a "
            "temporary file that is written and read; free some, or name another folder with --dir"
        )
    try:
        file = tempfile.TemporaryFile(dir=folder, prefix=".tiered-profile-", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise ConfigError(
            f"{folder}: no temporary file can be made here: {error.strerror}; name another folder with --dir"
        ) from error
    with file:
        bypass_cache(file.fileno(), True)
        yield file.fileno(), size


def check_on_disk(folder: Path, remedy: str) -> None:
    """Raise ConfigError, with what to do, where `folder` lies in memory."""
    kind = kind_of(folder)
    if kind in system.MEMORY_FILE_SYSTEMS:
        raise ConfigError(f"{folder}: lies in memory ({kind}), expected a disk; {remedy}")


@contextmanager
def _memory() -> Iterator[memoryview]:
    """Memory full of random bytes: some disks compress, and do not store zeros at all."""
    with huge_pages(_MEMORY_NBYTES) as memory:
        view = memoryview(memory)
        numbers = np.random.default_rng()
        for start in range(0, _MEMORY_NBYTES, MIB):
            view[start : start + MIB] = numbers.bytes(min(MIB, _MEMORY_NBYTES - start))
        try:
            yield view
        finally:
            view.release()


def _measure_cpu(threads: int, memory: float, say: Say) -> tuple[CpuRates, str]:
    """The processor, and which kernels computed."""
    linear = []
    for mode in _MODES:
        with Kernels(threads, mode=KernelMode(mode)) as kernels:
            for name, scheme in _SCHEMES.items():
                say(f"measuring linear layers in {name}, {mode} mode")
                linear.append(LinearRate(name, mode, _measure_linear(kernels, scheme)))
    with Kernels(threads) as kernels:
        say("measuring attention")
        attended = tuple(_measure_attention(kernels, bits) for bits in BITS_BY_NAME.values())
        prefill = measure_prefill_attention(kernels, _HEADS, _HEADS, _HEAD_DIM, torch.bfloat16)
        whole = KVShape(_HEADS, _HEAD_DIM, _HEAD_DIM, "bfloat16")
        quantize = whole.token_nbytes / measure_quantizing(whole)
        level = "torch reference" if kernels.level is None else kernels.level.name.lower()
    attention = next(1 / one.rate.seconds(1, 1) for one in attended if one.bits == 16)
    rates = CpuRates(threads, memory, attention, prefill, tuple(linear), quantize=quantize, attended=attended)
    return rates, f"{level}, {threads} threads"


def _measure_attention(kernels: Kernels, bits: int) -> AttendedRate:
    """By `bits` of the cache, over memory that caches do not hold: between two tokens of a sequence lie all layers."""
    seconds = []
    for queries in _QUERIES:
        shape = KVShape(_HEADS // queries, _HEAD_DIM, _HEAD_DIM, "bfloat16")
        each = measure_attention(kernels, _HEADS, shape, bits, _SEQUENCES, _LARGE_NBYTES)
        seconds.append(each / shape.token_nbytes)
    return AttendedRate(bits, ComputeRate(_QUERIES, tuple(seconds)))


def _measure_linear(kernels: Kernels, scheme: GroupScheme | None) -> ComputeRate:
    """Few rows with a weight that no cache holds; many, which are bound by arithmetic, with a smaller one."""
    many = ROWS[len(_FEW_ROWS) :]
    first = measure_compute(kernels, scheme, _FEATURES, torch.bfloat16, _FEW_ROWS, _LARGE_NBYTES)
    second = measure_compute(kernels, scheme, _FEATURES, torch.bfloat16, many)
    return ComputeRate(ROWS, first.seconds_per_weight + second.seconds_per_weight)
