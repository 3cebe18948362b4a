"""Plans over three tiers: every unit in one place, every byte within its budget, rings for any pass, and budgets that
are named and then work."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan.plans import CACHE, NOTHING, STREAMING, mixture_of, model_of, plan_of, tape_of
from tests.plan.test_make import MEASURED, MODELS, UNMEASURED, WORKLOADS
from tiered.errors import BudgetError, ConfigError, DeviceBudgetError
from tiered.plan import (
    WAITING_SLOTS,
    Budgets,
    ComputeRate,
    Machine,
    ModelShape,
    Plan,
    Tape,
    Tier,
    Workload,
    make_plan,
    parse_tiers,
)
from tiered.plan.hardware import GpuRates
from tiered.plan.kv import outbox_nbytes
from tiered.plan.make import smallest_ram, smallest_vram
from tiered.plan.on_device import DeviceNeeds, DevicePlan, fit_on_device
from tiered.plan.order import ring_starts
from tiered.plan.placement import UNHELD, Held, Placement, full_ring, interleave, place, smallest_ring, wished
from tiered.plan.predict import predict
from tiered.plan.state import Grid, StateGroup, StatePart, StateShape
from tiered.units import GIB, MIB, PAGE_TOKENS, parse_size

THREE, LOADED, ALONE = (Tier.DISK, Tier.CPU, Tier.GPU), (Tier.CPU, Tier.GPU), (Tier.GPU,)
MACHINES = st.sampled_from([replace(UNMEASURED, device_scratch_nbytes=8 * MIB), MEASURED])
SIZES = st.integers(20, 20_000).map(lambda n: n * MIB)
HELD = st.builds(Held, st.booleans(), st.booleans())
STATE = StateShape(
    (StateGroup((0,), (StatePart("recurrent", 0, (1 << 20,), "float32"),)),), Grid(64), 3 << 10, 8 * MIB, 2 * MIB
)
STATES = st.sampled_from([None, STATE, replace(STATE, grid=Grid(1)), replace(STATE, grid=Grid(0))])
WISHES = st.none() | st.integers(0, 300).map(lambda n: n * MIB)


@st.composite
def budgets(draw: st.DrawFn) -> Budgets:
    """Budgets with a device, whose phases and cache go together."""
    tiers, is_hybrid = draw(st.sampled_from([THREE, LOADED, ALONE])), draw(st.booleans())
    is_hybrid = is_hybrid and tiers != ALONE
    return Budgets(
        draw(SIZES),
        draw(st.integers(0, 400)) * MIB,
        tiers,
        draw(st.sampled_from(["auto", "cpu", "disk", *([] if is_hybrid else ["gpu"])])),
        draw(st.sampled_from([16, 8, 4])),
        micro_batch=draw(st.none() | st.integers(1, 600)),
        vram=draw(SIZES),
        context_nbytes=draw(st.sampled_from([0, 300 * MIB])),
        resident_gpu=None if is_hybrid or tiers == ALONE else draw(WISHES),
        resident_cpu=draw(WISHES) if tiers == THREE else None,
        decode_device="cpu" if is_hybrid else "gpu",
    )


@settings(deadline=None)
@given(MODELS, STATES, MACHINES, WORKLOADS, budgets())
def test_a_plan_is_within_both_budgets_or_refusals_name_those_that_work(
    model: ModelShape, state: StateShape | None, machine: Machine, workload: Workload, asked: Budgets
) -> None:
    model = replace(model, state=state)
    if state is not None:
        asked = replace(asked, micro_batch=None)  # fewer rows than a scan takes are refused
    try:
        plan = make_plan(model, machine, workload, asked)
    except BudgetError as refused:
        plan, asked = named(refused, model, machine, workload, asked)
    check(plan, model, workload, asked)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def named(
    refused: BudgetError, model: ModelShape, machine: Machine, workload: Workload, asked: Budgets
) -> tuple[Plan, Budgets]:
    """The plan that fits after each budget has been raised to what a refusal names: at most once, but for the device's,
    of which more may be wanted when the host has enough for more rows at once."""
    for _ in range(3):
        option = "vram" if isinstance(refused, DeviceBudgetError) else "ram"
        smallest = refused.smallest_bytes
        assert smallest is not None and smallest > getattr(asked, option)
        written = re.search(rf"--{option} (\w+)", str(refused))
        assert written is not None and parse_size(written.group(1)) == -(-smallest // MIB) * MIB
        raised: dict[str, Any] = {option: smallest}
        asked = replace(asked, **raised)
        # What is named is for the shortest context. A longer one computes fewer rows at once, which may take less.
        if option == "vram" and smallest > MIB and not workload.least_context:
            with pytest.raises(BudgetError):
                make_plan(model, machine, workload, replace(asked, vram=smallest - MIB))
        try:
            return make_plan(model, machine, workload, asked), asked
        except BudgetError as error:
            assert option == "vram", error
            refused = error
    raise refused


def check(plan: Plan, model: ModelShape, workload: Workload, asked: Budgets) -> None:
    """Every unit in one place, every byte accounted for, rings that hold what is in them together."""
    device, host, tape = plan.device, plan.placement, plan.tape
    experts = 0
    assert device is not None
    if plan.experts is None:
        assert tape == model.tape
    else:
        assert model.experts is not None and tape == model.experts.dense and Tier.DISK in asked.tiers
        assert device.needs.workspace > 2 * plan.experts.slot_nbytes
        experts = plan.experts.nbytes
    assert plan.nbytes == plan.needs.total + host.nbytes + experts <= plan.budget == asked.ram
    assert device.nbytes == device.needs.total + device.placement.nbytes <= device.vram == asked.vram
    assert (plan.needs.baseline, device.needs.context) == (asked.baseline, asked.context_nbytes)
    assert (plan.prefill_device, plan.decode_device) == ("gpu", asked.decode_device)
    states = 0 if model.state is None else plan.cache.sequences * MIB
    assert bool(device.needs.state) == bool(states) and bool(plan.needs.state) == bool(
        states and not plan.cache.on_device
    )
    assert not plan.cache.on_device or device.needs.state >= states
    on_device = device.placement.resident
    assert not on_device & host.resident
    assert device.placement.resident_nbytes == tape.nbytes_of(on_device)
    assert host.resident_nbytes == tape.nbytes_of(host.resident)
    units = frozenset(range(len(tape.nbytes)))
    assert Tier.DISK in asked.tiers or host.resident == units - on_device
    assert asked.tiers != ALONE or on_device == units
    assert asked.decode_device == "gpu" or not on_device
    for wish, found in ((asked.resident_gpu, device.placement), (asked.resident_cpu, host)):
        assert wish is None or found.resident_nbytes <= wish
    # What stays on the device passes through the host's ring once.
    assert host.ring_nbytes >= max((tape.nbytes[unit] for unit in on_device), default=0)
    assert plan.bus_nbytes == tape.total - device.placement.resident_nbytes
    assert plan.read_nbytes == sum(tape.file_nbytes[unit] for unit in units - on_device - host.resident)
    assert plan.streamed_nbytes == tape.total - device.placement.resident_nbytes - host.resident_nbytes
    check_ring(plan.tape.streamed(plan.held, on_device), device.placement)
    check_ring(plan.host_tape.streamed(plan.host_held, numbers(plan)), host)
    cache = plan.cache
    assert cache.on_device == (asked.kv == "gpu") or asked.kv == "auto"
    assert not (cache.on_device and (cache.on_disk or asked.is_hybrid))
    if cache.on_device:
        assert device.needs.kv >= cache.memory_nbytes and plan.needs.kv == 0
    else:
        # New keys and values of two micro-batches are on their way.
        outbox = outbox_nbytes(model.groups, plan.micro_batch_rows)
        # Prompts attend where they are computed, whatever earlier passes have of them.
        rows, longest = plan.micro_batch_rows, min(workload.max_prompt or plan.max_context, plan.max_context)
        cut = 0 if workload.one_pass else longest
        assert device.needs.kv >= outbox + cache.beginning_nbytes(rows, rows, cut)
        assert plan.needs.kv >= cache.memory_nbytes + outbox
    assert plan.held.layers or plan.max_batched_tokens <= plan.micro_batch_rows
    assert device.needs.workspace >= plan.micro_batch_rows * model.hidden * model.itemsize
    waiting, token = device.waiting, model.hidden * model.itemsize
    if waiting is None:
        assert plan.needs.waiting == plan.waiting_nbytes(plan.max_batched_tokens) == 0
        return
    # Several micro-batches use the layer that is held.
    assert plan.held.layers and (waiting.tokens, waiting.token_nbytes) == (plan.max_batched_tokens, token)
    assert waiting.tokens > WAITING_SLOTS * waiting.rows == WAITING_SLOTS * plan.micro_batch_rows
    assert plan.needs.waiting >= waiting.tokens * token
    assert device.needs.workspace > waiting.device_nbytes >= WAITING_SLOTS * waiting.rows * token


def numbers(plan: Plan) -> frozenset[int]:
    """Units resident in RAM, by their numbers on the host's tape."""
    kept = plan.tape.numbers_without(plan.on_device)
    return frozenset(number for number, unit in enumerate(kept) if unit in plan.placement.resident)


