"""What commands plan with before a run has been opened."""

from pathlib import Path
from typing import Any

import pytest

from tests.commands import SLOW_TOKENS, make_store
from tiered.cli.measuring import with_chosen_phases
from tiered.errors import ConfigError
from tiered.kernels import load_library
from tiered.options import Options
from tiered.plan import Machine, Tier, Workload
from tiered.store import Store
from tiered.units import GIB


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_phases_are_chosen_with_what_the_kernels_of_the_run_take(
    kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Machine] = []

    def choose(budgets: Any, shape: Any, machine: Machine, *_: Any) -> None:
        asked.append(machine)
        raise ConfigError("enough seen")

    monkeypatch.setattr("tiered.cli.measuring.choose_phases", choose)
    monkeypatch.setattr("tiered.cli.measuring.find_profile", lambda folder: SLOW_TOKENS)
    options = Options(tiers=tuple(Tier), device="emulated", vram=GIB, threads=1, kernels=kernels)
    store = Store.open(make_store(tmp_path, "int4"))
    assert with_chosen_phases(options, store, lambda: Workload(1, 64, 32), None) == options
    has_library = not isinstance(load_library(), str)
    assert [machine.native_steps for machine in asked] == [kernels == "auto" and has_library]
    assert asked[0].linear is not None
