"""The limit is a limit, page cache is reclaimed under it, and the report says what happened."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import SECONDS, wait_until
from tiered.bench import cgroup
from tiered.bench import limit as library
from tiered.units import MIB
from tools import limit

TOOL = Path(limit.__file__)
HOLD_200_MIB = "block = bytearray(b'x') * (200 << 20)"
UNTIL_LOOKED_AT = """
import os, time

def looks():
    # The tool sleeps before each look at this process.
    lines = open(f"/proc/{os.getppid()}/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))

before = looks()
while looks() < before + 6:
    time.sleep(0.01)
"""


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parent.parent)}
    words = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=100, env=environment, check=False)


@pytest.fixture(scope="module")
def can_limit() -> None:
    checked = call("--check")
    if checked.returncode == cgroup.CANNOT_LIMIT:
        pytest.skip(checked.stderr)
    assert checked.returncode == 0, checked.stderr


def limited(folder: Path, memory: str, *command: str) -> tuple[dict[str, Any], str]:
    """The report of running `command` under `memory`, and what the tool printed."""
    path = folder / "report.json"
    done = call("--memory", memory, "--json", str(path), "--", *command)
    assert path.exists(), done.stderr
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["exit_code"] == done.returncode
    return report, done.stderr


@pytest.mark.cgroup
@pytest.mark.usefixtures("can_limit")
class TestLimited:
    def test_exceeding_the_limit_is_death_and_reported(self, tmp_path: Path) -> None:
        report, printed = limited(tmp_path, "100MiB", sys.executable, "-c", HOLD_200_MIB)
        assert report["exit_code"] == 128 + signal.SIGKILL
        assert report["oom_kills"] >= 1
        assert report["cgroup_peak_bytes"] <= 100 * MIB
        assert "OUT OF MEMORY: the kernel killed the command" in printed

    def test_a_child_within_the_limit_finishes_with_plausible_peaks(self, tmp_path: Path) -> None:
        report, printed = limited(tmp_path, "300MiB", sys.executable, "-c", f"{HOLD_200_MIB}\n{UNTIL_LOOKED_AT}")
        assert (report["exit_code"], report["oom_kills"]) == (0, 0)
        for figure in ("vm_hwm_bytes", "max_rss_bytes", "cgroup_peak_bytes"):
            assert 200 * MIB < report[figure] < 300 * MIB, figure
        assert "OUT OF MEMORY" not in printed

    def test_page_cache_is_charged_and_reclaimed(self, tmp_path: Path) -> None:
        if fs_type(tmp_path) == "tmpfs":
            pytest.skip("temporary files lie in memory here: they cannot be dropped from the cache")
        file = tmp_path / "large"
        # The file leaves the cache, where its pages were charged to whoever wrote them.
        with file.open("wb") as writer:
            for _ in range(200):
                writer.write(os.urandom(MIB))
            writer.flush()
            os.fsync(writer.fileno())
            os.posix_fadvise(writer.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        report, _ = limited(tmp_path, "64MiB", "sh", "-c", 'cat "$0" > /dev/null', str(file))
        assert (report["exit_code"], report["oom_kills"]) == (0, 0)
        assert report["vm_hwm_bytes"] < 20 * MIB
        assert 32 * MIB < report["cgroup_peak_bytes"] <= 64 * MIB

    @pytest.mark.parametrize(
        ("command", "status"),
        [
            (["sh", "-c", "exit 7"], 7),
            (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
            (["no-such-command-anywhere"], 127),
        ],
        ids=["exits", "signalled", "missing"],
    )
    def test_exit_status_passes_through(self, tmp_path: Path, command: list[str], status: int) -> None:
        report, _ = limited(tmp_path, "64MiB", *command)
        assert report["exit_code"] == status

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signals_reach_the_command_and_the_group_goes(self, tmp_path: Path, number: int) -> None:
        report = tmp_path / "report.json"
        script = "trap 'exit 5' INT TERM; touch started; sleep 600 & while true; do sleep 0.05; done"
        words = [
            sys.executable,
            str(TOOL),
            "--memory",
            "64MiB",
            "--json",
            str(report),
            "--",
            "sh",
            "-c",
            script,
        ]
        environment = {**os.environ, "PYTHONPATH": str(TOOL.parent.parent)}
        with subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as tool:
            wait_until((tmp_path / "started").exists)
            tool.send_signal(number)
            assert tool.wait(timeout=SECONDS) == 5
        method = json.loads(report.read_text(encoding="utf-8"))["method"]
        if method.startswith("cgroup"):
            assert not Path(method.partition("(")[2].rstrip(")")).exists()

    def test_a_systemd_scope_reports_the_same_figures(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        mount = cgroup.mounted("cgroup", "memory")
        if mount is None:
            pytest.skip("the stand-in for systemd-run needs a v1 memory controller")
        stand_in = tmp_path / "systemd-run"
        stand_in.write_text(STAND_IN.format(parent=cgroup.own_folder(mount, "memory")), encoding="utf-8")
        stand_in.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.setattr(cgroup, "parents_v1", nowhere)
        monkeypatch.setattr(cgroup, "parents_v2", nowhere)
        report = library.run([sys.executable, "-c", HOLD_200_MIB], 100 * MIB)
        assert report.method == "systemd-run --scope"
        assert report.exit_code == 128 + signal.SIGKILL
        assert report.oom_kills == 1
        assert report.cgroup_peak_bytes is not None
        assert 90 * MIB < report.cgroup_peak_bytes <= 100 * MIB
        assert not list(cgroup.own_folder(mount, "memory").glob("tiered-limit-*.scope"))


STAND_IN = """#!/bin/sh
while [ "$1" != -- ]; do
    case $1 in --unit=*) unit=${{1#--unit=}} ;; MemoryMax=*) nbytes=${{1#MemoryMax=}} ;; esac
    shift
done
shift
[ -n "$unit" ] || exec "$@"
mkdir "{parent}/$unit" && echo "$nbytes" > "{parent}/$unit/memory.limit_in_bytes"
echo $$ > "{parent}/$unit/cgroup.procs" && exec "$@"
"""


def nowhere(refusals: list[str]) -> Iterator[Path]:
    refusals.append("made up: nowhere to make a group")
    yield from ()


def fs_type(path: Path) -> str:
    found = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.fixture
def cannot_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "parents_v1", nowhere)
    monkeypatch.setattr(cgroup, "parents_v2", nowhere)
    refusing = tmp_path / "systemd-run"
    refusing.write_text("#!/bin/sh\necho no bus >&2; exit 1\n", encoding="utf-8")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


@pytest.mark.usefixtures("cannot_limit")
@pytest.mark.parametrize("arguments", [["--check"], ["--memory", "1GiB", "--", "touch", "ran"]])
def test_without_any_method_every_reason_is_given_and_nothing_runs(
    arguments: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert limit.main(arguments) == 125
    printed = capsys.readouterr().err
    assert printed.count("made up: nowhere to make a group") == 2
    assert "systemd-run: no bus" in printed
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("cannot_limit")
def test_or_unlimited_runs_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    words = ["--memory", "1GiB", "--or-unlimited", "--json", str(path), "--", "sh", "-c", "exit 3"]
    assert limit.main(words) == 3
    assert "NOT limited" in capsys.readouterr().err
    report = json.loads(path.read_text(encoding="utf-8"))
    assert (report["limited"], report["cgroup_peak_bytes"], report["oom_kills"]) == (False, None, None)


@pytest.mark.parametrize("arguments", [[], ["--memory", "1GiB"], ["--memory", "much", "--", "true"], ["--", "true"]])
def test_bad_usage_exits_with_2(arguments: Sequence[str]) -> None:
    assert limit.main(arguments) == 2


def test_a_v2_group_is_limited_without_swap_and_read(tmp_path: Path) -> None:
    for name, text in {
        "memory.max": "max",
        "memory.swap.max": "max",
        "memory.peak": "4096",
        "memory.events": "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\n",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    group = cgroup.Group(tmp_path)
    group.set_limit(1 << 30)
    assert (tmp_path / "memory.max").read_text(encoding="utf-8") == str(1 << 30)
    assert (tmp_path / "memory.swap.max").read_text(encoding="utf-8") == "0"
    assert (group.peak_bytes(), group.limit_hits(), group.oom_kills()) == (4096, 12, 2)
