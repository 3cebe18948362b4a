"""How much memory there is: made-up machines and cgroups, and this process itself."""

import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tiered.plan import available_budget, cpu_count, memory_limits, process_rss_bytes
from tiered.plan import budget as module
from tiered.plan.budget import heap_nbytes
from tiered.units import GIB, KIB, MIB

OWN = 100 * MIB
"""Anonymous memory of the process; its file pages are cache, which is counted as free already."""


@dataclass(frozen=True)
class Machine:
    """A /proc and a /sys/fs/cgroup."""

    proc: Path
    mount: Path

    def available(self) -> dict[str, int]:
        limits = memory_limits(self.proc, self.mount)
        return {limit.name.replace(str(self.mount), "mount"): limit.available for limit in limits}

    def v2(self, group: str, limit: int | str, current: int = 0, **stat: int) -> None:
        folder = self.mount / group
        folder.mkdir(parents=True, exist_ok=True)
        (self.mount / "cgroup.controllers").write_text("memory\n")
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{current}\n")
        (folder / "memory.stat").write_text("".join(f"{key} {value}\n" for key, value in stat.items()))

    def v1(self, group: str, limit: int, usage: int = 0, **stat: int) -> None:
        folder = self.mount / "memory" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
        (folder / "memory.stat").write_text("".join(f"{key} {value}\n" for key, value in stat.items()))


def machine(tmp_path: Path, cgroup: str | None, available: int = 8 * GIB) -> Machine:
    made = Machine(tmp_path / "proc", tmp_path / "cgroup")
    (made.proc / "self").mkdir(parents=True)
    made.mount.mkdir()
    (made.proc / "meminfo").write_text(f"MemTotal:       {16 * GIB // KIB} kB\nMemAvailable:   {available // KIB} kB\n")
    (made.proc / "self/status").write_text(
        f"Name:\tpython\nVmHWM:\t  999 kB\nVmRSS:\t  {3 * OWN // KIB} kB\n"
        f"RssAnon:\t{OWN // KIB - 8} kB\nRssFile:\t{2 * OWN // KIB} kB\nRssShmem:\t8 kB\n"
    )
    if cgroup is not None:
        (made.proc / "self/cgroup").write_text(cgroup)
    return made


def test_without_limits_the_machine_s_memory_counts(tmp_path: Path) -> None:
    assert machine(tmp_path, "0::/\n").available() == {"MemAvailable": 8 * GIB + OWN}


def test_a_kernel_without_cgroups_has_no_limits(tmp_path: Path) -> None:
    assert machine(tmp_path, None).available() == {"MemAvailable": 8 * GIB + OWN}
    assert machine(tmp_path / "empty", "").available() == {"MemAvailable": 8 * GIB + OWN}


def test_a_v2_limit_leaves_what_is_neither_used_nor_cache(tmp_path: Path) -> None:
    made = machine(tmp_path, "0::/user/run\n")
    made.v2("user/run", GIB, current=600 * MIB, file=300 * MIB, shmem=100 * MIB, anon=250 * MIB)
    assert made.available()["mount/user/run"] == GIB - (600 - 200) * MIB + OWN


def test_every_ancestor_s_limit_counts(tmp_path: Path) -> None:
    made = machine(tmp_path, "0::/a/b/c\n")
    made.v2("a", 2 * GIB)
    made.v2("a/b", "max")
    made.v2("a/b/c", 3 * GIB)
    assert made.available() == {
        "MemAvailable": 8 * GIB + OWN,
        "mount/a/b/c": 3 * GIB + OWN,
        "mount/a": 2 * GIB + OWN,
    }


def test_a_v1_limit_leaves_what_is_neither_used_nor_cache(tmp_path: Path) -> None:
    made = machine(tmp_path, "12:cpu,cpuacct:/\n5:memory:/docker/x\n1:name=systemd:/\n0::/\n")
    made.v1("", (1 << 63) - 4096)
    made.v1("docker", 4 * GIB)
    made.v1("docker/x", GIB, 600 * MIB, total_cache=300 * MIB, total_shmem=100 * MIB, cache=1)
    assert made.available() == {
        "MemAvailable": 8 * GIB + OWN,
        "mount/memory/docker/x": GIB - 400 * MIB + OWN,
        "mount/memory/docker": 4 * GIB + OWN,
    }


def test_a_v1_controller_may_share_its_hierarchy(tmp_path: Path) -> None:
    made = machine(tmp_path, "3:cpuset,memory:/x\n")
    made.v1("x", GIB)
    assert made.available()["mount/memory/x"] == GIB + OWN


@pytest.mark.parametrize("path", ["/docker/0123", "/../../outside", "/gone (deleted)"])
def test_in_a_container_the_mount_itself_is_our_group(tmp_path: Path, path: str) -> None:
    made = machine(tmp_path, f"0::{path}\n")
    made.v2("", GIB, current=100 * MIB)
    assert made.available()["mount"] == GIB - 100 * MIB + OWN
    old = machine(tmp_path / "v1", f"4:memory:{path}\n")
    old.v1("", GIB)
    assert old.available()["mount/memory"] == GIB + OWN


def test_a_group_used_beyond_its_limit_leaves_less_than_nothing_more(tmp_path: Path) -> None:
    made = machine(tmp_path, "0::/x\n")
    made.v2("x", GIB, current=GIB + 200 * MIB)
    assert made.available()["mount/x"] == OWN - 200 * MIB


def test_more_shmem_than_cache_is_no_cache(tmp_path: Path) -> None:
    made = machine(tmp_path, "0::/x\n")
    made.v2("x", GIB, current=500 * MIB, file=10 * MIB, shmem=20 * MIB)
    assert made.available()["mount/x"] == GIB - 500 * MIB + OWN


def test_a_group_without_memory_files_has_no_limit(tmp_path: Path) -> None:
    made = machine(tmp_path, "0::/x\n")
    made.v2("", "max")
    (made.mount / "x").mkdir()
    assert made.available() == {"MemAvailable": 8 * GIB + OWN}


def test_the_default_is_ninety_percent_of_the_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = machine(tmp_path, "0::/x\n")
    made.v2("x", GIB)
    monkeypatch.setattr(module, "memory_limits", lambda: memory_limits(made.proc, made.mount))
    assert available_budget() == int(0.9 * (GIB + OWN))
    assert available_budget(0.5) == int(0.5 * (GIB + OWN))


def test_this_process_has_memory_and_processors() -> None:
    assert available_budget() > process_rss_bytes() // 2
    assert cpu_count() >= 1


@pytest.mark.inputs("tiered/plan")
@pytest.mark.parametrize("budget", [0, 2 * GIB])
def test_what_malloc_keeps_is_counted(budget: int) -> None:
    assert kept_by_threads(budget) <= heap_nbytes(budget)
    # What a large budget allows would be too much for a small one.
    assert kept_by_threads(100 * GIB) > heap_nbytes(budget)


@cache
def kept_by_threads(budget: int) -> int:
    """By how much the RSS of a process with this budget grows whose threads free buffers of all sizes."""
    program = f"""
import random, threading
import numpy as np
from tiered.plan import process_rss_bytes
from tiered.plan.budget import pin_malloc

def work(seed):
    draw = random.Random(seed)
    for _ in range(100):
        buffers = [np.ones(draw.randrange(1 << 10, 32 << 20), np.uint8) for _ in range(2)]

pin_malloc({budget})
before = process_rss_bytes()
for seed in range(2):
    thread = threading.Thread(target=work, args=(seed,))
    thread.start()
    thread.join()
print(process_rss_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return int(done.stdout)
