"""Strategies: ranked by the whole request, the same for the same numbers, refused with the nearest ask that fits."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.plan.plans import model_of
from tiered.configs_path import config_dir
from tiered.errors import ConfigError
from tiered.kernels import device_scratch_nbytes
from tiered.plan.gpu import SCRATCH_NBYTES
from tiered.plan.hardware import DiskRates, GpuRates, Hardware
from tiered.plan.inputs import Budgets
from tiered.plan.make import make_plan
from tiered.plan.on_device import CONTEXT_NBYTES
from tiered.plan.shapes import known_shapes
from tiered.plan.state import Grid, StateGroup, StatePart, StateShape
from tiered.plan.strategies import (
    BASELINE_NBYTES,
    BOTH,
    CPU,
    GPU,
    GPU_TIERS,
    Ask,
    Comparison,
    compare,
    machine_for,
)
from tiered.units import GIB, MIB, parse_size

MACHINE = Hardware.from_toml(
    """
    name = "machine"
    source = "made up"
    ram = 64e9
    usd_per_hour = 2.0
    [disk]
    read = 2e9
    write = 1e9
    [cpu]
    cores = 8
    memory = 50e9
    flops = 1e12
    """,
    "machine",
)
GPU_MACHINE = replace(MACHINE, gpu=GpuRates("gpu", 16 * GIB, 12e9, 12e9, 300e9, 50e12))


def ask(**fields: object) -> Ask:
    known = {"prompt": 512, "generate": 32, "sequences": 1, "batch": None, "ram": 8 * GIB, "vram": None}
    return Ask(**(known | {"objective": "latency"} | fields))  # type: ignore[arg-type]


def compared(name: str = "opt-6.7b", machine: Hardware = MACHINE, **fields: object) -> Comparison:
    shapes = known_shapes(config_dir() / "models", name)
    assert shapes is not None
    return compare(shapes.__getitem__, ("int4", "int8"), machine, ask(**fields))


def test_rows_are_ranked_by_the_whole_request_with_its_prefill() -> None:
    found = compared(machine=GPU_MACHINE, vram=16 * GIB, sequences=8)
    seconds = [row.prediction.prefill.seconds + row.prediction.decode.seconds for row in found.rows]
    assert seconds == sorted(seconds)
    assert {row.strategy for row in found.rows} == {CPU, GPU, BOTH}


def test_the_same_numbers_give_the_same_rows() -> None:
    assert compared(sequences=16) == compared(sequences=16)


def test_a_gpu_is_used_only_where_there_is_one_and_is_the_best_where_it_is_quickest() -> None:
    assert {row.strategy for row in compared(vram=16 * GIB).rows} == {CPU}
    found = compared(machine=GPU_MACHINE, vram=16 * GIB)
    assert found.best is not None and found.best.strategy == GPU
    slow = replace(GPU_MACHINE, gpu=GpuRates("gpu", 16 * GIB, 1e7, 1e7, 1e9, 1e9))
    found = compared(machine=slow, vram=16 * GIB)
    assert found.best is not None and found.best.strategy == CPU


def test_rows_with_a_gpu_are_the_plans_that_runs_make_for_the_same_options() -> None:
    small: dict[str, int] = {"vram": 4 * GIB, "ram": 8 * GIB, "batch": 4, "sequences": 4}
    shapes = known_shapes(config_dir() / "models", "opt-30b")
    assert shapes is not None
    rows = [row for row in compared("opt-30b", GPU_MACHINE, **small).rows if row.quant == "int4"]
    for row in rows:
        on_gpu = row.strategy != CPU
        budgets = Budgets(small["ram"], BASELINE_NBYTES, kv=row.kv_tier, kv_bits=row.kv_bits)  # type: ignore[arg-type]
        if on_gpu:
            device = {"vram": small["vram"], "context_nbytes": CONTEXT_NBYTES, "tiers": GPU_TIERS}
            decode = "cpu" if row.strategy == BOTH else "gpu"
            budgets = replace(budgets, **device, decode_device=decode)  # type: ignore[arg-type]
        plan = make_plan(
            shapes["int4"], machine_for(shapes["int4"], GPU_MACHINE), ask(**small).workload, budgets, GPU_MACHINE.gpu
        )
        assert replace(plan, why="") == row.plan
        assert ("vram_resident" in row.prediction.memory) == on_gpu
        vram = sum(nbytes for name, nbytes in row.prediction.memory.items() if name.startswith("vram"))
        assert vram <= small["vram"] and sum(row.prediction.memory.values()) - vram <= small["ram"]
    assert {row.strategy for row in rows} == {CPU, GPU, BOTH}


def test_a_row_that_the_bus_bounds_says_so() -> None:
    narrow = replace(GPU_MACHINE, gpu=GpuRates("gpu", 16 * GIB, 1e9, 1e9, 300e9, 50e12))
    slow = replace(narrow, cpu=replace(MACHINE.cpu, attention=1e6, prefill_attention=1e6))
    found = compared("opt-30b", slow, vram=8 * GIB, ram=40 * GIB, generate=64)
    assert found.best is not None and found.best.strategy == GPU and found.best.prediction.bottleneck == "bus"
    assert "bound by the bus to the GPU" in found.why and "of copying" in found.why


def test_kernels_of_a_gpu_take_no_more_than_is_planned_for() -> None:
    assert device_scratch_nbytes() <= SCRATCH_NBYTES


@pytest.mark.parametrize("strategy", [GPU, BOTH])
def test_prompts_that_weights_cross_the_bus_for_are_not_spread_over_many_passes(strategy: str) -> None:
    """More sequences at once than a pass takes prompts of: the others' prompts come while these decode."""
    ram = {"ram": 200 * GIB, "vram": 14 * GIB, "batch": 16, "sequences": 32, "objective": "latency"}
    rows = compared("opt-175b", GPU_MACHINE, prompt=512, generate=32, **ram).rows
    found = next(row.prediction for row in rows if (row.strategy, row.quant) == (strategy, "int4"))
    full = 32 * 512 / 4096
    assert full <= found.prefill.passes <= 4 * full  # passes of 64 tokens would be 193


