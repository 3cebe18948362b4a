"""What a run takes, by a closed form: the formula of the design on small numbers, and properties of any prediction."""

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.plan.plans import mixture_of, model_of
from tiered.errors import ConfigError
from tiered.plan import (
    Budgets,
    ComputeRate,
    Computes,
    ExpertShape,
    Machine,
    ModelShape,
    Plan,
    Tier,
    Workload,
    make_plan,
)
from tiered.plan.cost import expert_seconds, pass_seconds, prompt_pairs, store_seconds
from tiered.plan.hardware import GpuRates
from tiered.plan.inputs import QuantizedRates
from tiered.plan.kv import Bits, KVShape, layer_groups
from tiered.plan.load import Alike, PassRun, pass_loads
from tiered.plan.pace import Pace
from tiered.plan.predict import Prediction, Predictor, predict, walk
from tiered.plan.run_cost import Least, RunCosts
from tiered.plan.simulate import simulate
from tiered.plan.state import Grid, StateGroup, StatePart, StateShape
from tiered.units import GIB, MIB

RATE = 1e9
MACHINE = Machine(0, RATE, ComputeRate((1, 1024), (1e-12, 1e-9)), 1e-9, 1e12, RATE)
SHAPE = KVShape(8, 128, 128, "bfloat16")
MODEL = model_of([64 * MIB] * 32, layers=31, head_weights=1000)


def prediction(
    model: ModelShape = MODEL, machine: Machine = MACHINE, ram: int = GIB, batch: int = 1, **work: int
) -> Prediction:
    known = {"sequences": 1, "max_context": 40, "max_prompt": 32, "max_batched_tokens": 4096} | work
    workload = Workload(batch_size=batch, **known)  # type: ignore[arg-type]
    plan = make_plan(model, machine, workload, Budgets(ram, 100 * MIB))
    return predict(plan, model, machine, workload)


def test_a_pass_reads_what_is_not_resident_and_the_first_one_everything() -> None:
    found = prediction()
    resident = found.memory["resident"]
    assert resident > 0
    assert found.prefill.read_nbytes == 2 * GIB
    assert found.decode.passes == 7
    assert found.decode.read_nbytes == 7 * (2 * GIB - resident)
    assert found.prefill.seconds == pytest.approx(2 * GIB / RATE)
    assert found.bottleneck == "disk"


@pytest.mark.parametrize("ratio", [0.3, 0.9, 2.0])
def test_computing_takes_longer_for_what_is_read_meanwhile_and_for_what_is_beside_linear_layers(ratio: float) -> None:
    plain = prediction().decode
    reading, model = plain.disk_seconds / plain.passes, replace(MODEL, operations=500, elements=10_000)
    each = replace(MACHINE, operation_seconds=ratio * reading / 500, element_seconds=0.1 * reading / 10_000)
    slowed = replace(each, reading_seconds=0.2 / RATE)
    assert prediction(model, slowed).decode.seconds / plain.passes == pytest.approx(
        max(reading, plain.compute_seconds / plain.passes + (ratio + 0.1 + 0.2) * reading)
    )
    # Nothing is read any more.
    resident = prediction(model, slowed, ram=8 * GIB).decode
    assert resident.compute_seconds / plain.passes == pytest.approx((ratio + 0.1) * reading, rel=0.01)


def test_experts_take_time_beside_their_products_for_each_that_is_chosen_and_each_of_its_rows() -> None:
    experts = ExpertShape(MODEL.tape, 4, 8, 2, 1000, 1000, 500, operations=10, elements=30)
    machine = replace(MACHINE, operation_seconds=1e-6, element_seconds=1e-9)
    products = replace(experts, operations=0, elements=0)
    beside = expert_seconds(experts, machine, 7) - expert_seconds(products, machine, 7)
    assert beside == pytest.approx(10 * 1e-6 + 7 * 30 * 1e-9)


def test_what_stays_in_memory_is_put_there_at_a_rate_of_its_own() -> None:
    slow = replace(MACHINE, kept_bytes_per_second=RATE / 4)
    kept, all_of_it = prediction().memory["resident"], 2 * GIB
    assert prediction(machine=slow).prefill.seconds == pytest.approx((all_of_it + 3 * kept) / RATE)
    assert prediction(machine=slow).decode == prediction().decode


def test_speed_counts_the_prompts_and_decoding_speed_does_not() -> None:
    found = prediction(batch=4, sequences=4)
    assert found.generated_tokens == 32
    assert found.tokens_per_second == pytest.approx(32 / (found.prefill.seconds + found.decode.seconds))
    assert found.decode_tokens_per_second == pytest.approx(28 / found.decode.seconds)


