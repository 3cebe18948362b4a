"""Phases: what computes prompts and what the rest, by the plans that runs would make."""

from dataclasses import replace

import pytest

from tests.plan.test_strategies import GPU_MACHINE
from tiered.configs_path import config_dir
from tiered.plan.hardware import GpuRates
from tiered.plan.inputs import Budgets, ModelShape, Workload
from tiered.plan.phases import PHASES, Phases, choose_phases
from tiered.plan.shapes import known_shapes
from tiered.plan.strategies import BASELINE_NBYTES, GPU_TIERS, machine_for
from tiered.units import GIB

RATES = GpuRates("gpu", 16 * GIB, 12e9, 12e9, 300e9, 50e12)
SLOW_BUS = replace(RATES, host_to_device=2e9, device_to_host=2e9)
USELESS = GpuRates("gpu", 16 * GIB, 1e7, 1e7, 1e9, 1e9)
ONE = Workload(1, 2048 + 64, 2048, max_batched_tokens=4096)
BATCH = replace(ONE, sequences=16, choose_batch_size=True, objective="throughput")


def model() -> ModelShape:
    shapes = known_shapes(config_dir() / "models", "opt-13b")
    assert shapes is not None
    return shapes["int4"]


def budgets(ram: int, vram: int) -> dict[Phases, Budgets]:
    found: dict[Phases, Budgets] = {("cpu", "cpu"): Budgets(ram, BASELINE_NBYTES, kv="auto")}
    for decode in ("gpu", "cpu"):
        found["gpu", decode] = replace(
            found["cpu", "cpu"], tiers=GPU_TIERS, vram=vram, context_nbytes=GIB // 2, decode_device=decode
        )
    return found


@pytest.mark.parametrize(
    ("ram", "vram", "gpu", "workload", "chosen"),
    [
        (16, 12, RATES, ONE, ("gpu", "gpu")),  # all weights are there
        (16, 2, SLOW_BUS, ONE, ("gpu", "cpu")),  # weights are in memory, and a token is not worth the bus
        (16, 12, USELESS, ONE, ("cpu", "cpu")),
        (16, 1 / 8, RATES, ONE, ("cpu", "cpu")),  # nothing else fits
        (16, 12, RATES, BATCH, ("gpu", "gpu")),
        (16, 2, SLOW_BUS, replace(BATCH, one_pass=True, all_logits=True), ("gpu", "gpu")),  # nothing decodes
    ],
)
def test_the_quickest_is_chosen_and_the_others_are_told(
    ram: int, vram: float, gpu: GpuRates, workload: Workload, chosen: Phases
) -> None:
    machine = machine_for(model(), replace(GPU_MACHINE, gpu=gpu))
    found = choose_phases(budgets(ram * GIB, int(vram * GIB)), model(), machine, workload, gpu)
    assert found is not None and found.computes == chosen
    assert found.why.startswith(f"{PHASES[chosen]}, which is expected to take ")
    told = [name for phases, name in PHASES.items() if not (workload.one_pass and phases == ("gpu", "cpu"))]
    assert all(found.why.count(name) == 1 for name in told) and found.why.count(";") == len(told) - 1
    assert ("does not fit" in found.why) == (vram < 1)


def test_only_what_is_asked_about_is_chosen_and_nothing_where_none_fits() -> None:
    machine = machine_for(model(), GPU_MACHINE)
    every = budgets(16 * GIB, 12 * GIB)
    only = choose_phases({("gpu", "cpu"): every["gpu", "cpu"]}, model(), machine, ONE, RATES)
    assert only is not None and only.computes == ("gpu", "cpu") and ";" not in only.why
    assert choose_phases(budgets(GIB // 2, GIB // 8), model(), machine, ONE, RATES) is None
