"""The check on a device ends in time, and can fail."""

from typing import Any

import pytest

from tools.gpu_check import PARTS, SECONDS, is_bound


def test_all_parts_end_within_ten_minutes_whatever_hangs() -> None:
    assert SECONDS.keys() == PARTS.keys() and sum(SECONDS.values()) <= 570


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