def test_sequences_beyond_the_batch_run_in_waves() -> None:
    one, two, three = (prediction(batch=4, sequences=count) for count in (4, 8, 10))
    assert two.decode.seconds == pytest.approx(2 * one.decode.seconds)
    # Of the later wave's prompts only the weights that are not resident are read.
    assert two.prefill.read_nbytes < 2 * one.prefill.read_nbytes
    assert three.decode.passes == 3 * one.decode.passes


def test_prompts_beyond_a_pass_take_several_that_read_the_weights_again() -> None:
    once, twice = (prediction(max_prompt=32, max_batched_tokens=most) for most in (32, 16))
    assert (once.prefill.passes, twice.prefill.passes) == (1, 2)
    assert once.prefill.read_nbytes < twice.prefill.read_nbytes < 2 * once.prefill.read_nbytes


@pytest.mark.parametrize("objective", ["throughput", "latency"])
@pytest.mark.parametrize(("sequences", "batch", "prompt", "most"), [(6, 6, 40, 64), (23, 5, 70, 96), (4, 2, 900, 256)])
def test_predicted_passes_are_those_that_are_played(
    objective: Literal["throughput", "latency"], sequences: int, batch: int, prompt: int, most: int
) -> None:
    model = model_of([16 * MIB] * 6, layers=5)
    work = Workload(sequences, prompt + 9, prompt, max_batched_tokens=most, batch_size=batch, objective=objective)
    plan = make_plan(model, MACHINE, work, Budgets(240 * MIB, 100 * MIB))
    found = predict(plan, model, MACHINE, work)
    played = simulate(plan, model, MACHINE, work, passes=10_000).passes
    with_prompts = [each for each in played if each.load.prompt_tokens]
    assert found.prefill.passes == pytest.approx(len(with_prompts), abs=1)
    assert found.decode.passes == pytest.approx(len(played) - len(with_prompts), abs=1)
    assert found.seconds == pytest.approx(sum(each.seconds for each in played), rel=0.1)
    assert sequences + found.prefill.decoded_tokens + found.decode.decoded_tokens == found.generated_tokens


def test_of_many_waves_those_beyond_the_second_are_like_it() -> None:
    work = Workload(64, 79, 70, max_batched_tokens=96, batch_size=5, objective="throughput")
    plan = make_plan(MODEL, MACHINE, work, Budgets(GIB, 100 * MIB))
    found = predict(plan, MODEL, MACHINE, work)
    loads = list(pass_loads(plan, work, Pace()))
    assert found.prefill.passes == pytest.approx(sum(load.prompt_tokens > 0 for load in loads), rel=0.05)
    assert found.prefill.passes + found.decode.passes == pytest.approx(len(loads), rel=0.05)


def test_only_the_last_token_of_a_prompt_goes_through_the_head() -> None:
    all_head = replace(MODEL, head_weights=MODEL.weights)
    assert prediction(all_head).prefill.compute_seconds < prediction(MODEL).prefill.compute_seconds


def test_everything_resident_is_bound_by_memory_and_read_once() -> None:
    found = prediction(ram=8 * GIB)
    assert found.decode.read_nbytes == 0
    assert found.decode.bottleneck == "memory"


def test_a_cache_on_disk_is_read_in_every_pass_and_written_once() -> None:
    workload = Workload(8, 400, 300, max_batched_tokens=4096, batch_size=8)
    plan = make_plan(MODEL, MACHINE, workload, Budgets(GIB, 100 * MIB, kv="disk"))
    found = predict(plan, MODEL, MACHINE, workload)
    assert found.written_nbytes == pytest.approx(8 * 399 * MODEL.kv_token_nbytes, rel=0.01)
    assert found.decode.read_nbytes > found.decode.passes * plan.read_nbytes


