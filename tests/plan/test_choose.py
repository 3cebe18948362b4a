"""The best way to run, by the seconds of the whole job: on hand-made machines; runs choose as tables do."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final

import pytest

from tests.plan.plans import model_of
from tests.plan.test_strategies import GPU_MACHINE, MACHINE, ask
from tests.quick import represented
from tiered.configs_path import config_dir
from tiered.errors import BudgetError
from tiered.plan import Budgets, ComputeRate, Machine, ModelShape, Plan, Workload, make_plan
from tiered.plan import choose as choosing
from tiered.plan.bound import least_seconds
from tiered.plan.choose import Option, best, share_that_counts
from tiered.plan.hardware import AttendedRate, GpuRates
from tiered.plan.inputs import QuantizedRates
from tiered.plan.machines import load_hardware
from tiered.plan.predict import Phase, Prediction, Predictor, predict
from tiered.plan.shapes import known_shapes
from tiered.plan.strategies import BASELINE_NBYTES, CPU, GPU_TIERS, compare, machine_for
from tiered.plan.way import Asked
from tiered.units import GIB, MIB

DISK = 2e9
MODEL = model_of([100 * MIB] * 20)
"""Two billion bytes in 4 bits; a token of it has 8 KiB of keys and values."""
JOB = Workload(64, 256, 16, choose_batch_size=True, max_batched_tokens=4096, objective="throughput")


def machine(*seconds: float, rows: tuple[int, ...] = (1, 16, 256), attention: float = 1e-9) -> Machine:
    """One that computes a pass over so many rows in so many seconds."""
    rate = ComputeRate(rows, tuple(each / MODEL.weights for each in seconds))
    return Machine(16 * MIB, DISK, rate, attention)


QUICK = machine(0.01, 0.01, 0.01)


def planned(ram: int, machine: Machine = QUICK, workload: Workload = JOB, **fields: Any) -> Plan:
    return make_plan(MODEL, machine, workload, Budgets(ram, 300 * MIB, **fields))


def test_while_the_disk_is_the_bound_all_sequences_share_a_pass() -> None:
    assert planned(1200 * MIB).batch_size == 64


def test_a_batch_is_no_larger_than_what_computing_gains_from() -> None:
    # Beyond 8 rows a pass takes proportionally longer, and longer than the disk.
    slow = machine(1.5, 1.5, 48.0, rows=(1, 8, 256))
    assert planned(1200 * MIB, slow).batch_size == 8


def test_a_cache_that_takes_the_room_of_weights_is_weighed_against_them() -> None:
    # All weights and some sequences fit. With more, passes read.
    long, slow = replace(JOB, max_context=1024, max_prompt=16), machine(0.2, 0.8, 12.8)
    model, budgets = replace(MODEL, groups=model_of(layers=40).groups), Budgets(3600 * MIB, 300 * MIB)
    found = make_plan(model, slow, long, budgets)
    seconds = seconds_of(model, slow, long, budgets, range(1, 65))
    assert seconds[found.batch_size] <= 1.1 * min(seconds.values()) and max(seconds) > found.batch_size > 1


def test_of_equal_places_memory_is_taken_before_disk() -> None:
    assert not planned(8 * GIB, kv="auto").cache.on_disk


def test_a_cache_on_disk_is_used_where_memory_holds_too_few_sequences() -> None:
    long = replace(JOB, max_context=4096)
    found = planned(700 * MIB, workload=long, kv="auto")
    assert found.cache.on_disk and found.batch_size == 64
    assert planned(700 * MIB, workload=long, kv="cpu").batch_size < 64


def test_prompts_count() -> None:
    # While a wave's prompts are computed the disk waits: which passes that decode are the quickest is not all.
    job = Workload(100, 258, 256, choose_batch_size=True, max_batched_tokens=12800, objective="throughput")
    slow, budgets = machine(0.01, 0.01, 0.01, 8.0, rows=(1, 16, 256, 12800)), Budgets(1500 * MIB, 300 * MIB)
    seconds = seconds_of(MODEL, slow, job, budgets, range(1, 101))
    assert seconds[make_plan(MODEL, slow, job, budgets).batch_size] <= 1.02 * min(seconds.values())


def seconds_of(
    model: ModelShape, machine: Machine, workload: Workload, budgets: Budgets, counts: Iterable[int]
) -> dict[int, float]:
    """What so many sequences at once are predicted to take, of those that fit."""
    found = {}
    for count in counts:
        with contextlib.suppress(BudgetError):
            plan = make_plan(model, machine, replace(workload, batch_size=count), budgets)
            found[count] = predict(plan, model, machine, workload).seconds
    return found


@pytest.mark.parametrize(
    ("name", "shape", "ram"),
    [("epyc-7742", "opt-1.3b", 1300), ("epyc-7742", "opt-6.7b", 1500), ("laptop-16gb", "opt-1.3b", 1000)],
)
def test_a_last_wave_that_is_nearly_empty_counts_as_a_whole_one(name: str, shape: str, ram: int) -> None:
    # docs/benchmarks/planner.md: 96 of 100 leave four for a wave that takes as long as the first.
    shapes, hardware = known_shapes(config_dir() / "models", shape), load_hardware(name)
    assert shapes is not None
    model = shapes["int4"]
    job = Workload(100, 24, 8, choose_batch_size=True, max_batched_tokens=4096, objective="throughput")
    known, budgets = machine_for(model, hardware), Budgets(ram * MIB, BASELINE_NBYTES, kv="auto")
    plan = make_plan(model, known, job, budgets)
    seconds = seconds_of(model, known, job, budgets, range(1, 101))
    assert seconds[plan.batch_size] <= 1.02 * min(seconds.values())


SLOW_TO_TAKE: Final = replace(QUICK, kept_bytes_per_second=DISK / 8, touch_bytes_per_second=DISK / 7)
"""A weight that stays takes eight times as long to read for the first time, as memory must be found for it."""
TEXT: Final = Workload(4, 8, 4, max_batched_tokens=4096, is_whole=True)


def test_in_a_job_of_few_passes_less_stays_in_memory_than_has_room() -> None:
    # A unit that stays costs seven reads more in the first pass, and spares one in each of the others.
    def held(passes: int, **fields: Any) -> int:
        job = replace(TEXT, max_context=4 + passes)
        return planned(1500 * MIB, SLOW_TO_TAKE, job, **fields).placement.resident_nbytes

    found = planned(1500 * MIB, SLOW_TO_TAKE, replace(TEXT, max_context=8))
    # A bound is still what the budget allows.
    assert found.holds_less and found.bound_resident_nbytes > 500 * MIB and not found.placement.is_wished
    assert held(4) == 0 and held(16) == planned(1500 * MIB, workload=TEXT).placement.resident_nbytes > 500 * MIB
    assert held(4, resident_cpu=400 * MIB) == 400 * MIB


def test_what_later_runs_may_use_stays_in_memory() -> None:
    open_for_more = replace(TEXT, is_whole=False)
    assert planned(1500 * MIB, SLOW_TO_TAKE, open_for_more).placement.resident_nbytes > 500 * MIB


@pytest.mark.parametrize("ram", [1000, 1500, 2700, 8000])  # little, half, all but the ring, and all of it
@pytest.mark.parametrize("times", [3, 8])
@pytest.mark.parametrize("passes", [2, 3, 6, 9, 12, 30])
@pytest.mark.parametrize("slow", [QUICK, machine(0.4, 0.9, 9.0)], ids=["quick", "slow"])
def test_what_stays_in_memory_makes_the_job_the_quickest(slow: Machine, passes: int, times: int, ram: int) -> None:
    job = replace(TEXT, max_context=4 + passes)
    slow = replace(slow, touch_bytes_per_second=DISK / times)

    def seconds(plan: Plan) -> float:
        return predict(plan, MODEL, slow, job).seconds

    found, asked = seconds(planned(ram * MIB, slow, job)), []
    for size in range(0, 2400, 100):
        with contextlib.suppress(BudgetError):
            asked.append(seconds(planned(ram * MIB, slow, job, resident_cpu=size * MIB)))
    assert len(asked) > 3 and found <= 1.12 * min(asked)


def test_experts_do_not_take_the_memory_that_stays_free() -> None:
    shapes = known_shapes(config_dir() / "models", "qwen3-30b-a3b")
    assert shapes is not None
    known = replace(machine_for(shapes["int4"], MACHINE), touch_bytes_per_second=DISK / 8)
    for ram in (3, 6, 14, 30):
        plan = make_plan(shapes["int4"], known, TEXT, Budgets(ram * GIB, BASELINE_NBYTES))
        assert plan.experts is None or not plan.holds_less


def test_the_reason_says_that_less_stays_than_has_room() -> None:
    assert "0 B of weights stay in memory: for so few passes" in planned(1500 * MIB, SLOW_TO_TAKE, TEXT).why


def test_sequences_of_different_lengths_make_no_waves() -> None:
    # 16 fit. Of 20 that are equally long 10 at once take two waves, too; where lengths differ more at once end sooner.
    alike = Workload(20, 1024, 8, choose_batch_size=True, max_batched_tokens=512, objective="throughput")
    found = [planned(660 * MIB, workload=replace(alike, tokens=n)).batch_size for n in (0, 20 * 950, 20 * 900)]
    assert found == [10, 10, 16]


def test_prompts_of_a_job_are_as_long_as_they_are_on_average() -> None:
    # Any prompt may be as long as the longest sequence, so room is planned for that; then nothing would decode.
    job = Workload(20, 1024, 1024, 20 * 1024, choose_batch_size=True, max_batched_tokens=4096, objective="throughput")
    known = replace(job, prompt_tokens=20 * 8)
    found = [predict(planned(GIB, workload=each), MODEL, QUICK, each) for each in (job, known)]
    assert [each.prompt_tokens for each in found] == [20 * 1024, 20 * 8]
    assert [each.decode.passes > 0 for each in found] == [False, True]


def test_windows_that_are_scored_share_a_pass_where_the_disk_is_the_bound_and_not_where_nothing_is_read() -> None:
    score = Workload(30, 512, 512, choose_batch_size=True, one_pass=True, all_logits=True)
    streams, resident = (planned(ram, machine(0.0005, 0.008, 0.128), score).batch_size for ram in (1500 * MIB, 8 * GIB))
    assert streams > resident


def test_all_seconds_of_scoring_count_as_nothing_is_told_before_its_end() -> None:
    score = Workload(30, 512, 512, choose_batch_size=True, one_pass=True, all_logits=True)
    assert share_that_counts(score, 8) == 1 == share_that_counts(replace(JOB, objective="throughput"), 8)
    assert share_that_counts(replace(JOB, objective="latency"), 8) == 9 / 16


@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize(("ram", "sequences"), [(1, 40), (2, 3), (2, 40), (6, 40)])
def test_a_run_and_a_table_choose_the_same(ram: int, sequences: int, objective: Any) -> None:
    shapes = known_shapes(config_dir() / "models", "opt-6.7b")
    assert shapes is not None
    asked = ask(ram=ram * GIB, sequences=sequences, objective=objective)
    row = compare(shapes.__getitem__, ("int4",), MACHINE, asked).rows[0]
    budgets = Budgets(ram * GIB, BASELINE_NBYTES, kv="auto", choose_kv_bits=True)
    plan = make_plan(shapes["int4"], machine_for(shapes["int4"], MACHINE), asked.workload, budgets)
    assert row.strategy == CPU and row.plan == replace(plan, why="")


def test_bits_are_chosen_by_what_their_attention_takes_too() -> None:
    # In few bits more weights stay in memory.
    job = replace(JOB, sequences=16, max_context=2048)
    slow = replace(QUICK, quantized=tuple(QuantizedRates(bits, 1e-4, 0.0) for bits in (8, 4)))
    quick, found = (planned(2000 * MIB, each, job, kv="cpu", choose_kv_bits=True) for each in (QUICK, slow))
    assert (quick.cache.bits, found.cache.bits) == (4, 16)


def test_fewer_bits_are_taken_where_they_attend_faster_though_all_fits_in_any() -> None:
    job = replace(JOB, sequences=16, max_context=2048)
    slow = replace(QUICK, attention_seconds=1e-5, quantized=(QuantizedRates(4, 1e-6, 0.0),))
    found = planned(8 * GIB, slow, job, kv="cpu", choose_kv_bits=True)
    assert found.cache.bits == 4 and not found.read_nbytes


def option(bits: Any, batch: int, seconds: float) -> Option:
    plan = planned(8 * GIB, workload=replace(JOB, batch_size=batch), kv_bits=bits)
    prediction = Prediction(1, 1, Phase(), Phase(1, seconds), {})
    return Option(plan, prediction, seconds, is_resident=False)


def test_bits_and_few_sequences_together_cost_no_more_than_bits_may() -> None:
    few = [option(4, 8, 100.0), option(16, 8, 109.0), option(16, 6, 110.5)]
    assert best(few) is few[1]
    few[2] = option(16, 6, 109.9)
    assert best(few) is few[2]


@dataclass(frozen=True)
class Job:
    """A workload and the memory it gets, in GiB."""

    sequences: int
    prompt: int
    ram: int


WIDE, MANY, LONG = Job(40, 512, 2), Job(100, 32, 6), Job(7, 2000, 6)
PRODUCT: Final = list(product(("opt-6.7b", "qwen3-30b-a3b"), (0, 4), ("latency", "throughput"), (WIDE, MANY, LONG)))
# Every model with every VRAM and objective, and each of these with every job.
DROPPED: Final[list[tuple[str, int, str, Job]]] = [
    *(("opt-6.7b", 0, "latency", WIDE), ("opt-6.7b", 4, "throughput", WIDE)),
    *(("qwen3-30b-a3b", 0, "throughput", WIDE), ("qwen3-30b-a3b", 4, "latency", WIDE)),
    *(("opt-6.7b", 0, "throughput", MANY), ("opt-6.7b", 4, "latency", MANY)),
    *(("qwen3-30b-a3b", 0, "latency", MANY), ("qwen3-30b-a3b", 4, "throughput", MANY)),
    *(("opt-6.7b", 0, "latency", LONG), ("qwen3-30b-a3b", 4, "throughput", LONG)),
]


@pytest.mark.parametrize(("name", "vram", "objective", "job"), represented(PRODUCT, DROPPED))
def test_what_cannot_be_chosen_is_dropped_early_and_that_changes_nothing(
    name: str, vram: int, objective: Any, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = known_shapes(config_dir() / "models", name)
    assert shapes is not None
    hardware = GPU_MACHINE if vram else MACHINE
    # Fewer bits are not only smaller, but attended over twice as fast.
    half = ComputeRate((1, 64), (0.5 / hardware.cpu.attention,) * 2)
    cpu = replace(hardware.cpu, touch=hardware.disk.read / 6, attended=(AttendedRate(4, half), AttendedRate(8, half)))
    hardware = replace(hardware, cpu=cpu)
    memory = {"vram": vram * GIB or None, "ram": job.ram * GIB}
    asked = ask(sequences=job.sequences, prompt=job.prompt, objective=objective, **memory)
    found = compare(shapes.__getitem__, ("int4", "int8"), hardware, asked)
    for name in ("_CHOOSABLE", "_DISPLACES"):
        monkeypatch.setattr(choosing, name, float("inf"))
    assert compare(shapes.__getitem__, ("int4", "int8"), hardware, asked) == found


MODELS: Final = (("opt-6.7b", 2), ("opt-6.7b", 8), ("qwen3-30b-a3b", 6), ("gemma-4-e2b", 3))
BOUNDED: Final = [
    (*model, *rest) for model in MODELS for rest in product(("cpu", "gpu", None), ("latency", "throughput"))
]


# Every fifth has every model, device and objective.
@pytest.mark.parametrize(("name", "ram", "decode", "objective"), represented(BOUNDED, BOUNDED[::5]))
def test_no_plan_takes_less_than_the_bound(name: str, ram: int, decode: Any, objective: Any) -> None:
    shapes = known_shapes(config_dir() / "models", name)
    assert shapes is not None
    model, gpu = shapes["int4"], GPU_MACHINE.gpu
    hardware = replace(GPU_MACHINE, disk=replace(MACHINE.disk, kept=1e9, random=((1 << 20, 1e9), (1 << 24, 3e9))))
    known = replace(machine_for(model, hardware), operation_seconds=1e-6, element_seconds=1e-12, reading_seconds=1e-10)
    assert known.attention_seconds
    known = replace(known, quantized=(QuantizedRates(4, known.attention_seconds / 2, 1e-6),))
    budgets = Budgets(ram * GIB, BASELINE_NBYTES, kv="auto")
    if decode is not None:
        budgets = replace(budgets, tiers=GPU_TIERS, vram=2 * GIB, context_nbytes=GIB // 2, decode_device=decode)
    shares = []
    for sequences, prompt, generate in ((1, 100, 1), (24, 512, 32), (100, 8, 200), (12, 3000, 4)):
        for one_pass in (False, True):
            work = replace(JOB, sequences=sequences, max_context=prompt + generate, max_prompt=prompt)
            work = replace(work, objective=objective, one_pass=one_pass)
            asked, predictor = Asked(model, known, work, budgets), Predictor(model, known, gpu)
            for way in [way for bits in (16, 4) for n in (1, 3, 12, 24) for way in asked.with_bits(bits).ways(n)]:
                with contextlib.suppress(BudgetError):
                    found = predictor.predict(way.plan_at(budgets.ram), work)
                    assert found is not None
                    shares.append(least_seconds(way, work, gpu) / found.seconds)
    # None above, and it is no bound that says nothing.
    assert max(shares) <= 1 and sum(shares) / len(shares) > 0.25


def test_a_batch_is_chosen_by_what_crosses_the_bus_too() -> None:
    job = Workload(64, 256, 16, max_batched_tokens=64, choose_batch_size=True, objective="throughput")
    budgets = Budgets(8 * GIB, 300 * MIB, GPU_TIERS, kv="auto", vram=GIB, resident_gpu=0)
    slow, fast = (
        make_plan(MODEL, QUICK, job, budgets, GpuRates("gpu", 16 * GIB, rate, rate, 300e9, 2e11))
        for rate in (1e9, 1e12)
    )
    assert slow.batch_size > fast.batch_size
    assert "of copying and " in slow.why
