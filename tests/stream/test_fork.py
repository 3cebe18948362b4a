"""Processor and device compute with the same units, in passes of one, of the other or of both: each is read once."""

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.quick import represented
from tests.store.make import load_unit, write_mixture, write_store
from tests.store.units import in_units
from tests.stream.streaming import (
    Pending,
    Setup,
    compute_block,
    device_plan,
    failing_at,
    in_thread,
    in_twenties,
    tensors_of,
)
from tests.waiting import until
from tiered.errors import BudgetError, ReadError
from tiered.io import Arena, ChunkVerifier, DiskReader, Faults, VerifyPolicy
from tiered.kernels import CancelFlag
from tiered.plan import ExpertCachePlan, Held, Plan, full_ring
from tiered.store import Store
from tiered.stream import Fork, Streamer, Streams
from tiered.stream.device_feed import DeviceFeed
from tiered.stream.fork import HELD
from tiered.trace import Tracer


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two layers of four units each, and a head of two, of one size."""
    folder = tmp_path_factory.mktemp("fork") / "cut.tiered"
    return in_units(write_store(folder, [80_000, 80_000, 40_000]), folder / "units", in_twenties)


def plan_for(store: Store, in_ram: Sequence[int] = (), held: Held = HELD) -> Plan:
    """A plan whose host's ring holds a layer and the unit after it."""
    plan = device_plan(store, in_ram=in_ram, held=held)
    pieces = plan.tape.streamed(HELD, plan.placement.resident)
    return replace(plan, placement=replace(plan.placement, ring_nbytes=full_ring(pieces)))


@asynccontextmanager
async def forked(
    store: Store, plan: Plan, seed: int = 0, prefetch: int | None = None, preadv: Faults = os.preadv
) -> AsyncIterator[tuple[Setup, Streams]]:
    """Two streamers that share a fork."""
    trace, cancel, placement = Tracer(), CancelFlag(), plan.placement
    assert plan.device is not None
    slots = 2 * plan.experts.slot_nbytes if plan.experts else 0
    device = Pending(plan.device.vram + slots, seed)
    nbytes = placement.nbytes + 4096 * (len(plan.tape.nbytes) + 1) + (plan.experts.nbytes if plan.experts else 0)
    with Arena(nbytes) as arena:
        resident = {i: arena.borrow(plan.tape.nbytes[i], "resident") for i in sorted(placement.resident)}
        ring = arena.borrow(placement.ring_nbytes, "ring") if placement.ring_nbytes else None
        experts = arena.borrow(plan.experts.nbytes, "experts") if plan.experts else None
        with DiskReader(store.path, ChunkVerifier(VerifyPolicy.FIRST, trace), trace, 4, preadv=preadv) as reader:
            fork = Fork(plan.tape, placement.resident, placement.ring_nbytes)
            host, there = (
                Streamer(store, plan, reader, resident, ring, trace, cancel, prefetch, experts, (), where, fork)
                for where in (None, device)
            )
            async with host, there:
                streams = Streams(asyncio.get_running_loop(), host, device_blocks=there)
                yield Setup(host, reader, trace, cancel, None), streams  # type: ignore[arg-type]
            assert device.in_use == {}
        device.close()


def device_of(streams: Streams) -> Pending:
    """The device that computes."""
    assert streams.device_blocks is not None and isinstance(streams.device_blocks._feed, DeviceFeed)
    device = streams.device_blocks._feed._device
    assert isinstance(device, Pending)
    return device


def compute(streams: Streams, store: Store, who: str, blocks: int | None = None, is_last: bool = False) -> None:
    """A pass of the processor ("c"), the device ("g") or both ("cg"). The device goes ahead in each block; in a pass of
    both the processor alone computes the head."""
    assert streams.device_blocks is not None
    lenders = [(c, {"g": streams.device_blocks, "c": streams.blocks}[c]) for c in "gc" if c in who]
    for _, lender in lenders:
        lender.begin(is_last)
    for number in range(len(store.tape[:blocks])):
        for name, lender in lenders:
            if number == len(store.tape) - 1 and name == "g" and "c" in who:
                with lender.lend(number):
                    continue
            compute_block(lender, store, number, is_held=True)


@pytest.mark.parametrize("prefetch", represented([0, 1, None], [0, None]))
@pytest.mark.parametrize("in_ram", [(), (1, 4, 9), tuple(range(10))])
def test_units_come_right_to_whoever_takes_part_and_are_read_once_for_both(
    cut: Store, in_ram: Sequence[int], prefetch: int | None
) -> None:
    passes = ["g", "c", "cg", "cg", "c", "c", "g", "g", "cg", "c"]
    nbytes = [unit.nbytes for block in cut.dense_units for unit in block]

    async def scenario(seed: int) -> None:
        async with forked(cut, plan_for(cut, in_ram), seed, prefetch) as (setup, streams):
            for number, who in enumerate(passes):
                is_last = number == len(passes) - 1
                await in_thread(setup, functools.partial(compute, streams, cut, who, is_last=is_last))
            await asyncio.sleep(0.03)
            held = sum(nbytes[i] for i in in_ram)
            assert setup.reader.bytes_read == held + len(passes) * (sum(nbytes) - held)

    for seed in range(3):
        asyncio.run(scenario(seed))


@pytest.mark.parametrize("seed", range(3))
def test_after_a_rest_units_come_into_new_slots_behind_what_was_computed_there(cut: Store, seed: int) -> None:
    async def scenario() -> None:
        async with forked(cut, plan_for(cut), seed) as (setup, streams):
            for who in ("g", "c", "cg", "g"):
                await in_thread(setup, functools.partial(compute, streams, cut, who))
                await asyncio.to_thread(streams.rest_device)
                device_of(streams).is_used = True

    asyncio.run(scenario())