@pytest.mark.parametrize("kv", ["cpu", "disk"])
def test_pages_of_few_bits_are_attended_and_filled_at_rates_of_their_own(kv: Any) -> None:
    slow = replace(MACHINE, quantized=(QuantizedRates(4, 1e-6, 1e-4),))
    workload = Workload(8, 400, 300, max_batched_tokens=4096, batch_size=8)
    cases: list[tuple[Bits, int]] = [(16, 0), (8, 0), (4, 1)]
    for bits, times in cases:
        plan = make_plan(MODEL, MACHINE, workload, Budgets(GIB, 100 * MIB, kv=kv, kv_bits=bits))
        found, plain = (predict(plan, MODEL, machine, workload) for machine in (slow, MACHINE))
        layers = sum(len(group.layers) for group in MODEL.groups)
        longer = found.decode.compute_seconds - plain.decode.compute_seconds
        # The page that is being filled is not quantized yet; every token fills a part of one.
        contexts = sum(range(301, 400)) - 99 * 32
        attended, stored = 8 * contexts * layers * (1e-6 - 1e-9), 8 * 99 * layers * 1e-4
        assert longer == pytest.approx(times * (attended + stored), rel=0.001)
        longer = found.prefill.compute_seconds - plain.prefill.compute_seconds
        assert longer == pytest.approx(times * 8 * 4 * 64 * layers * 1e-4)


def test_of_a_prompt_a_layer_with_a_window_stores_no_more_than_that() -> None:
    windowed = replace(MODEL, groups=layer_groups((128,) * 31, SHAPE))
    slow = replace(MACHINE, store_seconds=1e-4)
    whole, part = (store_seconds(model, slow, 10, 1290) for model in (MODEL, windowed))
    assert whole == pytest.approx(20 * 64 * len(MODEL.groups[0].layers) * 1e-4)
    assert part == pytest.approx(3 * 64 * 31 * 1e-4)
    assert store_seconds(windowed, slow, 10, 1290, passes=5) == pytest.approx(5 * part)


def test_what_never_fills_a_page_is_attended_as_it_was_computed() -> None:
    slow = replace(MACHINE, quantized=(QuantizedRates(4, 1e-6, 1e-4),))
    workload = Workload(8, 63, 40, max_batched_tokens=4096, batch_size=8)
    plan = make_plan(MODEL, MACHINE, workload, Budgets(GIB, 100 * MIB, kv_bits=4))
    assert predict(plan, MODEL, slow, workload) == predict(plan, MODEL, MACHINE, workload)


def test_recurrent_states_on_disk_are_read_and_written_in_every_pass() -> None:
    group = StateGroup(tuple(range(16)), (StatePart("recurrent", 0, (1 << 20,), "float32"),))
    model = replace(MODEL, state=StateShape((group,), Grid(64), 0, 0, 0))
    workload = Workload(8, 72, 64, max_batched_tokens=4096, batch_size=8)
    budgets = Budgets(GIB, 100 * MIB, kv="disk")
    plan = make_plan(model, MACHINE, workload, budgets)
    found, without = (
        predict(plan, model, MACHINE, workload),
        predict(replace(plan, cache=replace(plan.cache, state=None)), model, MACHINE, workload),
    )
    states = 8 * group.nbytes * 16
    assert found.written_nbytes - without.written_nbytes == (found.decode.passes + 1) * states
    assert found.decode.read_nbytes - without.decode.read_nbytes == found.decode.passes * states
    each = simulate(plan, model, MACHINE, workload).steady[-1]
    assert each.disk_nbytes == pytest.approx(plan.read_nbytes + 2 * states, rel=0.05)


def test_a_window_bounds_what_is_read_of_a_cache_on_disk() -> None:
    workload = Workload(8, 4400, 4300, max_batched_tokens=64000, batch_size=8)
    whole, windowed = (replace(MODEL, groups=layer_groups([window] * 31, SHAPE)) for window in (0, 128))
    every, few = (
        predict(plan, model, MACHINE, workload).decode.read_nbytes - 99 * plan.read_nbytes
        for model in (whole, windowed)
        for plan in [make_plan(model, MACHINE, workload, Budgets(2 * GIB, 100 * MIB, kv="disk"))]
    )
    assert few == pytest.approx(every * 128 / 4350, rel=0.01)


def test_no_expert_is_read_while_others_than_experts_compute() -> None:
    assert pass_seconds(3.0, 2.0) == 3.0
    assert pass_seconds(3.0, 2.0, expert_read_seconds=2.0) == 4.0
    assert pass_seconds(3.0, 2.0, expert_read_seconds=2.0, expert_compute_seconds=1.0) == 3.0


def test_experts_on_demand_are_read_as_often_as_the_cache_lacks_them() -> None:
    model = mixture_of([MIB] * 9, count=64, chosen=2, nbytes=4 * MIB, layers=8)
    small, large = (prediction(model, ram=ram) for ram in (512 * MIB, GIB))
    assert small.memory["experts"] and large.memory["experts"] > small.memory["experts"]
    assert large.decode.read_nbytes < small.decode.read_nbytes