def check_ring(pieces: list[list[int]], placement: Placement) -> None:
    """What is in the ring together never overlaps, in whatever pass."""
    assert placement.ring_nbytes >= smallest_ring(pieces)
    if not pieces:
        return
    if placement.resident:
        assert placement.ring_nbytes >= full_ring(pieces)
    starts = ring_starts(pieces, placement.ring_nbytes)
    rounds = [*pieces * 3, pieces[0]]
    places = [[(start, start + size) for size, start in zip(piece, starts, strict=False)] for piece in rounds]
    is_full = placement.ring_nbytes >= full_ring(pieces)
    for piece, following in pairwise(places):
        together = sorted([*piece, *(following[:1] if is_full else [])])
        assert together[0][0] >= 0 and together[-1][1] <= placement.ring_nbytes
        assert all(a[1] <= b[0] for a, b in pairwise(together))


LAYERS = tape_of([20 * MIB] * 4 * 20 + [40 * MIB], counts=[4] * 20 + [1])
MODEL = model_of(tape=LAYERS, weights=2 * LAYERS.total)
WORK = Workload(1, 512, 8, max_batched_tokens=8)


def planned(
    ram: int, vram: int, work: Workload = WORK, machine: Machine = UNMEASURED, model: ModelShape = MODEL, **fields: Any
) -> Plan:
    """A plan for layers of four units of 20 MiB, and a head of 40."""
    return make_plan(model, machine, work, Budgets(ram, 300 * MIB, **{"tiers": THREE, "vram": vram, **fields}))


