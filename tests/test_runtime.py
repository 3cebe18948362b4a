"""One plan per run: what a command reports and says is what its runtime was opened with."""

import json
from pathlib import Path

import pytest

import tiered.opening
from tests.commands import make_store, run_here
from tests.jobs.fakes import request, write_lines
from tiered.plan import Budgets, Machine, ModelShape, Plan, Workload, make_plan
from tiered.plan.hardware import GpuRates


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("runtime"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Every plan that a runtime makes."""
    plans: list[Plan] = []

    def make_and_note(
        model: ModelShape, machine: Machine, workload: Workload, budgets: Budgets, gpu: GpuRates | None
    ) -> Plan:
        plans.append(make_plan(model, machine, workload, budgets, gpu))
        return plans[-1]

    monkeypatch.setattr(tiered.opening, "make_plan", make_and_note)
    return plans


@pytest.mark.parametrize("command", ["generate", "batch", "score"])
def test_a_command_makes_one_plan_and_reports_it(store: Path, tmp_path: Path, made: list[Plan], command: str) -> None:
    source = write_lines(tmp_path / "in.jsonl", [request(f"r{number}", max_tokens=3) for number in range(5)])
    text = tmp_path / "text.txt"
    text.write_text("The function returns " * 40, encoding="utf-8")
    words: dict[str, tuple[str | Path, ...]] = {
        "generate": ("-p", "The", "-p", "A function", "-n", "3"),
        "batch": ("-i", source, "-o", tmp_path / "out.jsonl"),
        "score": ("-f", text, "--context", "32"),
    }
    done = run_here(command, store, *words[command], "--ram", "2GiB", "--no-measure", "--json")
    assert done.code == 0, done.err
    (plan,), report = made, json.loads(done.out)["report"]
    assert report["ram_budget_bytes"] == plan.budget == 2 << 30
    assert report["resident_bytes"] == plan.placement.resident_nbytes
    assert report["missing_overlap_bytes"] == plan.missing_overlap_nbytes
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    if command == "score":
        assert json.loads(done.out)["windows_per_pass"] == plan.batch_size


@pytest.mark.slow
def test_what_a_job_says_of_its_batch_size_is_the_plan_s_reason(store: Path, tmp_path: Path, made: list[Plan]) -> None:
    source = write_lines(tmp_path / "in.jsonl", [request(f"r{number}", max_tokens=3) for number in range(5)])
    done = run_here("batch", store, "-i", source, "-o", tmp_path / "out.jsonl", "--no-measure")
    assert done.code == 0, done.err
    (plan,) = made
    assert f"batch     {plan.why}\n" in done.err
    assert plan.why.startswith(f"{plan.batch_size} of 5 sequences at once; predicted per pass: ")
