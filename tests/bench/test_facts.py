"""What is said of a store and a machine comes from `tiered inspect` and `tiered doctor`."""

import json
from pathlib import Path

import pytest

from tests.commands import make_store, run_here
from tiered.bench import facts
from tiered.cli import doctor
from tiered.errors import TieredError


def test_both_understand_what_the_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path, "int4")
    inspected = json.loads(run_here("inspect", store, "--json").out)
    monkeypatch.setattr(facts, "_asked", lambda command, store: inspected)
    found = facts.store_facts(store)
    assert (found.model, found.nbytes) == ("opt-docs-8m int4-g64", inspected["model_bytes"])
    assert found.parameters == inspected["parameters"] and not found.synthetic
    assert "converted weights" in found.line()
    inspected["quantization"] |= {"layers": None, "compress": "planes"}
    assert facts.store_facts(store).model == "opt-docs-8m 16-bit planes"
    monkeypatch.setattr(doctor, "kernel_facts", lambda found: [])  # takes seconds
    examined = json.loads(run_here("doctor", store, "--json").out)
    monkeypatch.setattr(facts, "_asked", lambda command, store: examined)
    machine = facts.machine_facts(store)
    assert machine.name == facts.machine_name() and "Linux" in machine.name
    assert f"read with {examined['disk']['read_mode']}" in machine.disk and "GB/s raw" in machine.disk
    assert "GiB" in machine.memory and "torch" in machine.software


def test_a_command_that_fails_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "TIERED", ("false",))
    with pytest.raises(TieredError, match="'tiered inspect' ended with exit status 1"):
        facts.store_facts(tmp_path)


def test_parameters_are_counted_as_models_are_named() -> None:
    assert [facts.format_count(count) for count in (174_604_000_000, 6_658_000_000, 125_000_000)] == [
        *("175 B", "6.66 B", "125 M"),
    ]