@pytest.mark.parametrize("fields", [{}, {"tiers": LOADED}, {"tiers": ALONE}, {"decode_device": "cpu"}])
def test_the_smallest_budgets_work_and_less_is_refused(fields: dict[str, Any]) -> None:
    asked = Budgets(GIB, 300 * MIB, **{"tiers": THREE, "vram": GIB, **fields})
    vram = smallest_vram(MODEL, UNMEASURED, WORK, asked)
    asked = replace(asked, vram=vram)
    ram = smallest_ram(MODEL, UNMEASURED, WORK, asked)
    plan = make_plan(MODEL, UNMEASURED, WORK, replace(asked, ram=ram))
    check(plan, MODEL, WORK, replace(asked, ram=ram))
    with pytest.raises(BudgetError, match="--ram"):
        make_plan(MODEL, UNMEASURED, WORK, replace(asked, ram=ram - MIB))
    with pytest.raises(DeviceBudgetError, match="--vram"):
        make_plan(MODEL, UNMEASURED, WORK, replace(asked, ram=64 * GIB, vram=vram - MIB))


@pytest.mark.parametrize(("bits", "decode"), [(16, "gpu"), (16, "cpu"), (4, "cpu")])
def test_a_device_has_room_for_the_keys_and_values_of_prompts_whose_cache_is_elsewhere(bits: Any, decode: Any) -> None:
    asked = {"kv": "cpu", "kv_bits": bits, "decode_device": decode, "micro_batch": 64}
    short, long = (
        planned(8 * GIB, GIB, Workload(4, 2048, prompt, max_batched_tokens=4096), **asked) for prompt in (64, 1024)
    )
    assert short.device is not None and long.device is not None
    more = long.device.needs.kv - short.device.needs.kv
    # Where one prompt ends in a micro-batch and another begins, the keys and values of both are there, in one layer;
    # and while one attends, its pages of earlier passes.
    token, page = MODEL.groups[0].shape.token_nbytes, long.cache.block_nbytes(MODEL.groups[0])
    computed, past = 2 * 960 * token, 960 // PAGE_TOKENS * page
    assert more >= computed + past and (bits == 16) == (more == computed + past == 3 * 960 * token)


