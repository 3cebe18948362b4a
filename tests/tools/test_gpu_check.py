"""The check on a device ends in time, and can fail."""

from pathlib import Path
from typing import Any

import pytest

from tests.commands import make_store
from tools.gpu_check import PARTS, SECONDS, function_of
from tools.gpu_runs import is_bound, short_vram


def test_all_parts_end_within_ten_minutes_whatever_hangs() -> None:
    assert SECONDS.keys() == PARTS.keys() and sum(SECONDS.values()) <= 570


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_a_function_of_its_name(name: str) -> None:
    assert function_of(name).__name__ == name


def test_a_budget_is_found_with_which_hidden_states_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.gpu_runs.WAITING", (3, 8000, 4))  # the store's states are small
    assert short_vram(make_store(tmp_path), "emulated") is not None


def report(**changes: Any) -> dict[str, Any]:
    device = {"vram_peak_bytes": changes.pop("peak", 3), "vram_budget_bytes": 4}
    return {"bottleneck": "bus", "bound_share": 0.95, "device": device} | changes


def test_a_run_that_is_bound_by_what_was_said_passes() -> None:
    assert is_bound("bus", report())


@pytest.mark.parametrize(
    "changes",
    [{"bottleneck": "compute"}, {"bottleneck": None}, {"bound_share": 0.8}, {"bound_share": None}, {"peak": 5}],
)
def test_a_run_that_is_bound_by_something_else_or_slow_or_over_its_budget_fails(changes: dict[str, Any]) -> None:
    assert not is_bound("bus", report(**changes))
