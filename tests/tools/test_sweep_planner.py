"""What the planner chooses against sweeps: what is run, that it goes on where it was, and what the table says of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiered.bench.stores import Synthetic
from tiered.configs_path import config_dir
from tiered.plan.inputs import ModelShape
from tiered.plan.machines import load_hardware, save_hardware
from tiered.plan.shapes import known_shapes
from tools import sweep_planner
from tools.sweep_planner import Job, Planner, Way, main

JOB = Job("opt-1.3b", "1300MiB", 32, 64, 16)


def shape(*_: object) -> ModelShape:
    known = known_shapes(config_dir() / "models", JOB.shape)
    assert known is not None
    return known["int4"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a profile, where one job is swept on a store that is not there."""
    save_hardware(load_hardware("laptop-16gb"), tmp_path / "profile.toml")
    monkeypatch.setattr(sweep_planner, "JOBS", [JOB])
    monkeypatch.setattr(sweep_planner, "read_store_shape", shape)
    monkeypatch.setattr(sweep_planner, "disk_rate", lambda store: 2e9)
    monkeypatch.setattr(Synthetic, "make", lambda self, compress: self.path(compress))
    return tmp_path


def test_a_sweep_has_the_choice_and_what_it_was_chosen_among() -> None:
    planner = Planner(shape(), load_hardware("laptop-16gb"), JOB)
    choice, swept = planner.choice, planner.sweep()
    assert choice is not None and choice in swept and len(set(swept)) == len(swept)
    assert {way.batch for way in swept} >= {choice.batch // 2, choice.batch}
    assert {(way.kv, way.bits) for way in swept} >= {("cpu", 16), ("cpu", 4), ("disk", 16), ("disk", 4)}
    assert any(way.resident is not None for way in swept) and all(1 <= way.batch <= JOB.sequences for way in swept)
    # What is chosen is predicted to be about the best of all that is run.
    assert planner.tokens_per_second(choice) > 0.85 * max(map(planner.tokens_per_second, swept))
    assert planner.tokens_per_second(Way(32, "cpu", 16, resident=1 << 30)) == 0


def test_a_choice_that_holds_less_than_has_room_is_run_so_beside_one_that_holds_all() -> None:
    laptop = load_hardware("laptop-16gb")
    slow = replace(laptop, cpu=replace(laptop.cpu, touch=laptop.disk.read / 9))
    planner = Planner(shape(), slow, Job("opt-1.3b", "2GiB", 4, 4, 4))
    choice = planner.choice
    assert choice is not None and choice.resident is not None
    assert {choice, replace(choice, resident=None)} <= set(planner.sweep())
    assert planner.tokens_per_second(choice) > 1.1 * planner.tokens_per_second(replace(choice, resident=None))


def test_a_sweep_goes_on_where_it_was_and_its_table_names_what_is_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hardware = load_hardware("laptop-16gb")
    done: list[Way] = []
    chosen = Planner(shape(), replace(hardware, disk=replace(hardware.disk, read=2e9)), JOB).choice

    def run(store: Path, job: Job, way: Way) -> dict[str, Any]:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(way)
        return {"seconds": 4.0 if way == chosen else 2.0}

    monkeypatch.setattr(sweep_planner, "run", run)
    words = ["--dir", str(folder)]
    assert main(words) == 130
    assert main([*words, "--minutes", "0"]) == 0 and len(done) == 3
    first, done = done, []
    assert main(words) == 130
    assert not set(first) & set(done)

    capsys.readouterr()
    assert main([*words, "--table"]) == 0
    out = capsys.readouterr().out
    # 512 tokens in 4 s, where others take 2.
    assert f"| opt-1.3b, 1300MiB, 32 x (64 + 16) | {chosen} | 128, " in out
    assert "| 50% **behind** | 256 (" in out and " choices reach 90% of the best" in out


def test_a_choice_that_was_not_run_is_in_the_table_and_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A store that has its shape from an earlier version is read anew.
    monkeypatch.setattr(sweep_planner, "read_store_shape", lambda store: None)
    monkeypatch.setattr("tiered.shapes.store_shape", shape)
    words = ["--dir", str(folder), "--table"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.count("| not run | - | - |") == 1 and "\n0 of 1 choices reach" in out

    # One that failed, as all did.
    hardware = load_hardware("laptop-16gb")
    results = sweep_planner.Results(folder / "planner.jsonl")
    results.add(JOB, None, disk=2e9)
    asked = Planner(shape(), replace(hardware, disk=replace(hardware.disk, read=2e9)), JOB)
    results.add(JOB, asked.choice, seconds=None)
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "| 0% **behind** | 0 (" in out and "\n0 of 1 choices reach" in out


def test_what_does_not_fit_is_no_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_planner, "call", lambda *words, or_code=0: None)
    assert sweep_planner.run(folder, JOB, Way(1, "cpu", 16)) == {"seconds": None}
    assert sweep_planner.tokens_per_second(JOB, [float("inf")]) == 0