def test_windows_bound_what_a_prompt_attends_to() -> None:
    model = replace(MODEL, groups=layer_groups((0, 10), SHAPE))
    assert prompt_pairs(model, 100) == 100 * 101 / 2 + 10 * 11 / 2 + 90 * 10


def test_rates_that_are_not_known_are_refused() -> None:
    for machine in (replace(MACHINE, linear=None), replace(MACHINE, disk_bytes_per_second=None)):
        with pytest.raises(ConfigError, match="tiered profile"):
            prediction(machine=machine)


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 200))
def test_more_ram_is_never_slower(doublings: int, batch: int, prompt: int) -> None:
    less, more = (
        prediction(ram=GIB << power, batch=batch, sequences=40, max_prompt=prompt, max_context=prompt + 8)
        for power in (doublings, doublings + 1)
    )
    assert more.seconds <= less.seconds * 1.001
    assert more.read_nbytes <= less.read_nbytes * 1.001


T4 = GpuRates("gpu", 16 * GIB, 0.5e9, 1e9, 1e12, 1e15)


def on_device(decode: Computes = "gpu", gpu: GpuRates = T4, vram: int = GIB, **work: int) -> tuple[Plan, Prediction]:
    """A plan with a GPU, and what it is expected to take."""
    known = {"sequences": 1, "max_context": 40, "max_prompt": 32, "max_batched_tokens": 4096} | work
    workload = Workload(batch_size=1, **known)  # type: ignore[arg-type]
    tiers = (Tier.DISK, Tier.CPU, Tier.GPU)
    budgets = Budgets(GIB, 100 * MIB, tiers, kv="auto", vram=vram, context_nbytes=100 * MIB, decode_device=decode)
    plan = make_plan(MODEL, MACHINE, workload, budgets)
    return plan, predict(plan, MODEL, MACHINE, workload, gpu)


def test_plans_that_are_compared_are_predicted_as_each_by_itself() -> None:
    predictor = Predictor(MODEL, MACHINE, T4)
    workload = Workload(6, 300, 200, max_batched_tokens=128, batch_size=6)
    plans = [
        make_plan(MODEL, MACHINE, workload, Budgets(GIB, 100 * MIB, kv=kv, micro_batch=rows))
        for kv in ("cpu", "disk")
        for rows in (16, None)
    ]
    plans += [on_device(decode)[0] for decode in ("gpu", "cpu")]
    alone = [predict(plan, MODEL, MACHINE, workload, T4) for plan in plans]
    assert [predictor.predict(plan, workload) for plan in plans] == alone
    assert len({found.seconds for found in alone}) > 3


@pytest.mark.parametrize("sequences", [2, 9, 40])
def test_a_prediction_beyond_what_may_be_taken_is_none_and_others_are_the_same(sequences: int) -> None:
    workload = Workload(sequences, 300, 200, max_batched_tokens=128, batch_size=4)
    plan, predictor = make_plan(MODEL, MACHINE, workload, Budgets(GIB, 100 * MIB)), Predictor(MODEL, MACHINE)
    whole = predict(plan, MODEL, MACHINE, workload)
    assert predictor.predict(plan, workload, whole.seconds * 1.001) == whole
    assert predictor.predict(plan, workload, whole.seconds * 0.999) is None


def walked(alike: Alike, row_seconds: float, read_seconds: float, most_seconds: float) -> float | None:
    """Seconds of all passes, each the longer of reading and of computing its rows; None where it is too long."""

    def phase(run: PassRun, is_first: bool) -> tuple[float, ...]:
        computing = row_seconds * (run.rows + run.prompt_tokens)
        return 1, max(read_seconds, computing), read_seconds, computing, 0, 0, 0, run.rows, 0

    def pace() -> Pace:
        return Pace(lambda rows: row_seconds * rows)

    least = Least(row_seconds, row_seconds, read_seconds / alike.batch_size)
    found = walk(alike, pace, phase, most_seconds, least)
    return None if found is None else found[0].seconds + found[1].seconds


@given(
    *(st.integers(1, 300), st.integers(1, 24), st.integers(1, 90), st.integers(1, 40), st.sampled_from([64, 512])),
    st.sampled_from(["latency", "throughput"]),
    st.sampled_from([1e-4, 0.01, 0.5]),
)
@example(92, 14, 50, 2, 512, "latency", 0.01)
def test_nothing_is_dropped_that_takes_no_more_than_it_may(
    sequences: int, batch: int, prompt: int, generated: int, most: int, objective: Any, row_seconds: float
) -> None:
    alike = Alike(sequences, min(batch, sequences), prompt, prompt + generated, most, objective)
    total = walked(alike, row_seconds, 1.0, math.inf)
    assert total is not None
    assert walked(alike, row_seconds, 1.0, total * (1 + 1e-9)) == total
    assert walked(alike, row_seconds, 1.0, total * 0.99) is None