def test_prompts_on_the_gpu_leave_decoding_as_it_is() -> None:
    found = {(row.strategy, row.quant): row.prediction for row in compared(machine=GPU_MACHINE, vram=16 * GIB).rows}
    both, cpu = found[BOTH, "int4"], found[CPU, "int4"]
    assert both.decode == cpu.decode
    assert both.prefill.compute_seconds < cpu.prefill.compute_seconds


def test_more_vram_is_never_slower() -> None:
    found = [compared("opt-30b", GPU_MACHINE, vram=vram * GIB, ram=24 * GIB, batch=4) for vram in (4, 8, 16, 32)]
    seconds = [next(r.prediction.seconds for r in one.rows if (r.strategy, r.quant) == (GPU, "int4")) for one in found]
    assert seconds == sorted(seconds, reverse=True)


def test_a_cache_that_would_push_weights_out_of_vram_lies_elsewhere() -> None:
    # 5.6 GB of cache fit in VRAM, but as many weights would cross the bus in every pass.
    found = compared("opt-30b", GPU_MACHINE, vram=16 * GIB, ram=32 * GIB, batch=64, sequences=64, prompt=32)
    row = next(row for row in found.rows if (row.strategy, row.quant) == (GPU, "int4"))
    assert row.kv_tier == "cpu" and row.resident_share == 1


def test_what_fits_nowhere_is_refused_with_the_budget_that_works() -> None:
    found = compared(ram=600 * MIB, batch=16, sequences=16)
    assert not found.rows and found.best is None and found.why == ""
    named = re.search(r"--ram (\d+MiB)", found.refusals[0].message)
    assert named is not None
    again = compared(ram=parse_size(named[1]), batch=16, sequences=16)
    assert any(row.quant == "int4" for row in again.rows)