def test_hidden_states_wait_in_memory_where_the_device_has_no_room_for_them() -> None:
    work = Workload(64, 2048, 256, batch_size=64)
    tokens, asked = 64 * 256, Budgets(64 * GIB, 300 * MIB, THREE, vram=GIB, kv="cpu", micro_batch=512)
    token = MODEL.hidden * MODEL.itemsize
    least = smallest_vram(MODEL, UNMEASURED, work, asked)
    plan = make_plan(MODEL, UNMEASURED, work, replace(asked, vram=least))
    check(plan, MODEL, work, replace(asked, vram=least))
    assert plan.device is not None and plan.device.waiting is not None and plan.needs.waiting >= tokens * token
    # They cross the bus for each layer, unless each micro-batch has a slot to itself.
    assert plan.waiting_nbytes(tokens) == 20 * tokens * token and not plan.waiting_nbytes(3 * plan.micro_batch_rows)
    # With plenty, all of them are on the device.
    roomy = make_plan(MODEL, UNMEASURED, work, replace(asked, vram=16 * GIB))
    check(roomy, MODEL, work, replace(asked, vram=16 * GIB))
    assert roomy.device is not None and roomy.device.waiting is None and not roomy.waiting_nbytes(tokens)
    with pytest.raises(BudgetError, match="for what waits for the GPU"):
        make_plan(MODEL, UNMEASURED, work, replace(asked, vram=least, ram=GIB))


def test_predictions_count_what_crosses_the_bus_for_hidden_states_that_wait() -> None:
    work, gpu = Workload(64, 2048, 256, batch_size=64), GpuRates("gpu", GIB, 1e9, 5e8, 1e12, 1e14)
    asked = Budgets(64 * GIB, 300 * MIB, THREE, vram=GIB, kv="cpu", micro_batch=512)
    plan = make_plan(MODEL, MEASURED, work, replace(asked, vram=smallest_vram(MODEL, MEASURED, work, asked)))
    assert plan.device is not None and plan.device.waiting is not None
    without = replace(plan, device=replace(plan.device, waiting=None))
    found, before = (predict(each, MODEL, MEASURED, work, gpu) for each in (plan, without))
    assert found.memory["waiting"] == plan.needs.waiting > 0
    # Both ways at once, at the slower rate.
    more = plan.waiting_nbytes(64 * 256) / 5e8
    assert found.prefill.bus_seconds - before.prefill.bus_seconds == pytest.approx(more)
    assert found.decode.bus_seconds == before.decode.bus_seconds