def test_a_gpu_gets_all_weights_once_and_then_those_that_do_not_stay_there() -> None:
    plan, found = on_device()
    assert plan.device is not None and 0 < plan.bus_nbytes < 2 * GIB
    assert found.prefill.bus_seconds == pytest.approx(2 * GIB / T4.host_to_device)
    assert found.decode.bus_seconds == pytest.approx(7 * plan.bus_nbytes / T4.host_to_device)
    assert found.decode.read_nbytes == 7 * plan.read_nbytes
    assert found.bottleneck == "bus"
    assert found.decode.seconds == pytest.approx(found.decode.bus_seconds)
    assert found.memory["vram_resident"] == plan.device.placement.resident_nbytes == 2 * GIB - plan.bus_nbytes
    assert sum(n for name, n in found.memory.items() if name.startswith("vram")) <= GIB


def test_recurrent_states_of_a_cache_elsewhere_cross_the_bus_in_every_pass() -> None:
    group = StateGroup(tuple(range(16)), (StatePart("recurrent", 0, (1 << 20,), "float32"),))
    model = replace(MODEL, state=StateShape((group,), Grid(64), 0, 0, 0))
    workload = Workload(2, 72, 64, max_batched_tokens=4096, batch_size=2)
    here, there = (
        make_plan(model, MACHINE, workload, Budgets(GIB, 0, tuple(Tier), kv=kv, vram=8 * GIB)) for kv in ("cpu", "gpu")
    )
    seconds = [predict(plan, model, MACHINE, workload, T4).decode.bus_seconds for plan in (here, there)]
    # In, and out beside new keys and values.
    states = 7 * 2 * 16 * group.nbytes * (1 / T4.host_to_device + 1 / T4.device_to_host)
    tokens = 7 * 2 * MODEL.kv_token_nbytes / T4.device_to_host
    weights = 7 * (here.bus_nbytes - there.bus_nbytes) / T4.host_to_device
    assert seconds[0] - seconds[1] == pytest.approx(states + tokens + weights)


def test_prompts_on_the_gpu_leave_it_no_weights_and_decoding_needs_no_bus() -> None:
    plan, found = on_device("cpu")
    assert found.memory["vram_resident"] == 0 and plan.bus_nbytes == 2 * GIB
    assert found.prefill.bus_seconds > 2 * GIB / T4.host_to_device  # and keys and values come back
    assert found.decode.bus_seconds == 0
    assert found.decode.compute_seconds == pytest.approx(prediction().decode.compute_seconds)


def test_all_parts_of_a_prompt_attend_where_prompts_are_computed() -> None:
    """Also those of later passes, wherever the cache is: how fast the processor attends says nothing of them."""
    plan, _ = on_device("cpu")
    assert not plan.cache.on_device
    part = PassRun(1, 0, 0, (range(512, 1024),), 512, 0, False, 0, ())
    slow, fast = (
        RunCosts(plan, MODEL, replace(MACHINE, prompt_attention_flops=flops), T4).computing(part)
        for flops in (1e6, 1e15)
    )
    assert slow == fast


def test_copying_and_computing_take_turns_where_there_is_no_room_to_copy_ahead() -> None:
    slow = replace(T4, flops=1e10)
    roomy, found = on_device("cpu", slow)
    tight, in_turns = on_device("cpu", slow, vram=_least_vram("cpu"))
    assert not roomy.missing_copy_overlap_nbytes and tight.missing_copy_overlap_nbytes
    assert in_turns.prefill.seconds >= in_turns.prefill.bus_seconds + in_turns.prefill.compute_seconds
    assert found.prefill.seconds < in_turns.prefill.seconds


def _least_vram(decode: Computes) -> int:
    """A budget in which the device's ring holds one unit and not two."""
    plan, _ = on_device(decode)
    assert plan.device is not None
    return plan.device.needs.total + 100 * MIB


def test_a_plan_with_a_device_needs_the_rates_of_a_gpu() -> None:
    plan, _ = on_device()
    with pytest.raises(ConfigError, match="GPU's rates"):
        predict(plan, MODEL, MACHINE, Workload(1, 40, 32))
