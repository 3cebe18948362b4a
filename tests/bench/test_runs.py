"""Runs are processes of their own that take turns; what ends them is told."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.made_up import report, run, usage
from tiered.bench import limit, runs
from tiered.bench.runs import Run, StoppedError, Way, alternate, generate_words, run_once, with_batch
from tiered.bench.workload import DISK_BOUND, Setting
from tiered.errors import TieredError


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "a.tiered" / "blocks").mkdir(parents=True)
    (tmp_path / "a.tiered" / "blocks" / "layer").write_bytes(bytes(8192))
    return tmp_path / "a.tiered"


class Fake:
    """Stands for `limit.run`: answers with a report, or ends as it is told."""

    def __init__(self, ends: limit.Report, text: str = "") -> None:
        self.ends, self.text = ends, text or json.dumps({"report": report()})
        self.calls: list[tuple[list[str], int | None]] = []

    def __call__(self, command: list[str], limit_bytes: int | None, **more: Any) -> limit.Report:
        self.calls.append((command, limit_bytes))
        more["stdout"].write_text(self.text)
        return self.ends


def test_settings_take_turns_and_every_repetition_has_prompts_of_its_own() -> None:
    order: list[tuple[int | str, int]] = []

    def go(setting: Setting, seed: int) -> Run:
        order.append((setting.batch, seed))
        return run(setting, seed, report() if setting.batch == 1 else None)

    found = list(alternate([Setting(batch=1), Setting(batch=2)], 3, go))
    # What has failed is not tried again.
    assert order == [(1, 1), (2, 1), (1, 2), (1, 3)]
    assert [one.seed for one in found] == [1, 1, 2, 3]


def test_a_run_is_a_command_that_a_person_could_type(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(usage())
    monkeypatch.setattr(limit, "run", fake)
    setting = Setting(memory="1GiB", batch=4, prompt_tokens=8, new_tokens=2, kv_bits="8", kernel_mode="fast")
    done = run_once(store, setting, 3, Way(), trace=Path("/t.json"))
    assert done.command == (
        "tiered generate a.tiered --prompt-tokens 8 -n 2 --sequences 4 --ignore-eos --seed 3 "
        "--kernel-mode fast --kv-bits 8 --ram 896MiB"
    )
    ((command, limit_bytes),) = fake.calls
    assert command[:3] == [sys.executable, "-m", "tiered"] and command[4] == str(store)
    assert command[-3:] == ["--trace", "/t.json", "--json"]
    assert (limit_bytes, done.report, done.failure) == (1 << 30, report(), None)
    assert json.loads(json.dumps(done.to_json("here")))["machine"] == "here"
    assert generate_words(Setting(), 1)[-2:] == ["--seed", "1"]


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (usage(3), "does not fit the budget"),
        (usage(137, oom_kills=1), "killed by the kernel for more than 1 GiB"),
        (usage(137, oom_kills=None), "killed by the kernel for more than 1 GiB"),
        (usage(4), "exit status 4"),
    ],
)
def test_a_run_that_failed_says_why(
    ends: limit.Report, said: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit, "run", Fake(ends, "no JSON"))
    done = run_once(store, Setting(), 1, Way())
    assert (done.report, done.failure) == (None, said)


def test_an_interrupted_run_ends_the_benchmark(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "run", Fake(usage(130, interrupted=True)))
    with pytest.raises(StoppedError):
        run_once(store, Setting(), 1, Way())


def test_a_cold_run_drops_the_stores_pages_and_a_warm_one_does_not(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[Path] = []
    monkeypatch.setattr(limit, "run", Fake(usage()))
    monkeypatch.setattr(runs, "drop_pages", dropped.append)
    run_once(store, Setting(), 1, Way(cold=False))
    assert dropped == []
    run_once(store, Setting(), 1, Way())
    assert dropped == [store]


def test_pages_of_files_in_folders_can_be_dropped(store: Path) -> None:
    runs.drop_pages(store)
    assert (store / "blocks" / "layer").read_bytes() == bytes(8192)


def test_a_batch_that_the_disk_bounds_is_found_by_another_process(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(usage(), "12\n")
    monkeypatch.setattr(limit, "run", fake)
    assert with_batch(store, Setting(batch=3)).batch == 3
    assert with_batch(store, Setting(batch=DISK_BOUND, ram="1GiB")).batch == 12
    ((command, _),) = fake.calls
    assert command[1:4] == ["-m", "tiered.bench.disk_bound", str(store)]
    assert Setting(**json.loads(command[4])) == Setting(batch=DISK_BOUND, ram="1GiB")
    monkeypatch.setattr(limit, "run", Fake(usage(3), "12\n"))
    with pytest.raises(TieredError, match="no batch size for 1GiB"):
        with_batch(store, Setting(batch=DISK_BOUND, ram="1GiB"))
