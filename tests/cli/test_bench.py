"""`tiered bench`: what is asked for is run in turns, and whatever has been measured is shown."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bench.made_up import MACHINE, STORE, report, usage
from tests.commands import ROOT, Done, run_here
from tests.test_json_keys import KEYS, found
from tests.waiting import SECONDS
from tiered.bench import limit
from tiered.bench.cgroup import CannotLimitError
from tiered.cli import bench as command
from tiered.convert import ConvertOptions, convert_checkpoint

SHAPE = "tiny-opt"


class Runs:
    """Stands for the processes that would run: their commands, and how each ends."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.limits: list[int | None] = []
        self.ends: Callable[[list[str]], limit.Report] = lambda words: usage()

    def __call__(self, words: list[str], limit_bytes: int | None, **more: Any) -> limit.Report:
        self.commands.append(words)
        self.limits.append(limit_bytes)
        if "--trace" in words:
            Path(words[words.index("--trace") + 1]).write_text(json.dumps({"traceEvents": []}))
        more["stdout"].write_text(json.dumps({"report": report()}))
        return self.ends(words)

    def of(self, option: str) -> list[str]:
        """The option's value in every command."""
        return [words[words.index(option) + 1] for words in self.commands]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    fake = Runs()
    monkeypatch.setattr(limit, "run", fake)
    monkeypatch.setattr(command, "store_facts", lambda store: STORE)
    monkeypatch.setattr(command, "machine_facts", lambda store: MACHINE)
    return fake


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "a.tiered").mkdir()
    return tmp_path / "a.tiered"


def test_settings_take_turns_and_prompts_change(runs: Runs, store: Path) -> None:
    done = run_here("bench", store, "--batch", "1", "4", "-p", "16,32", "-n", "2", "-r", "2")
    assert done.code == 0, done.err
    one_turn = [("1", "16"), ("1", "32"), ("4", "16"), ("4", "32")]
    assert list(zip(runs.of("--sequences"), runs.of("--prompt-tokens"), strict=True)) == one_turn * 2
    assert runs.of("--seed") == ["1"] * 4 + ["2"] * 4
    assert set(runs.limits) == {None}
    for said in ("| pp16 |", "| tg2 |", "| pp32+tg2 |", f"- machine: {MACHINE.name}", "- command: `tiered bench"):
        assert said in done.out
    assert "run 8 of 8" in done.err


def test_lists_end_where_the_target_begins(runs: Runs, store: Path) -> None:
    done = run_here("bench", "--kv-bits", "16", "auto", "--kernels", "avx2", "-r", "1", "--batch", "3", store)
    assert done.code == 0, done.err
    assert len(runs.commands) == 2 and {words[4] for words in runs.commands} == {str(store)}
    assert runs.of("--sequences") == ["3", "3"]