def test_units_on_the_device_are_spread_and_those_in_memory_are_spread_among_the_others() -> None:
    plan = planned(1200 * MIB, 800 * MIB)
    assert plan.device is not None and plan.device.placement.resident and plan.placement.resident
    read = [unit for unit in range(80) if unit not in plan.on_device | plan.placement.resident]
    assert read and max(b - a for a, b in pairwise(read)) <= 2 * 80 / len(read)
    for units in (plan.on_device, plan.placement.resident):
        halves = sum(unit < 40 for unit in units), sum(40 <= unit < 80 for unit in units)
        assert abs(halves[0] - halves[1]) <= 3
    on_tape = place(LAYERS.without(plan.on_device), plan.placement.nbytes)
    assert on_tape is not None and len(on_tape.resident) == len(plan.placement.resident)


def test_compressed_units_that_stay_on_either_side_are_not_read_again() -> None:
    files = [nbytes - number * MIB // 10 for number, nbytes in enumerate(LAYERS.nbytes)]
    tape = replace(LAYERS, file_nbytes=tuple(files))
    plan = planned(1200 * MIB, 800 * MIB, model=replace(MODEL, tape=tape))
    assert plan.device is not None and plan.device.placement.resident and plan.placement.resident
    left = tape.units - plan.on_device - plan.placement.resident
    assert plan.read_nbytes == sum(files[unit] for unit in left) < tape.nbytes_of(left)
    assert plan.resident_file_nbytes == sum(files[unit] for unit in plan.placement.resident)


def test_what_fits_on_the_device_crosses_no_bus_and_asks_little_of_memory() -> None:
    plan = planned(8 * GIB, 8 * GIB)
    assert plan.device is not None and (plan.bus_nbytes, plan.read_nbytes, plan.placement.resident_nbytes) == (0, 0, 0)
    # Two units at a time pass through on their way.
    assert plan.device.placement.ring_nbytes == 0 and plan.placement.ring_nbytes == 60 * MIB
    assert planned(8 * GIB, 8 * GIB, tiers=ALONE).placement == plan.placement
    scarce = planned(
        smallest_ram(MODEL, UNMEASURED, WORK, Budgets(1, 300 * MIB, ALONE, vram=8 * GIB)), 8 * GIB, tiers=ALONE
    )
    assert 40 * MIB <= scarce.placement.ring_nbytes < 60 * MIB


def test_more_memory_of_either_kind_never_moves_more() -> None:
    read, copied = [], []
    for vram in range(400, 2400, 250):
        read.append([planned(ram * MIB, vram * MIB).read_nbytes for ram in range(600, 2600, 250)])
        copied.append(planned(2 * GIB, vram * MIB).bus_nbytes)
        assert read[-1] == sorted(read[-1], reverse=True)
    assert copied == sorted(copied, reverse=True) and copied[0] > copied[-1]
    assert all(column[0] >= column[-1] for column in zip(*read, strict=True))


def test_wishes_are_kept_to_a_unit_and_no_more_is_taken() -> None:
    plan = planned(8 * GIB, 8 * GIB, resident_gpu=300 * MIB, resident_cpu=500 * MIB)
    assert plan.device is not None
    assert 280 * MIB < plan.device.placement.resident_nbytes <= 300 * MIB
    assert 480 * MIB < plan.placement.resident_nbytes <= 500 * MIB
    none = planned(8 * GIB, 8 * GIB, resident_gpu=0, resident_cpu=0)
    assert not none.on_device and none.read_nbytes == none.bus_nbytes == LAYERS.total


@pytest.mark.parametrize(("wish", "option"), [("resident_gpu", "--vram"), ("resident_cpu", "--ram")])
def test_a_wish_that_does_not_fit_is_refused_by_name_with_a_budget_that_holds_it(wish: str, option: str) -> None:
    fields: dict[str, Any] = {"ram": 700 * MIB, "vram": 500 * MIB, wish: 700 * MIB}
    with pytest.raises(BudgetError, match=rf"--{wish.replace('_', '-')} 700MiB and a ring.*{option} ") as refused:
        planned(**fields)
    plan = planned(**{**fields, option.strip("-"): refused.value.smallest_bytes})
    assert plan.device is not None
    assert max(plan.device.placement.resident_nbytes, plan.placement.resident_nbytes) > 680 * MIB


def test_a_unit_on_its_way_to_the_device_is_not_held_in_memory_whatever_the_device_holds() -> None:
    prompt = Workload(1, 4096, 4000, max_batched_tokens=4096)
    plan = planned(2 * GIB, 2 * GIB, prompt, resident_gpu=0)
    assert plan.device is not None and plan.held.layers and not plan.host_held.layers
    assert plan.device.placement.ring_nbytes == 120 * MIB  # the last layer and the head
    assert planned(2 * GIB, 2 * GIB, prompt, resident_gpu=0, resident_cpu=0).placement.ring_nbytes == 60 * MIB


def test_in_a_hybrid_whole_layers_are_in_memory_and_nothing_stays_on_the_device() -> None:
    prompt = Workload(1, 4096, 4000, max_batched_tokens=4096)
    plan = planned(2 * GIB, 2 * GIB, prompt, decode_device="cpu", kv="auto")
    assert plan.device is not None and not plan.on_device and not plan.cache.on_device
    # The processor may be a block behind the device, or ahead.
    assert plan.host_held.layers and plan.host_held.head
    pieces = plan.tape.streamed(plan.host_held, plan.placement.resident)
    assert plan.placement.ring_nbytes >= full_ring(pieces)
    assert (plan.bus_nbytes, plan.decode_bus_nbytes) == (LAYERS.total, 0)
    alone = make_plan(MODEL, UNMEASURED, prompt, Budgets(2 * GIB, 300 * MIB, STREAMING))
    assert replace(plan.needs, kv=alone.needs.kv) == alone.needs


def test_the_device_s_needs_do_not_grow_with_the_host_s_memory() -> None:
    prompt = Workload(4, 4096, 1000, max_batched_tokens=4096)
    found = {
        planned(ram * MIB, GIB, prompt, decode_device=decode, kv="cpu").device.needs  # type: ignore[union-attr]
        for ram in (900, 1500, 6000)
        for decode in ("gpu", "cpu")
    }
    assert len({needs.context for needs in found}) == 1 and len({needs.outer for needs in found}) == 1


# Where the KV cache goes.


def test_without_rates_the_cache_goes_to_the_device_if_it_fits_there_then_to_memory_then_to_disk() -> None:
    work = Workload(8, 8192, 16, max_batched_tokens=16)  # 512 MiB of keys and values

    def place_of(ram: int, vram: int) -> tuple[bool, bool]:
        cache = planned(ram * MIB, vram * MIB, work, kv="auto").cache
        return cache.on_device, cache.on_disk

    assert place_of(2000, 2000) == (True, False)
    assert place_of(2000, 400) == (False, False)
    assert place_of(700, 400) == (False, True)


@pytest.mark.parametrize(("attention", "on_device"), [(1e-12, False), (1e-3, True)])
def test_with_rates_it_goes_where_the_job_is_quicker(attention: float, on_device: bool) -> None:
    work = Workload(8, 8192, 16, max_batched_tokens=16)
    machine = Machine(16 * MIB, 2e9, ComputeRate((1,), (1e-12,)), attention)
    gpu = GpuRates("gpu", GIB, 12e9, 12e9, 1e12, 1e15)
    asked = Budgets(8 * GIB, 300 * MIB, THREE, vram=1500 * MIB, kv="auto")
    # On the device it pushes weights out; in memory, where there is enough, the processor must attend.
    plan = make_plan(MODEL, machine, work, asked, gpu)
    assert plan.cache.on_device == on_device
    other = make_plan(MODEL, machine, work, replace(asked, kv="cpu" if on_device else "gpu"), gpu)
    assert (plan.bus_nbytes > other.bus_nbytes) == on_device


def test_a_cache_on_the_device_where_nothing_decodes_there_is_a_contradiction() -> None:
    cases: list[dict[str, Any]] = [{"decode_device": "cpu"}, {"tiers": STREAMING, "vram": 0}]
    for fields in cases:
        with pytest.raises(ConfigError, match="kv gpu: no device computes while sequences decode"):
            planned(2 * GIB, **{"vram": GIB, "kv": "gpu", **fields})


@pytest.mark.parametrize("fields", [{"tiers": STREAMING}, {"vram": 0}])
def test_a_tier_without_its_memory_is_no_plan_for_the_processor(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a GPU and its memory go together"):
        planned(2 * GIB, **{"vram": GIB, **fields})


def test_a_refusal_with_the_cache_on_the_device_is_not_the_one_to_read_where_memory_is_what_lacks() -> None:
    with pytest.raises(BudgetError, match="The smallest budget that works is --ram") as refused:
        planned(350 * MIB, 400 * MIB, Workload(8, 8192, 16, max_batched_tokens=16), kv="auto")
    assert not isinstance(refused.value, DeviceBudgetError)


# What comes of it.


def test_of_a_mixture_chosen_experts_are_copied_where_that_moves_clearly_less() -> None:
    model = mixture_of([50 * MIB] * 20 + [100 * MIB], count=64, chosen=4, nbytes=5 * MIB)
    plan = planned(2 * GIB, 2 * GIB, Workload(1, 256), model=model)
    assert plan.experts is not None and plan.device is not None and plan.on_device
    # Also where memory holds all of them: the bus would carry 64 where 4 are used.
    assert planned(16 * GIB, 2 * GIB, Workload(1, 256), model=model).experts is not None
    assert planned(16 * GIB, 2 * GIB, Workload(32, 256), model=model).experts is None


def test_the_bound_counts_what_both_budgets_leave() -> None:
    plan = planned(1200 * MIB, 800 * MIB)
    assert plan.device is not None
    assert plan.device.placement.resident_nbytes <= plan.bound_device_nbytes < plan.bound_resident_nbytes
    assert plan.bound_resident_nbytes >= LAYERS.total - plan.streamed_nbytes
    assert planned(8 * GIB, 800 * MIB).bound_resident_nbytes == LAYERS.total
    assert planned(8 * GIB, 8 * GIB).bound_device_nbytes == LAYERS.total


@pytest.mark.parametrize(("gpu", "cpu"), [(0, 0), (200 * MIB, 0), (0, 200 * MIB), (None, 0), (0, None)])
def test_the_bound_takes_a_wish_as_given(gpu: int | None, cpu: int | None) -> None:
    plan = planned(8 * GIB, 8 * GIB, resident_gpu=gpu, resident_cpu=cpu)
    there = LAYERS.total if gpu is None else gpu
    assert plan.bound_device_nbytes == there
    assert plan.bound_resident_nbytes == min(LAYERS.total, there + (LAYERS.total if cpu is None else cpu))


def test_a_device_s_ring_below_a_full_one_is_said() -> None:
    asked = Budgets(2 * GIB, 300 * MIB, THREE, vram=1)
    plan = planned(2 * GIB, smallest_vram(MODEL, UNMEASURED, WORK, asked), kv="cpu")
    assert plan.missing_copy_overlap_nbytes > 0 and not plan.missing_overlap_nbytes
    assert planned(2 * GIB, GIB).missing_copy_overlap_nbytes == 0
    assert plan_of([MIB], NOTHING, MIB).missing_copy_overlap_nbytes == 0


# Parts of tapes.


@st.composite
def parts(draw: st.DrawFn) -> tuple[Tape, frozenset[int]]:
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    units = draw(st.lists(st.integers(1, 50), min_size=sum(counts), max_size=sum(counts)))
    return tape_of(units, [draw(st.integers(1, n)) for n in units], counts), draw(
        st.frozensets(st.integers(0, len(units) - 1))
    )


@settings(deadline=None)
@given(parts(), HELD)
def test_a_tape_without_some_units_has_the_others_in_their_blocks(
    found: tuple[Tape, frozenset[int]], held: Held
) -> None:
    tape, units = found
    rest, kept = tape.without(units), tape.numbers_without(units)
    assert len(rest.counts) == len(tape.counts) and sum(rest.counts) == len(rest.nbytes) == len(kept)
    assert [tape.nbytes[n] for n in kept] == list(rest.nbytes)
    assert [tape.file_nbytes[n] for n in kept] == list(rest.file_nbytes)
    assert [[kept[n] for n in block] for block in rest.blocks] == [
        [n for n in block if n not in units] for block in tape.blocks
    ]
    assert rest.streamed(held) == tape.streamed(held, units)
    assert [[rest.nbytes[n] for n in piece] for piece in rest.pieces(held)] == rest.streamed(held)


@settings(deadline=None)
@given(
    parts(),
    st.integers(0, 2000),
    st.integers(0, 60),
    st.none() | st.integers(0, 2000),
    st.builds(Held, st.booleans(), st.booleans()),
)
def test_a_placement_keeps_to_its_least_ring_and_to_its_most_resident(
    found: tuple[Tape, frozenset[int]], available: int, ring: int, most: int | None, held: Held
) -> None:
    tape, _ = found
    placement = place(tape, available, held, ring, most)
    least = max(ring, smallest_ring(tape.streamed(held)))
    if placement is None:
        assert available < least
        return
    assert placement.nbytes <= available and placement.ring_nbytes >= ring
    assert most is None or placement.resident_nbytes <= most
    if most is not None:
        same = wished(tape, available, held, most, ring)
        assert same is None or same.resident_nbytes >= placement.resident_nbytes or not same.resident


def test_a_wish_is_the_same_units_whatever_memory_there_is() -> None:
    tape = tape_of([10] * 20)
    found = {wished(tape, available, UNHELD, 100).resident for available in (120, 150, 1000)}  # type: ignore[union-attr]
    assert found == {interleave(10, 20)}
    assert wished(tape, 119, UNHELD, 100) is None
    assert wished(tape, 15, UNHELD, 9) == Placement(frozenset(), 0, 15, is_wished=True)


def test_a_refusal_of_the_device_says_what_takes_the_bytes() -> None:
    needs = DeviceNeeds(context=300 * MIB, outer=5 * MIB, kv=40 * MIB, workspace=20 * MIB, state=10 * MIB)
    with pytest.raises(DeviceBudgetError) as refused:
        fit_on_device(tape_of([20 * MIB, 60 * MIB]), needs, Budgets(1, 1, THREE, vram=400 * MIB), UNHELD)
    assert str(refused.value) == (
        "400 MiB of GPU memory are too little. Needed: 300 MiB for driver and libraries, 5 MiB for tables, 40 MiB for "
        "the KV cache, 10 MiB for recurrent states, 20 MiB for activations, 60 MiB for the largest part of a layer. "
        "The smallest budget that works is --vram 435MiB"
    )
    assert refused.value.exit_code == 3
    with pytest.raises(DeviceBudgetError, match=r"80 MiB for all weights, .* or use --tiers disk,cpu,gpu"):
        fit_on_device(tape_of([20 * MIB, 60 * MIB]), needs, Budgets(1, 1, ALONE, vram=400 * MIB), UNHELD)


def test_a_device_plan_adds_up_and_goes_through_json() -> None:
    device = DevicePlan(100, DeviceNeeds(1, 2, 3, 4), Placement(frozenset({0, 2}), 20, 7))
    assert device.nbytes == 37
    plan = replace(plan_of([5, 10, 15], NOTHING, MIB), device=device, decode_device="gpu", cache=CACHE)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    ("text", "tiers"), [("disk,cpu,gpu", THREE), ("cpu,gpu", LOADED), ("gpu", ALONE), ("Disk, CPU, GPU", THREE)]
)
def test_tiers_with_a_gpu_are_read_as_typed(text: str, tiers: tuple[Tier, ...]) -> None:
    assert parse_tiers(text) == tiers
