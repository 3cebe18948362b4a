"""A workload goes on where it was interrupted, and lines of any version make a table."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.made_up import report, run, usage
from tiered.bench.runs import Run
from tiered.bench.workload import Setting
from tools import bench_workload

TWO: str = '[[part]]\nname = "a"\nmemory = ["1GiB", "2GiB"]\nbatch = 1\nprompt_tokens = 100\nnew_tokens = 10\n'
FULL: dict[str, Any] = report(
    **{"kv_bits": 16, "kv_on_disk": False, "prefill_bound_share": 0.75, "bound_share": 0.9},
    **{"resident_bytes": 1 << 30, "peak_rss_bytes": 700 << 20},
)
EARLIER: dict[str, Any] = {
    **{"part": "a", "memory": "1GiB", "batch": 1, "machine": "2 cores", "command": "tiered generate"},
    **{"report": FULL, "usage": {"cgroup_peak_bytes": 800 << 20}},
}
"""A line as the version before `setting` wrote it."""


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Setting]:
    """The settings that have been run."""
    found: list[Setting] = []

    def run_once(store: Path, setting: Setting, *more: Any) -> Run:
        found.append(setting)
        return run(setting, report=FULL) if setting.memory == "1GiB" else run(setting, report=None, usage=usage(3))

    monkeypatch.setattr(bench_workload, "run_once", run_once)
    return found


def call(folder: Path, *words: str) -> int:
    (folder / "two.toml").write_text(TWO)
    known = [str(folder / "two.toml"), "--results", str(folder / "two.jsonl"), "--store", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench_workload", *known, *words])
        return bench_workload.main()


def test_what_is_there_is_not_run_again(
    tmp_path: Path, done: list[Setting], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path) == 1
    assert [setting.memory for setting in done] == ["1GiB", "2GiB"]
    assert "part a in 2GiB: does not fit the budget" in capsys.readouterr().err
    assert call(tmp_path) == 1
    assert [setting.memory for setting in done] == ["1GiB", "2GiB", "2GiB"]
    (line,) = (tmp_path / "two.jsonl").read_text().splitlines()
    assert json.loads(line)["setting"]["memory"] == "1GiB"


def test_lines_of_earlier_versions_count_and_are_shown(
    tmp_path: Path, done: list[Setting], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "two.jsonl").write_text(json.dumps(EARLIER) + "\n")
    assert call(tmp_path, "--table") == 0
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert row[:5] == ["| a", "1GiB", "1", "100", "10"] and row[-1].startswith("800 MiB")
    call(tmp_path)
    assert [setting.memory for setting in done] == ["2GiB"]


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "two.jsonl").write_text(json.dumps(EARLIER) + "\n")
    assert call(tmp_path, "--plot", str(tmp_path / "p.svg")) == 0
    assert "</svg>" in (tmp_path / "p.svg").read_text()
