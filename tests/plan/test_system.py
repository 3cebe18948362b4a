"""What the kernel tells about a machine, from files made up for the purpose and from this machine's own."""

import os
import platform
from pathlib import Path

import pytest

from tiered.plan import system


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks for x86 features")
def test_features_come_from_the_flags_line(tmp_path: Path) -> None:
    write(
        tmp_path / "cpuinfo",
        "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 fma avx512f\nvmx flags\t: avx512bw\n",
    )
    cpu = system.cpu(tmp_path)
    assert cpu.model == "Some CPU"
    assert cpu.features == ("avx2", "fma", "avx512f")
    assert "avx512bw" in cpu.missing
    assert set(cpu.features) | set(cpu.missing) == set(system.CPU_FEATURES)


def test_this_machine_has_a_processor() -> None:
    cpu = system.cpu()
    assert 1 <= cpu.allowed <= cpu.present
    refusal = system.amx_refusal()
    assert refusal is None or refusal
    if "amx_tile" not in cpu.features and cpu.architecture == "x86_64":
        assert refusal is not None


def test_sizes_of_meminfo_are_bytes(tmp_path: Path) -> None:
    write(tmp_path / "meminfo", "MemTotal:       2048 kB\nSwapTotal:         0 kB\n")
    assert system.meminfo("MemTotal", tmp_path) == 2 << 20
    assert system.meminfo("SwapTotal", tmp_path) == 0
    with pytest.raises(KeyError, match="has no MemAvailable"):
        system.meminfo("MemAvailable", tmp_path)


def test_the_choice_is_in_brackets(tmp_path: Path) -> None:
    write(tmp_path / "kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n")
    assert system.huge_pages(tmp_path) == "never"


def test_cgroup_versions_are_told_apart(tmp_path: Path) -> None:
    assert system.cgroup_version(tmp_path) == "none"
    (tmp_path / "fs/cgroup/memory").mkdir(parents=True)
    assert system.cgroup_version(tmp_path) == "v1"
    write(tmp_path / "fs/cgroup/cgroup.controllers", "cpu memory\n")
    assert system.cgroup_version(tmp_path) == "v2"


def test_each_way_to_limit_says_what_is_in_its_way(tmp_path: Path) -> None:
    write(tmp_path / "fs/cgroup/cgroup.controllers", "cpu io\n")
    v2, v1, systemd = system.cgroup_support(tmp_path, tmp_path / "run")
    assert v2.refusal is not None and "does not list memory" in v2.refusal
    assert v1.refusal is not None and "does not exist" in v1.refusal
    assert systemd.refusal == "systemd is not running"
    write(tmp_path / "fs/cgroup/cgroup.controllers", "cpu memory\n")
    write(tmp_path / "fs/cgroup/cgroup.subtree_control", "")
    assert system.cgroup_support(tmp_path)[0].refusal is None


def test_busy_seconds_are_all_but_idle_and_waiting(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  100 20 30 9999 8888 1 2 47 5 6\ncpu0 1 2 3\n")
    assert system.busy_seconds(tmp_path) == 200 / os.sysconf("SC_CLK_TCK")
    assert system.busy_seconds() > 0