def test_a_limit_is_enforced_and_the_budget_fits_in_it(
    runs: Runs, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_here("bench", store, "--memory-limit", "1GiB", "2GiB", "-r", "1", "--or-unlimited")
    assert done.code == 0, done.err
    assert runs.limits == [1 << 30, 2 << 30]
    assert runs.of("--ram") == ["896MiB", "1920MiB"]

    def refuse(nbytes: int | None) -> None:
        raise CannotLimitError("memory cannot be limited here: made up")

    monkeypatch.setattr(command, "limiter", refuse)
    done = run_here("bench", store, "--memory-limit", "1GiB")
    assert (done.code, len(runs.commands)) == (1, 2)
    assert "made up" in done.err and "--or-unlimited" in done.err


def test_a_workload_is_run_and_options_replace_its_values(runs: Runs, store: Path, tmp_path: Path) -> None:
    assert run_here("bench", store, "--workload", "chat", "-r", "1").code == 0
    assert (runs.of("--prompt-tokens"), runs.of("-n")) == (["256"], ["128"])
    path = tmp_path / "two.toml"
    one = 'name = "{}"\nbatch = [1, 2]\nprompt_tokens = 8\nnew_tokens = 2\n'
    path.write_text("".join(f"[[part]]\n{one.format(name)}" for name in "ab"))
    runs.commands.clear()
    assert run_here("bench", store, "--workload", path, "--part", "b", "--batch", "5", "-r", "1").code == 0
    assert runs.of("--sequences") == ["5"]
    done = run_here("bench", store, "--workload", path, "--part", "c")
    assert done.code == 2 and "--part c: workload two has a, b" in done.err


@pytest.mark.parametrize("form", ["json", "jsonl", "csv"])
def test_programs_get_figures_machine_and_command(form: str, runs: Runs, store: Path) -> None:
    done = run_here("bench", store, "-o", form, "-p", "100", "-n", "10", "-r", "2")
    assert done.code == 0, done.err
    if form == "json":
        value = json.loads(done.out)
        assert {path: kind for path, kind in found(done.out).items() if ".report." not in path} == KEYS["bench"]
        assert len(value["rows"]) == 3 and value["command"].startswith("tiered bench")
        assert value["machine"]["name"] == MACHINE.name
    elif form == "jsonl":
        lines = [json.loads(line) for line in done.out.splitlines()]
        assert len(lines) == 2
        assert {*lines[0]} >= {"part", "memory", "batch", "machine", "command", "report", "usage"}
    else:
        assert [line["test"] for line in csv.DictReader(io.StringIO(done.out))] == ["pp100", "tg10", "pp100+tg10"]


def test_what_fails_is_named_and_the_rest_is_shown(runs: Runs, store: Path) -> None:
    runs.ends = lambda words: usage(3 if words[words.index("--sequences") + 1] == "64" else 0)
    done = run_here("bench", store, "--batch", "1", "64", "-r", "2")
    assert done.code == 1
    assert "batch 64: does not fit the budget" in done.err and "**batch 64: does not fit the budget**" in done.out
    assert "| pp512 |" in done.out
    assert len(runs.commands) == 3


def test_interrupted_it_shows_what_it_has(runs: Runs, store: Path) -> None:
    runs.ends = lambda words: usage(130, interrupted=True) if len(runs.commands) == 3 else usage()
    done = run_here("bench", store, "--batch", "1", "4", "-r", "2")
    assert done.code == 130
    assert "interrupted after 2 of 4 runs" in done.out and "| pp512 |" in done.out


@pytest.mark.parametrize("error", [CannotLimitError("no limit: made up"), OSError(28, "No space left on device")])
def test_whatever_ends_it_early_it_shows_what_it_has(error: Exception, runs: Runs, store: Path) -> None:
    def end(words: list[str]) -> limit.Report:
        if len(runs.commands) == 3:
            raise error
        return usage()

    runs.ends = end
    done = run_here("bench", store, "--batch", "1", "4", "-r", "2")
    assert done.code == getattr(error, "exit_code", 1)
    assert "ended after 2 of 4 runs" in done.out and "| pp512 |" in done.out
    assert ((error.strerror or "") if isinstance(error, OSError) else "made up") in done.err


@pytest.mark.parametrize("is_store", [True, False])
def test_the_disk_that_runs_read_is_slowed_down(
    is_store: bool, runs: Runs, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(rate: str | None, folder: Path) -> None:
        raise CannotLimitError(f"--read-rate: not for {folder}")

    monkeypatch.setattr(command, "throttled", refuse)
    target, place = (store, store) if is_store else (SHAPE, tmp_path)
    done = run_here("bench", target, "--dir", tmp_path, "--read-rate", "400MB")
    assert runs.commands == [] and f"not for {place}\n" in done.err
    assert "--or-unlimited" not in done.err


def test_warming_up_does_not_count(runs: Runs, store: Path) -> None:
    done = run_here("bench", store, "--warm", "-r", "1", "-o", "json")
    assert runs.of("--seed") == ["0", "1"]
    value = json.loads(done.out)
    assert len(value["runs"]) == 1 and "warm" in value["conditions"]


def test_pictures_and_a_page_are_written(runs: Runs, store: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot, page = tmp_path / "p.svg", tmp_path / "p.html"
    done = run_here("bench", store, "-r", "2", "--plot", plot, "--report", page)
    assert done.code == 0, done.err
    assert [("--trace" in words) for words in runs.commands] == [True, False]
    assert "</svg>" in plot.read_text() and "data:image/png;base64," in page.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-model"], "neither a store nor a shape; shapes are"),
        ([], "expected a store, or a shape"),
        (["STORE", "--plot", "p.pdf"], "--plot p.pdf: expected a name that ends in"),
        (["STORE", "--plot", "/no/folder/p.png"], "cannot be written"),
        (["STORE", "--quant", "int8"], "--quant: is for stores that are made of a shape"),
        (["STORE", "--clean"], "--clean: is for stores that are made of a shape"),
        (["STORE", "--compress", "none", "planes"], "--compress: is for stores that are made of a shape"),
        (["STORE", "--part", "a"], "--part: names a part of a workload"),
        (["STORE", "--workload", "chatt"], "there is none of this name; there are chat"),
        (["STORE", "--batch", "1", "0"], "0: expected a whole number above 0, or disk-bound"),
        (["STORE", "--batch", "2", "2"], "batch has 2 more than once"),
        (["STORE", "--memory-limit", "1GiB", "--ram", "2GiB"], "ram 2GiB with memory 1GiB"),
        (["STORE", "--memory-limit", "4QB"], "size '4QB'"),
        (["STORE", "--read-rate", "foo"], "--read-rate: size 'foo'"),
        (["STORE", "--kv-bits", "16", "32"], "'32' is not one of"),
        (["tiny-opt", "--dir", "/no/folder"], "--dir /no/folder: expected a folder that exists"),
    ],
)
def test_bad_usage_is_refused_before_anything_runs(
    words: list[str], said: str, runs: Runs, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_here("bench", *(str(store) if word == "STORE" else word for word in words))
    assert (done.code, runs.commands) == (2, [])
    assert said in " ".join(done.err.split())


def test_stores_of_a_shape_are_made_kept_and_cleaned(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[str]] = []

    def convert(words: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        made.append(words[3:])
        folder = Path(words[words.index("-o") + 1])
        folder.mkdir()
        (folder / "manifest.json").touch()
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr("tiered.bench.stores.subprocess.run", convert)
    words: list[str | Path] = [
        "bench",
        SHAPE,
        "--dir",
        tmp_path,
        "--compress",
        "none",
        "planes",
        "--quant",
        "none",
        "-r",
        "2",
    ]
    words += ["--distinct-blocks", "2"]
    done = run_here(*words)
    assert done.code == 0, done.err
    names = [f"bench-{SHAPE}-none-x2.tiered", f"bench-{SHAPE}-none-planes-x2.tiered"]
    assert [Path(words[4]).name for words in runs.commands] == names * 2
    assert made[1] == [
        *("convert", "--synthetic", SHAPE, "-o", str(tmp_path / names[1]), "--quant", "none"),
        *("--compress", "planes", "--distinct-blocks", "2"),
    ]
    assert run_here(*words, "--clean").code == 0
    assert len(made) == 2
    assert not list(tmp_path.glob("bench-*"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.tiered"
    convert_checkpoint(SHAPE, path, ConvertOptions(synthetic=True))
    return path


@pytest.mark.inputs("tiered/bench", "tiered/cli")
def test_a_real_run_of_a_tiny_store(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What they ask other commands is tested by itself; each would load torch once more.
    monkeypatch.setattr(command, "store_facts", lambda store: STORE)
    monkeypatch.setattr(command, "machine_facts", lambda store: MACHINE)
    words = ["-p", "8", "-n", "3", "-r", "1", "-o", "json", "--memory-limit", "1GiB", "--or-unlimited"]
    done: Done = run_here("bench", tiny, *words)
    assert done.code == 0, done.err
    value = json.loads(done.out)
    assert [row["test"] for row in value["rows"]] == ["pp8", "tg3", "pp8+tg3"]
    assert all(row["tokens_per_second"] > 0 for row in value["rows"])
    (only,) = value["runs"]
    assert 100 << 20 < only["usage"]["vm_hwm_bytes"] <= value["rows"][0]["peak_rss_bytes"]
    assert only["usage"]["exit_code"] == 0


@pytest.mark.inputs("tiered/bench", "tiered/cli", "tiered/process.py")
def test_a_signal_reaches_the_run_and_ends_the_benchmark(tiny: Path, tmp_path: Path) -> None:
    # In a process of its own, which gets a real signal while a run is going on.
    (tmp_path / "sitecustomize.py").write_text(FACTS)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    words = [sys.executable, "-m", "tiered", "bench", str(tiny), "-p", "8", "-n", "240", "-r", "1000"]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "run 1 of 1000" in line:
                break
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert re.search(r"interrupted after \d+ of 1000 runs", out), out


FACTS = """
import tiered.bench.facts as facts
facts.store_facts = lambda store: facts.StoreFacts("tiny", 1, 1, True, None)
facts.machine_facts = lambda store: facts.Machine("here", "", "", "", False)
"""