def test_a_smaller_batch_that_fits_is_named() -> None:
    refusal = compared("opt-30b", ram=3 * GIB, batch=64, sequences=64).refusals[0]
    named = re.search(r"--batch (\d+)", refusal.message)
    assert named is not None
    assert compared("opt-30b", ram=3 * GIB, batch=int(named[1]), sequences=64).rows


def test_what_does_not_fit_a_gpu_names_the_nearest_asks_that_do() -> None:
    small: dict[str, int] = {"vram": 900 * MIB, "ram": 24 * GIB, "batch": 64, "sequences": 64}
    refusals = {one.strategy: one.message for one in compared("opt-30b", GPU_MACHINE, **small).refusals}
    assert refusals.keys() == {GPU, BOTH}
    for strategy, message in refusals.items():
        vram, fewer = re.search(r"--vram (\d+MiB)", message), re.search(r"--batch (\d+)", message)
        assert vram is not None
        for more in ({"vram": parse_size(vram[1])}, *([{"batch": int(fewer[1])}] if fewer else [])):
            again = compared("opt-30b", GPU_MACHINE, **(small | more)).rows
            assert strategy in {row.strategy for row in again}
        less = compared("opt-30b", GPU_MACHINE, **(small | {"vram": parse_size(vram[1]) - MIB}))
        assert strategy not in {row.strategy for row in less.rows if row.quant == "int4"}


def test_all_weights_in_memory_are_a_row_of_their_own() -> None:
    # Eight sequences at once leave no room for all weights, four do; reading the rest costs nothing here.
    fast = replace(MACHINE, disk=DiskRates(20e9, 20e9))
    found = compared(machine=fast, ram=4300 * MIB, sequences=64, prompt=32, generate=64, objective="throughput")
    (resident,) = (row for row in found.rows if row.is_resident)
    (other,) = (row for row in found.rows if not row.is_resident and row.quant == resident.quant)
    assert resident.title == "cpu in RAM" and resident.resident_share == 1
    assert other.batch_size > resident.batch_size and other.prediction.seconds < resident.prediction.seconds


def test_a_batch_is_chosen_for_the_job_and_not_beyond_what_helps() -> None:
    alone = compared(batch=1, sequences=64, ram=2 * GIB, prompt=8).rows[0]
    chosen = compared(sequences=64, ram=2 * GIB, prompt=8, objective="throughput").rows[0]
    assert chosen.batch_size > 1
    assert chosen.prediction.seconds < alone.prediction.seconds


def test_cost_is_that_of_the_hours() -> None:
    row = compared().rows[0]
    assert row.usd_per_million_tokens == pytest.approx(2.0 / 3600 * row.prediction.seconds / 32 * 1e6)
    assert compared(machine=replace(MACHINE, usd_per_hour=None)).rows[0].usd_per_million_tokens is None


def test_the_best_says_what_bounds_it_and_what_the_next_loses() -> None:
    found = compared("opt-30b", ram=4 * GIB, prompt=4)
    assert re.search(r"bound by the disk: .* per pass; cpu int8 takes [12]\.\d+ times as long", found.why)


def test_recurrent_layers_compute_on_a_gpu_too_and_their_states_are_said() -> None:
    group = StateGroup((0,), (StatePart("recurrent", 0, (1 << 10,), "float32"),))
    shape = replace(model_of([64 * MIB] * 3), state=StateShape((group,), Grid(64), 0, 0, 0))
    found = compare(lambda _: shape, ("int4",), GPU_MACHINE, ask(vram=16 * GIB))
    assert {row.strategy for row in found.rows} == {CPU, GPU, BOTH} and not found.refusals
    for row in found.rows:
        assert bool(row.prediction.memory.get("vram_state")) == (row.strategy != CPU)


def test_figures_that_make_no_sense_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="ram -1: expected"):
        ask(ram=-1)
    with pytest.raises(ConfigError, match="batch 0: expected"):
        ask(batch=0)


def test_a_scheme_without_a_speed_is_named(tmp_path: Path) -> None:
    model = model_of([MIB] * 3, quantization="int3-g64")
    with pytest.raises(ConfigError, match="int3-g64"):
        compare(lambda _: model, ("int4",), MACHINE, ask())