def test_a_limit_of_one_does_not_hold_for_a_later_pass_of_the_other(cut: Store) -> None:
    async def scenario() -> None:
        async with forked(cut, plan_for(cut)) as (setup, streams):
            for who in ("c", "g", "cg", "g", "c"):
                await in_thread(setup, functools.partial(compute, streams, cut, who, is_last=True))

    asyncio.run(scenario())


def test_what_the_device_passes_by_before_it_is_read_does_not_come_to_it(cut: Store) -> None:
    """Nobody would take it away again: memory of the ring that others are read into."""

    async def scenario() -> None:
        async with forked(cut, plan_for(cut), prefetch=0) as (setup, streams):
            assert streams.device_blocks is not None and isinstance(streams.device_blocks._feed, DeviceFeed)
            for _ in range(3):
                await in_thread(setup, functools.partial(compute, streams, cut, "cg"))
            found = streams.device_blocks._feed._found
            await until(lambda: not found.items)

    asyncio.run(scenario())


@pytest.mark.parametrize("prefetch", [0, None])
@pytest.mark.parametrize("who", ["c", "g", "cg"])
def test_after_a_pass_that_did_not_end_both_begin_anew(cut: Store, who: str, prefetch: int | None) -> None:
    async def scenario() -> None:
        async with forked(cut, plan_for(cut, (3,)), prefetch=prefetch) as (setup, streams):
            for stop in range(3):
                await in_thread(setup, functools.partial(compute, streams, cut, "cg"))
                await in_thread(setup, functools.partial(compute, streams, cut, who, stop))
                await asyncio.to_thread(streams.rewind)
            for again in ("c", "g", "cg"):
                await in_thread(setup, functools.partial(compute, streams, cut, again))

    asyncio.run(scenario())


@pytest.mark.parametrize("who", ["c", "g", "cg"])
@pytest.mark.parametrize("in_ram", [(), (4, 5)])
def test_a_failed_read_reaches_whoever_takes_part(cut: Store, in_ram: Sequence[int], who: str) -> None:
    is_broken, failing = [True], failing_at("layer-001")

    def preadv(fd: int, buffers: Sequence[memoryview], at: int, flags: int, /) -> int:
        return (failing if is_broken[0] else os.preadv)(fd, buffers, at, flags)

    async def scenario() -> None:
        async with forked(cut, plan_for(cut, in_ram), preadv=preadv) as (setup, streams):
            for is_next_broken in (True, False):
                with pytest.raises(ReadError, match=r"layer-001\.safetensors: read of .*\(EIO\)"):
                    await in_thread(setup, functools.partial(compute, streams, cut, who))
                is_broken[0] = is_next_broken  # a rewind begins to read again
                await asyncio.to_thread(streams.rewind)
            for again in (who, "cg", "c", "g"):
                await in_thread(setup, functools.partial(compute, streams, cut, again))

    asyncio.run(scenario())


def test_a_ring_that_does_not_hold_a_layer_is_refused(cut: Store) -> None:
    plan = plan_for(cut)
    with pytest.raises(BudgetError, match=r"ring of 60 KiB must hold the largest of them, 80 KiB; .*--ram"):
        Fork(plan.tape, frozenset(), 60 << 10)


def test_leaving_before_anything_is_computed_leaves_nothing_behind(cut: Store) -> None:
    async def scenario() -> None:
        before = asyncio.all_tasks()
        async with forked(cut, plan_for(cut)):
            pass
        assert asyncio.all_tasks() == before

    asyncio.run(scenario())


NAMES = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def choose(lender: Streamer, store: Store, number: int, chosen: Sequence[int]) -> None:
    """A block that is lent with these experts: each matrix is that of its file."""
    with lender.lend(number) as loan:
        if number == len(store.tape) - 1:
            loan.borrow("weight")
            return
        for expert, matrices in loan.each_expert(dict.fromkeys(chosen, 1), NAMES):
            unit = store.expert_units[number][expert]
            memory = load_unit(store.path, unit)
            for matrix, weight in zip(matrices, unit.weights.values(), strict=True):
                pairs = zip(tensors_of(matrix), tensors_of(weight.view(memory)), strict=True)
                assert all(torch.equal(found, right) for found, right in pairs)


@pytest.mark.parametrize("slots", [1, 5])
def test_experts_on_demand_come_right_to_whoever_takes_part(tmp_path: Path, slots: int) -> None:
    store = write_mixture(tmp_path / "mixture.tiered", 2, 6)
    size = store.expert_units[0][0].memory_nbytes
    plan = replace(plan_for(store), experts=ExpertCachePlan(slots, size))

    def work(streams: Streams) -> None:
        assert streams.device_blocks is not None
        both = streams.device_blocks, streams.blocks
        for lenders in (both, both[:1], both[1:], both):
            for lender in lenders:
                lender.begin()
            for number in range(3):
                for lender, chosen in zip(lenders, ([1, 5, 2], [2, 3, 0, 1]), strict=False):
                    choose(lender, store, number, chosen)

    async def scenario() -> None:
        async with forked(store, plan) as (setup, streams):
            await in_thread(setup, functools.partial(work, streams))
            assert streams.device_blocks is not None
            uses = [lender.expert_use for lender in streams.lenders]
            assert [use.hits + use.misses for use in uses] == [2 * (4 + 3 + 4), 2 * (3 + 3 + 3)]
            assert streams.blocks.bus_nbytes == 0 and streams.device_blocks.bus_nbytes > 18 * size

    asyncio.run(scenario())
