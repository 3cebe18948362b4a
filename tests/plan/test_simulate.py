"""The simulation agrees with the closed form where that applies, and shows what it leaves out: rings below full,
prompts, caches on disk, experts, a device behind a bus."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from tests.plan.plans import mixture_of, model_of, tape_of
from tiered.errors import ConfigError
from tiered.plan import (
    Budgets,
    ComputeRate,
    KVShape,
    Machine,
    ModelShape,
    Placement,
    Plan,
    Tier,
    Workload,
    layer_groups,
    make_plan,
)
from tiered.plan.hardware import GpuRates
from tiered.plan.inputs import QuantizedRates
from tiered.plan.lanes import Event
from tiered.plan.make import smallest_vram
from tiered.plan.pace import Pace
from tiered.plan.play_seat import Device
from tiered.plan.predict import predict
from tiered.plan.simulate import Simulation, simulate
from tiered.plan.state import Grid, StateGroup, StatePart, StateShape
from tiered.units import GIB, MIB

UNIT = 16 * MIB
DISK = 2e9


def model_with(layers: int = 24, units: int = 4, **fields: Any) -> ModelShape:
    """Layers of equal units, and a head of one."""
    counts = [*[units] * layers, 1]
    tape = tape_of([UNIT] * sum(counts), counts=counts)
    return model_of(tape=tape, weights=2 * tape.total, head_weights=2 * UNIT, layers=layers, **fields)


def machine_with(compute_seconds: float, model: ModelShape, attention_seconds: float = 0.0) -> Machine:
    """One that computes a pass of one row, or a few, in so many seconds."""
    each = compute_seconds / model.weights
    return Machine(MIB, DISK, ComputeRate((1, 16, 1024), (each, each, 64 * each)), attention_seconds)


def plan_with(model: ModelShape, machine: Machine, workload: Workload, share: float, **budgets: Any) -> Plan:
    """The plan that has memory for about this share of the tape."""
    needs = make_plan(model, machine, workload, Budgets(64 * GIB, 0, **budgets)).needs.total
    return make_plan(model, machine, workload, Budgets(needs + int(share * model.tape.total), 0, **budgets))


def lane(simulation: Simulation, name: str) -> list[Event]:
    return [event for event in simulation.events if event.lane == name]


ONE = Workload(1, 128, 64, max_batched_tokens=4096)
SHARES = pytest.mark.parametrize("share", [0.15, 0.3, 0.5, 0.8])


@pytest.mark.parametrize("units", [1, 4])
@SHARES
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8, 1.25, 2.0])
def test_a_full_ring_takes_the_longer_of_reading_and_computing(units: int, share: float, ratio: float) -> None:
    model = model_with(units=units)
    plan = plan_with(model, machine_with(1.0, model), ONE, share)
    assert not plan.missing_overlap_nbytes and plan.read_nbytes
    reading = plan.read_nbytes / DISK
    found = simulate(plan, model, machine_with(ratio * reading, model), ONE)
    for each in found.steady:
        assert each.seconds == pytest.approx(max(reading, ratio * reading), rel=0.03)
        assert each.disk_nbytes == pytest.approx(plan.read_nbytes, rel=0.02)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.5])
def test_computing_is_slower_while_others_read(ratio: float) -> None:
    model = model_with()
    plan = plan_with(model, machine_with(1.0, model), ONE, 0.3)
    reading = plan.read_nbytes / DISK
    machine = replace(machine_with(ratio * reading, model), reading_seconds=0.2 / DISK)
    each = simulate(with_ring(plan, 8 * UNIT), model, machine, ONE).steady[-1]
    assert each.seconds == pytest.approx(max(reading, (ratio + 0.2) * reading), rel=0.03)
    decode = predict(plan, model, machine, ONE).decode
    assert each.seconds == pytest.approx(decode.seconds / decode.passes, rel=0.03)
    assert each.compute_seconds == pytest.approx(decode.compute_seconds / decode.passes, rel=0.03)


def test_a_first_pass_reads_what_stays_at_a_rate_of_its_own_and_layers_take_time_of_their_own() -> None:
    model = replace(model_with(), operations=24)
    machine = replace(machine_with(0.1, model), kept_bytes_per_second=DISK / 4, operation_seconds=1e-3)
    first, *others = simulate(plan_with(model, machine, ONE, 1.01), model, machine, ONE).passes
    assert first.seconds == pytest.approx(4 * model.tape.total / DISK, rel=0.05)
    assert others[0].seconds == pytest.approx(0.1 + 24e-3)


@SHARES
def test_balanced_reading_and_computing_want_more_than_two_units(share: float) -> None:
    # Resident units come in no exact rhythm, and a ring of two units evens nothing out: up to a tenth is lost.
    model = model_with()
    plan = plan_with(model, machine_with(1.0, model), ONE, share)
    reading = plan.read_nbytes / DISK
    machine = machine_with(reading, model)
    tight = simulate(plan, model, machine, ONE).steady[-1].seconds
    wide = simulate(with_ring(plan, 8 * UNIT), model, machine, ONE).steady[-1].seconds
    assert reading <= tight * 1.001 and tight <= 1.12 * reading
    assert wide == pytest.approx(reading, rel=0.02)


def test_in_a_ring_of_one_unit_reading_and_computing_take_turns() -> None:
    model = model_with()
    plan = replace(plan_with(model, machine_with(1.0, model), ONE, 0.3), placement=Placement(frozenset(), 0, UNIT))
    assert plan.missing_overlap_nbytes
    found = simulate(plan, model, machine_with(0.7, model), ONE)
    assert found.steady[-1].seconds == pytest.approx(plan.read_nbytes / DISK + 0.7, rel=0.01)


def test_where_all_is_resident_only_the_first_pass_reads() -> None:
    model = model_with()
    machine = machine_with(0.1, model)
    first, *others = simulate(plan_with(model, machine, ONE, 1.01), model, machine, ONE).passes
    assert first.seconds == pytest.approx(model.tape.total / DISK, rel=0.05)
    assert {each.disk_nbytes for each in others} == {0}
    assert others[0].seconds == pytest.approx(0.1)


def test_units_are_read_in_order_and_computed_in_order_after_they_have_come() -> None:
    model = model_with()
    machine = machine_with(1.0, model)
    found = simulate(plan_with(model, machine, ONE, 0.3), model, machine, ONE, passes=2)
    reads, computed = lane(found, "disk"), lane(found, "compute")
    names = [event.name for event in reads]
    assert names[: len(model.tape.nbytes)] == names_of(model) and len(names) > len(model.tape.nbytes)
    assert [event.name for event in computed] == names_of(model) * 2
    for before, after in pairwise(reads):
        assert before.start + before.seconds <= after.start + 1e-9
    ends = {event.name: event.start + event.seconds for event in reads[: len(model.tape.nbytes)]}
    assert all(event.start >= ends[event.name] - 1e-9 for event in computed[: len(model.tape.nbytes)])


def test_a_long_prompt_goes_through_each_layer_in_micro_batches_and_takes_so_many_passes() -> None:
    work = Workload(1, 1000, 900, max_batched_tokens=600)
    model = model_with(layers=4)
    machine = machine_with(0.1, model)
    plan = plan_with(model, machine, work, 0.9, micro_batch=100)
    assert plan.held.layers
    found = simulate(plan, model, machine, work)
    assert [each.load.tokens for each in found.passes] == [600, 300, 1, 1, 1]
    first = [event for event in lane(found, "compute") if event.start < found.passes[1].start]
    layer = [event.name for event in first if event.name.startswith("layer-000")]
    more = -(-600 // plan.micro_batch_rows) - 1
    assert more and layer == [*(f"layer-000/{unit}" for unit in range(4)), *["layer-000"] * more]
    assert found.passes[0].load.logits == 0 and found.passes[1].load.logits == 1


@pytest.mark.parametrize("has_device", [False, True])
def test_a_head_that_a_pass_does_not_need_is_passed_by(has_device: bool) -> None:
    # The ring holds two units, so most of the head has not been read when computing passes it by.
    work = Workload(1, 1000, 900, max_batched_tokens=300)
    counts = [2] * 4 + [6]
    model = model_of(tape=tape_of([UNIT] * sum(counts), counts=counts), weights=28 * UNIT, layers=4)
    machine = machine_with(0.1, model)
    plan = replace(plan_with(model, machine, work, 0.9), placement=Placement(frozenset(), 0, 2 * UNIT))
    gpu = Device(GpuRates("T4", 16 * GIB, 8e9, 8e9, 300e9, 50e12), frozenset(), 2 * UNIT)
    if has_device:
        plan = replace(plan, prefill_device="gpu", decode_device="gpu")
    found = simulate(plan, model, machine, work, device=gpu if has_device else None)
    assert [each.load.logits for each in found.passes] == [0, 0, 1, 1, 1, 1]
    assert found.passes[0].disk_nbytes < model.tape.total
    assert found.steady[-1].disk_nbytes == pytest.approx(model.tape.total, rel=0.2)


def test_sequences_run_as_many_at_once_as_planned_and_end() -> None:
    work = Workload(3, 12, 8, max_batched_tokens=4096, batch_size=2, objective="throughput")
    model = model_with(layers=2)
    machine = machine_with(0.1, model)
    found = simulate(plan_with(model, machine, work, 0.9), model, machine, work, passes=100)
    # Four tokens each, the first of them from the prompt's pass.
    assert [(each.load.prompt_tokens, each.load.decoding) for each in found.passes] == [
        *[(16, 0), (0, 2), (0, 2), (0, 2)],
        *[(8, 0), (0, 1), (0, 1), (0, 1)],
    ]
    assert [each.load.is_last for each in found.passes] == [False] * 7 + [True]
    assert found.passes[-1].disk_nbytes < found.passes[-2].disk_nbytes  # nothing is read for a pass that never comes


def test_speed_is_that_of_passes_in_which_no_sequence_has_ended() -> None:
    # 16 prompts of 512 tokens take three passes of 4096, so that the first 8 sequences end before the others.
    work = Workload(16, 516, 512, max_batched_tokens=4096, batch_size=16, objective="throughput")
    model = model_with(layers=2)
    machine = machine_with(0.1, model)
    found = simulate(plan_with(model, machine, work, 0.9), model, machine, work)
    decoding = [each.load.decoding for each in found.passes if not each.load.prompt_tokens]
    assert decoding == [16, 8, 1]
    assert [each.load.decoding for each in found.steady] == [16]


def test_a_cache_on_disk_shares_the_disk() -> None:
    work = Workload(8, 6000, 5990, max_batched_tokens=64000, objective="throughput")
    model = model_with(layers=8)
    # Keys and values of every second layer, half of which are narrower.
    wide, narrow = (group for width in (128, 64) for group in layer_groups((0,), KVShape(8, 128, width, "bfloat16")))
    model = replace(model, groups=(replace(wide, layers=(0, 2)), replace(narrow, layers=(4, 6))))
    machine = machine_with(0.01, model)
    plan = plan_with(model, machine, work, 0.5, kv="disk")
    found = simulate(plan, model, machine, work)
    pages = 8 * (5990 // 64)
    expected = plan.read_nbytes + pages * 2 * sum(map(plan.cache.block_nbytes, plan.cache.groups))
    each = found.steady[-1]
    assert each.disk_nbytes == pytest.approx(expected, rel=0.05)
    assert each.seconds == pytest.approx(expected / DISK, rel=0.1)
    assert dict(each.waits)["kv"] > 0


@pytest.mark.parametrize("kv", ["cpu", "disk"])
def test_pages_of_few_bits_take_what_is_predicted(kv: Any) -> None:
    work, model = Workload(4, 700, 690, max_batched_tokens=64000, objective="throughput"), model_with(layers=8)
    machine = replace(machine_with(0.2, model, 1e-6), quantized=(QuantizedRates(4, 3e-5, 1e-4),))
    plan = plan_with(model, machine, work, 0.9, kv=kv, kv_bits=4)
    first, *_, last = simulate(plan, model, machine, work).passes
    found = predict(plan, model, machine, work)
    assert last.compute_seconds == pytest.approx(found.decode.compute_seconds / found.decode.passes, rel=0.03)
    assert first.compute_seconds == pytest.approx(found.prefill.compute_seconds, rel=0.03)
    exact = replace(machine, quantized=())
    assert last.compute_seconds > 1.2 * simulate(plan, model, exact, work).passes[-1].compute_seconds


def test_experts_are_waited_for_and_the_tape_stands_still() -> None:
    model = mixture_of([UNIT] * 17, 64, 4, 8 * MIB, head_weights=2 * UNIT, layers=16)
    assert model.experts is not None
    machine = replace(machine_with(0.5, model), linear=ComputeRate((1, 1024), (1e-12, 1e-11)))
    needs = plan_with(model, machine, ONE, 1.0).needs.total
    plan = make_plan(model, machine, ONE, Budgets(needs + 2 * GIB, 0))
    assert plan.experts is not None
    found = simulate(plan, model, machine, ONE, passes=12)
    each = found.passes[-1]
    chosen = 16 * 4 * (1 - plan.experts.slots / model.experts.total)
    bound = (plan.read_nbytes + chosen * model.experts.file_nbytes) / DISK
    assert bound * 0.95 <= each.seconds <= 1.1 * (bound + each.compute_seconds)
    assert dict(each.waits)["experts"] > 0
    experts = [(e.start, e.start + e.seconds) for e in lane(found, "disk") if e.kind == "experts"]
    others = [(e.start, e.start + e.seconds) for e in lane(found, "disk") if e.kind != "experts"]
    assert all(b <= c + 1e-9 or d <= a + 1e-9 for a, b in others for c, d in experts)


@pytest.mark.parametrize("bus", [0.5, 8.0])
def test_a_device_takes_its_weights_over_the_bus(bus: float) -> None:
    model = model_with()
    machine = machine_with(0.05, model)
    plan = replace(plan_with(model, machine, ONE, 0.7), prefill_device="gpu", decode_device="gpu")
    device = Device(GpuRates("T4", 16 * GIB, bus * 1e9, bus * 1e9, 300e9, 50e12), frozenset(), 2 * UNIT)
    found = simulate(plan, model, machine, ONE, device=device)
    copying = model.tape.total / (bus * 1e9)
    assert found.steady[-1].seconds == pytest.approx(max(copying, plan.read_nbytes / DISK), rel=0.05)
    assert sum(event.nbytes for event in lane(found, "bus")) >= 3 * model.tape.total


GPU = GpuRates("T4", 16 * GIB, 4e9, 2e9, 300e9, 50e12)


def played_on_gpu(plan: Plan, model: ModelShape, machine: Machine, work: Workload, gpu: GpuRates = GPU) -> Simulation:
    return simulate(plan, model, machine, work, passes=1000, device=Device.of(plan, gpu))


@pytest.mark.parametrize("kv", ["cpu", "disk"])
def test_recurrent_states_cross_the_bus_as_is_predicted(kv: Any) -> None:
    group = StateGroup(tuple(range(0, 24, 2)), (StatePart("recurrent", 0, (1 << 20,), "float32"),))
    model = replace(model_with(), state=StateShape((group,), Grid(64), 0, 0, 0))
    machine = machine_with(0.001, model)
    # Prompts take two passes, and in each several micro-batches.
    work = Workload(3, 264, 256, max_batched_tokens=512, batch_size=3, objective="throughput")
    asked = Budgets(8 * GIB, 0, tuple(Tier), kv=kv, vram=GIB, micro_batch=64)
    plan = make_plan(model, machine, work, asked)
    found, said = played_on_gpu(plan, model, machine, work), predict(plan, model, machine, work, GPU)
    states = [event.nbytes for event in lane(found, "bus") if event.name.startswith("state")]
    passes = [each.load.segments for each in found.passes]
    moved = sum((tokens.start > 0) + 1 for segments in passes for tokens in segments)
    assert sum(states) == moved * len(group.layers) * group.nbytes
    predicted = said.prefill.bus_seconds + said.decode.bus_seconds
    assert sum(each.bus_seconds for each in found.passes) == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("decode", ["cpu", "gpu"])
@pytest.mark.parametrize(("bus", "second"), [(4e9, 598), (4e15, 64)])
def test_prompts_beside_decoding_are_paced_as_is_predicted_where_a_device_computes(
    decode: Any, bus: float, second: int
) -> None:
    # By the processor's rates decoding would take so long that prompts cost next to nothing. They do cost nothing while
    # weights cross a slow bus.
    gpu = replace(GPU, host_to_device=bus)
    model = model_with()
    machine = machine_with(1.0, model)
    work = Workload(4, 320, 300, max_batched_tokens=600, batch_size=4)
    asked = Budgets(8 * GIB, 0, tuple(Tier), kv="cpu", vram=GIB, decode_device=decode)
    plan = make_plan(model, machine, work, asked)
    found, said = played_on_gpu(plan, model, machine, work, gpu), predict(plan, model, machine, work, gpu)
    prompts = [each for each in found.passes if each.load.prompt_tokens]
    assert [each.load.prompt_tokens for each in prompts[:2]] == [600, second]
    assert len(prompts) == said.prefill.passes
    assert sum(each.seconds for each in prompts) == pytest.approx(said.prefill.seconds, rel=0.1)


def test_hidden_states_that_wait_take_their_time_on_the_bus() -> None:
    model = model_with()
    machine = machine_with(0.001, model)
    work = Workload(16, 136, 128, batch_size=16)
    asked = Budgets(8 * GIB, 0, tuple(Tier), kv="cpu", vram=GIB, micro_batch=256)
    plan = make_plan(model, machine, work, replace(asked, vram=smallest_vram(model, machine, work, asked)))
    assert plan.device is not None and plan.device.waiting is not None
    without = replace(plan, device=replace(plan.device, waiting=None))
    found, before = (
        sum(each.bus_seconds for each in played_on_gpu(each_plan, model, machine, work).passes)
        for each_plan in (plan, without)
    )
    assert plan.waiting_nbytes(16 * 128) == 24 * 16 * 128 * model.hidden * model.itemsize
    assert found - before == pytest.approx(plan.waiting_nbytes(16 * 128) / GPU.host_to_device)


def test_without_rates_there_is_no_simulation() -> None:
    model = model_with(layers=1)
    plan = plan_with(model, Machine(MIB), ONE, 1.0)
    for machine in (Machine(MIB), Machine(MIB, disk_bytes_per_second=DISK)):
        with pytest.raises(ConfigError, match="run 'tiered profile'"):
            simulate(plan, model, machine, ONE)


def with_ring(plan: Plan, nbytes: int) -> Plan:
    return replace(plan, placement=replace(plan.placement, ring_nbytes=nbytes))


def names_of(model: ModelShape) -> list[str]:
    layers = len(model.tape.counts) - 1
    return [f"layer-{layer:03}/{unit}" for layer in range(layers) for unit in range(4)] + ["head"]


def hybrid(model: ModelShape, machine: Machine, work: Workload, share: float = 0.5, **fields: Any) -> Plan:
    """Prompts on a device, the rest on the processor, which holds about this share of the tape."""
    asked = Budgets(64 * GIB, 0, tuple(Tier), vram=GIB, decode_device="cpu", **fields)
    needs = make_plan(model, machine, work, asked).needs.total
    ram = needs + int(share * model.tape.total)
    return make_plan(model, machine, work, replace(asked, ram=ram))


@pytest.mark.parametrize("kv", ["cpu", "disk"])
@pytest.mark.parametrize("share", [0.5, 1.01])
@pytest.mark.parametrize("ratio", [0.3, 2.0])
def test_prompts_on_a_device_and_the_rest_on_the_processor_take_what_is_predicted(
    ratio: float, share: float, kv: Any
) -> None:
    model = model_with()
    work = Workload(2, 200, 150, max_batched_tokens=4096, batch_size=2, objective="throughput")
    plan = hybrid(model, machine_with(1.0, model), work, share, kv=kv)
    assert (plan.prefill_device, plan.decode_device) == ("gpu", "cpu")
    machine = machine_with(ratio * model.tape.total / DISK, model)
    found, said = played_on_gpu(plan, model, machine, work), predict(plan, model, machine, work, GPU)
    prompts = [each for each in found.passes if each.load.prompt_tokens]
    assert sum(each.seconds for each in prompts) == pytest.approx(said.prefill.seconds, rel=0.07)
    assert said.decode.passes and sum(each.gpu_seconds for each in found.steady) == 0.0
    assert found.steady[-1].seconds == pytest.approx(said.decode.seconds / said.decode.passes, rel=0.05)
    assert prompts[0].bus_seconds == pytest.approx(said.prefill.bus_seconds, rel=0.02)
    assert not any(each.bus_seconds for each in found.steady)


def test_the_processor_fills_the_pages_of_prompts_that_a_device_computes_as_is_predicted() -> None:
    model = model_with(layers=8)
    work = Workload(2, 1100, 1000, max_batched_tokens=4096, batch_size=2, objective="throughput")
    machine = replace(machine_with(0.01, model), quantized=(QuantizedRates(4, 1e-6, 1e-3),))
    plan = hybrid(model, machine, work, 1.01, kv="cpu", kv_bits=4)
    first, said = played_on_gpu(plan, model, machine, work).passes[0], predict(plan, model, machine, work, GPU)
    filled = 2 * (1000 // 64) * 64 * 8 * 1e-3
    assert first.compute_seconds >= filled > first.gpu_seconds
    assert said.prefill.compute_seconds == pytest.approx(first.compute_seconds, rel=0.05)


def test_a_unit_is_read_once_for_both_and_a_newcomer_s_prompt_is_computed_beside_those_that_decode() -> None:
    model = model_with()
    work = Workload(7, 40, 30, max_batched_tokens=32, batch_size=3, objective="throughput")
    machine = machine_with(0.4, model)
    plan = hybrid(model, machine, work)
    found = played_on_gpu(plan, model, machine, work)
    shared = [each for each in found.passes if each.load.prompt_tokens and each.load.decoding]
    assert len(shared) >= 2
    for each in shared:
        assert each.gpu_seconds > 0 and each.compute_seconds > 0
        assert each.disk_nbytes <= 1.1 * plan.read_nbytes
        stop = each.start + each.seconds
        spans = {
            name: [event for event in lane(found, name) if each.start <= event.start < stop]
            for name in ("gpu", "compute")
        }
        assert {event.name for event in spans["gpu"]} | {"head"} == {event.name for event in spans["compute"]}
        # Inside a layer the device's part is given out first, and the processor does its own beside that.
        first = {name: {e.name: e.start for e in reversed(events)} for name, events in spans.items()}
        assert all(first["gpu"][name] <= first["compute"][name] for name in first["gpu"])
    with_prompts = sum(each.load.prompt_tokens > 0 for each in found.passes)
    assert sum(e.nbytes for e in lane(found, "bus") if e.name == "layer-003/1") == UNIT * with_prompts


def test_the_processor_goes_on_while_the_device_computes_and_waits_for_what_it_keeps() -> None:
    model = replace(model_with(), groups=layer_groups((0,) * 24, KVShape(8, 128, 128, "bfloat16")))
    machine = Machine(MIB, 1e15, ComputeRate((1, 1024), (1e-9, 1e-9)), 0.0)
    work = Workload(7, 40, 30, max_batched_tokens=32, batch_size=3, objective="throughput")
    plan = hybrid(model, machine, work, 1.01)
    alone = model.weights * 1e-9
    for flops in (1e18, 2 * 16 * model.weights / (3 * alone)):
        # Either has the other's time to do its part in, whichever takes longer.
        rates = GpuRates("T4", 16 * GIB, 1e15, 1e15, 1e18, flops)
        found = simulate(plan, model, machine, work, passes=1000, device=Device.of(plan, rates))
        shared = [each for each in found.passes if each.load.prompt_tokens and each.load.decoding]
        assert len(shared) >= 2
        for each in shared:
            on_device = 2 * each.load.prompt_tokens * model.weights / flops
            assert each.seconds == pytest.approx(max(alone, on_device), rel=0.1)
        said = predict(plan, model, machine, work, rates)
        played = sum(each.seconds for each in found.passes)
        assert played == pytest.approx(said.seconds, rel=0.1)


@pytest.mark.parametrize("kv", ["cpu", "disk"])
def test_a_pace_learns_what_takes_longer_of_two_seats_and_all_where_they_take_turns(
    kv: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[float] = []
    monkeypatch.setattr(Pace, "note", lambda pace, rows, prompts, computing, disk: noted.append(computing))
    model = model_with()
    machine = machine_with(0.4, model)
    work = Workload(7, 40, 30, max_batched_tokens=32, batch_size=3, objective="throughput")
    found = played_on_gpu(hybrid(model, machine, work, kv=kv), model, machine, work)
    both = max if kv == "cpu" else lambda *seconds: sum(seconds)
    assert noted == [both(each.compute_seconds, each.gpu_seconds) for each in found.passes]
    assert any(each.compute_seconds and each.gpu_seconds for each in found.passes)


@pytest.mark.parametrize("share", [0.3, 1.01])
def test_a_first_pass_touches_memory_as_is_predicted_and_later_ones_do_not(share: float) -> None:
    model = model_with()
    slow = replace(machine_with(0.05, model), touch_bytes_per_second=DISK / 8)
    plan = plan_with(model, slow, ONE, share)
    ring = min(plan.placement.ring_nbytes, plan.streamed_nbytes)
    assert bool(ring) is (share < 1)
    passes = {known: simulate(plan, model, known, ONE).passes for known in (slow, machine_with(0.05, model))}
    (first, *later), (untouched, *others) = passes.values()
    beside = plan.fresh_nbytes(64) / (DISK / 8)
    took = first.seconds - untouched.seconds
    # The ring is touched before anything is read into it, what stays no slower than it is read, the rest beside that.
    waited = (8 * ring + 7 * plan.placement.resident_nbytes) / DISK
    assert beside > 0 and waited * 0.95 <= took <= waited * 1.05 + beside
    assert [each.seconds for each in later] == pytest.approx([each.seconds for each in others])
    assert first.seconds == pytest.approx(predict(plan, model, slow, ONE).prefill.seconds, rel=0.1)
    assert predict(plan, model, slow, ONE).decode == predict(plan, model, machine_with(0.05, model), ONE).decode


@pytest.mark.parametrize("room", [GIB, 6 * GIB])
def test_a_first_pass_touches_memory_for_the_experts_that_it_reads_as_is_predicted(room: int) -> None:
    model = mixture_of([UNIT] * 17, 64, 4, 8 * MIB, head_weights=2 * UNIT, layers=16)
    known = replace(machine_with(0.05, model), linear=ComputeRate((1, 1024), (1e-12, 1e-11)))
    slow = replace(known, touch_bytes_per_second=DISK / 8)
    plan = make_plan(model, known, ONE, Budgets(plan_with(model, known, ONE, 1.0).needs.total + room, 0))
    assert plan.experts is not None
    (first, *later), (untouched, *others) = (simulate(plan, model, each, ONE).passes for each in (slow, known))
    said, before = (predict(plan, model, each, ONE).prefill.seconds for each in (slow, known))
    slots = plan.experts.nbytes / (DISK / 8)
    # Played, a layer finds its share of what others have read; predicted, a first pass finds nothing.
    assert first.seconds - untouched.seconds == pytest.approx(said - before, rel=0.15) and said - before > 0.9 * slots
    # A slot that the first pass has not needed is touched when it gets its first expert.
    assert -1e-9 < sum(each.seconds for each in later) - sum(each.seconds for each in others) < 0.1 * slots
