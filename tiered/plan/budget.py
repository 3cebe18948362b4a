"""How much memory there is: from the process, the machine, and the cgroups above the process.

The default budget is 90 % of the least of MemAvailable + own anonymous memory and, for the cgroup and each of its
ancestors, limit - (usage - file cache without shmem) + own anonymous memory. That is what the limit leaves without
reclaimable cache, plus the process's own anonymous memory, which the budget covers too. The process's pages of program
files are not added: they are part of the cache, which already counts as free.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tiered.proc import keyed_kib
from tiered.units import MIB

DEFAULT_SHARE: Final = 0.9
_UNLIMITED: Final = 1 << 60
"""cgroup v1 writes a number near 2**63 for "no limit"."""
_KEPT_LEAST_NBYTES: Final = 5 * MIB
"""Holds a panel that the reference kernels widen: if it is mapped anew for each panel, they take twice as long."""
_KEPT_MOST_NBYTES: Final = 32 * MIB
"""glibc takes no larger threshold."""


GROWTH_NBYTES: Final = 16 * MIB
"""By how much the process itself grows in a run or a conversion: code pages touched for the first time, stacks of
threads, headers, holes of the allocator. Measured, see tests/convert/test_room.py."""
BASELINE_VARIES_NBYTES: Final = 8 * MIB
"""How much the process itself differs from run to run, by the pages of libraries that the kernel maps around those that
are used: a budget that was named must be enough next time. 5 MiB have been seen beside two other programs."""


@dataclass(frozen=True)
class Limit:
    """One thing that bounds memory."""

    name: str
    available: int
    """Bytes this process may use in all, by this limit."""


def available_budget(share: float = DEFAULT_SHARE) -> int:
    """The default budget in bytes."""
    return int(min(limit.available for limit in memory_limits()) * share)


def memory_limits(proc: Path = Path("/proc"), cgroup_mount: Path = Path("/sys/fs/cgroup")) -> list[Limit]:
    """Everything that bounds this process's memory, with what it leaves; the least one counts."""
    own = sum(keyed_kib(proc / "self/status", key) for key in ("RssAnon", "RssShmem")) * 1024
    limits = [Limit("MemAvailable", keyed_kib(proc / "meminfo", "MemAvailable") * 1024 + own)]
    for folder in _cgroup_folders(proc, cgroup_mount):
        found = _cgroup_available(folder)
        if found is not None:
            limits.append(Limit(str(folder), found + own))
    return limits


def _cgroup_folders(proc: Path, mount: Path) -> Iterator[Path]:
    """The memory cgroup of this process and its ancestors, innermost first; v1 or v2, whichever has memory."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except FileNotFoundError:
        return  # a kernel without cgroups
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root = mount / "memory"
        elif controllers == "" and (mount / "cgroup.controllers").exists():
            root = mount
        else:
            continue
        folder = root / path.lstrip("/")
        # In a container the path may lie outside what is mounted; the mount's root is then our own group.
        folder = folder if folder.is_dir() else root
        while True:
            yield folder
            if folder == root:
                break
            folder = folder.parent


def _cgroup_available(folder: Path) -> int | None:
    """limit - (usage - file cache without shmem) of one group; None where it has no limit."""
    try:
        if (folder / "memory.limit_in_bytes").exists():
            limit = int((folder / "memory.limit_in_bytes").read_text())
            usage = int((folder / "memory.usage_in_bytes").read_text())
            stat, prefix = _stat(folder), "total_"
            cache = stat.get(f"{prefix}cache", 0) - stat.get(f"{prefix}shmem", 0)
        else:
            # Above memory.high a group is not killed but throttled, which is no way to run either.
            limits = [_limit(folder / "memory.max"), _limit(folder / "memory.high")]
            limit, usage = min(limits), int((folder / "memory.current").read_text())
            stat = _stat(folder)
            cache = stat.get("file", 0) - stat.get("shmem", 0)
    except OSError:
        # The v2 root group has no limit files.
        return None
    return None if limit >= _UNLIMITED else limit - (usage - max(cache, 0))


def _limit(path: Path) -> int:
    """A limit of cgroup v2, which may be "max" or, on old kernels, absent."""
    text = path.read_text().strip() if path.exists() else "max"
    return _UNLIMITED if text == "max" else int(text)


def _stat(folder: Path) -> dict[str, int]:
    lines = (folder / "memory.stat").read_text().splitlines()
    return {key: int(value) for key, value in (line.split() for line in lines)}


def kept_nbytes(budget: int) -> int:
    """Allocations of up to this many bytes stay in glibc's heap when they are freed. `budget` 0: unknown."""
    return min(_KEPT_MOST_NBYTES, max(_KEPT_LEAST_NBYTES, budget // 256))


def heap_nbytes(budget: int) -> int:
    """Free bytes that glibc may hold: at the ends of two heaps, and in holes. The factor is measured."""
    return 4 * kept_nbytes(budget)


def pin_malloc(budget: int = 0) -> None:
    """Make glibc keep freed allocations of up to `kept_nbytes(budget)` bytes, map larger ones, and use few heaps.

    By default each thread gets a heap, and how much of it may stay resident grows with what is freed, up to 64 MiB:
    activations would then stay in RSS after use, outside every plan. If glibc kept as little as possible, activations
    would be mapped and filled with zeros anew in every layer: 60,000 page faults in a pass over 64 sequences, a tenth
    of its time.
    """
    import ctypes

    m_mmap_threshold, m_trim_threshold, m_arena_max = -3, -1, -8
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    kept = kept_nbytes(budget)
    libc.mallopt(m_arena_max, 2)
    libc.mallopt(m_mmap_threshold, kept)
    libc.mallopt(m_trim_threshold, kept)


def cpu_count() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0))
