"""The streamer: blocks in tape order with the right bytes, no byte read twice, no error lost, no task left."""

import asyncio
import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from tests.plan.plans import plan_of, tape_of
from tests.store.make import write_store
from tests.store.units import in_units
from tests.stream.streaming import (
    Setup,
    assert_pass,
    assert_right,
    failing_at,
    in_twenties,
    sizes_of,
    streaming,
    while_waited_for,
)
from tests.waiting import SECONDS, turns_of_the_loop, until
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import InterruptedRun, ReadError, StoreError, UnsupportedFamilyError
from tiered.io import DiskReader, Slab, VerifyPolicy
from tiered.plan import Held, Placement, Plan, full_ring, interleave
from tiered.plan.order import ring_starts
from tiered.plan.placement import UNHELD, smallest_ring
from tiered.store import CHUNK_NBYTES, Store
from tiered.stream.feed import Feed
from tiered.units import GIB

DOCS = Path(__file__).parents[1] / "data/models/opt-docs-8m"
T = TypeVar("T")
SIZES = (20_000, 60_000, 5_000, 33_000, 90_000)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Blocks of different sizes, one of them compressed."""
    return write_store(tmp_path_factory.mktemp("stream") / "small.tiered", SIZES, compressed=frozenset({1}))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Blocks of one, two and three chunks."""
    sizes = (CHUNK_NBYTES // 2, CHUNK_NBYTES + 70_000, 2 * CHUNK_NBYTES + 4096, 4096)
    return write_store(tmp_path_factory.mktemp("stream") / "large.tiered", sizes)


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("stream") / "docs.tiered"
    convert_checkpoint(DOCS, path, ConvertOptions(quant="int4"))
    return Store.open(path)


def plan_with(store: Store, resident: frozenset[int], ring: str = "full") -> Plan:
    """A plan with these units resident, and a ring of the size that is named so."""
    tape = tape_of(sizes_of(store))
    streamed = tape.streamed(UNHELD, resident)
    nbytes = {"smallest": smallest_ring(streamed), "full": full_ring(streamed), "all": sum(map(sum, streamed))}
    held = sum(tape.nbytes[unit] for unit in resident)
    return replace(plan_of(tape.nbytes, budget=GIB), placement=Placement(resident, held, nbytes[ring]))


async def assert_reads(reader: DiskReader, nbytes: int) -> None:
    """The reader gets to `nbytes`, and no further by itself."""
    await until(lambda: reader.bytes_read >= nbytes)
    await asyncio.sleep(0.03)
    assert reader.bytes_read == nbytes


def test_weights_go_by_their_names_inside_the_block(docs: Store) -> None:
    async def scenario() -> None:
        async with streaming(docs, plan_with(docs, frozenset())) as setup:
            loan = await setup.following()
            assert "self_attn.q_proj.weight" in loan.names and "final_layer_norm.bias" not in loan.names
            assert len(loan.names) == 6  # small tensors are not lent
            await setup.release(loan)

    asyncio.run(scenario())


@pytest.mark.parametrize("prefetch", [0, 1, 3, None])
@pytest.mark.parametrize("ring", ["smallest", "full", "all"])
@pytest.mark.parametrize("resident", [(), (1,), (0, 4), (0, 1, 2, 3), (0, 1, 2, 3, 4)])
def test_blocks_come_in_order_with_the_right_bytes(
    small: Store, resident: tuple[int, ...], ring: str, prefetch: int | None
) -> None:
    async def scenario() -> None:
        async with streaming(small, plan_with(small, frozenset(resident), ring), prefetch) as setup:
            for _ in range(3):
                await assert_pass(setup, small)

    asyncio.run(scenario())


@pytest.mark.parametrize("prefetch", [0, None])
@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_a_converted_model_arrives_whole(docs: Store, count: int, prefetch: int | None) -> None:
    async def scenario() -> None:
        resident = interleave(count, len(docs.tape))
        async with streaming(docs, plan_with(docs, resident), prefetch) as setup:
            for _ in range(2):
                await assert_pass(setup, docs)

    asyncio.run(scenario())


@pytest.mark.parametrize("policy", VerifyPolicy)
def test_blocks_of_several_chunks_arrive_whole(large: Store, policy: VerifyPolicy) -> None:
    async def scenario() -> None:
        async with streaming(large, plan_with(large, frozenset({1})), policy=policy) as setup:
            for _ in range(2):
                for _ in large.tape:
                    block = await setup.following()
                    assert_right(large, block)
                    await setup.release(block)

    asyncio.run(scenario())


@pytest.mark.parametrize("prefetch", [0, 1, None])
@pytest.mark.parametrize("resident", [(), (2,), (0, 1, 2, 3, 4)])
def test_the_bytes_read_are_those_planned(small: Store, resident: tuple[int, ...], prefetch: int | None) -> None:
    passes = 4
    held = sum(small.tape[i].file.units_nbytes for i in resident)

    async def scenario() -> None:
        async with streaming(small, plan_with(small, frozenset(resident)), prefetch) as setup:
            for number in range(passes):
                setup.streamer.begin(is_last=number == passes - 1)
                for _ in small.tape:
                    await setup.passing()
            await assert_reads(setup.reader, held + passes * (small.tape_nbytes - held))
            assert setup.trace.total("verify").spans == len(small.tape)

    asyncio.run(scenario())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_what_the_planner_places_can_be_streamed(small: Store, share: float) -> None:
    sizes = sizes_of(small)
    plan = plan_of(sizes, budget=int(max(sizes) + share * (sum(sizes) - max(sizes))))

    async def scenario() -> None:
        async with streaming(small, plan) as setup:
            for _ in range(2 * len(sizes)):
                block = await setup.following()
                assert_right(small, block)
                await setup.release(block)

    asyncio.run(scenario())


class Gate:
    """A `preadv` that counts, and waits at a closed gate."""

    def __init__(self, is_open: bool = False) -> None:
        self._open = threading.Event()
        self._lock = threading.Lock()
        self.begun = threading.Event()
        self.count = 0
        if is_open:
            self._open.set()

    def open(self) -> None:
        self._open.set()

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        with self._lock:
            self.count += 1
        self.begun.set()
        assert self._open.wait(SECONDS)
        return os.preadv(fd, buffers, offset, flags)


Populated = list[tuple[str, int, int]]
"""Label of the slab, start and bytes of what was populated."""


def assert_set(event: threading.Event) -> None:
    """In another thread than the loop's: wait for `event`."""
    assert event.wait(SECONDS)


def record_populating(monkeypatch: pytest.MonkeyPatch, before: Callable[[], None] = lambda: None) -> Populated:
    """What is populated from now on; `before` is called each time, in its thread."""
    found: Populated = []
    original = Slab.populate

    def populate(slab: Slab, start: int, nbytes: int) -> bool:
        before()
        found.append((slab.label, start, nbytes))
        return original(slab, start, nbytes)

    monkeypatch.setattr(Slab, "populate", populate)
    return found


def test_memory_is_taken_in_the_order_of_the_tape_but_for_what_is_being_read(
    small: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiered.stream.feed._READING_NBYTES", 1)
    go_on, gate = threading.Event(), Gate()
    found = record_populating(monkeypatch, lambda: assert_set(go_on))
    plan, sizes = plan_with(small, frozenset({1, 3})), sizes_of(small)
    starts = ring_starts([[sizes[i]] for i in (0, 2, 4)], plan.placement.ring_nbytes)
    places = [("resident", 0) if i in (1, 3) else ("ring", next(starts)) for i in range(len(sizes))]
    expected = [(label, start, size) for (label, start), size in zip(places, sizes, strict=True)]

    async def scenario() -> None:
        async with streaming(small, plan, preadv=gate) as setup:
            feed = setup.streamer._feed
            assert isinstance(feed, Feed)
            # Unit 1 is being read, and for as long unit 3 is not begun.
            await until(lambda: feed.begun == 2)
            order = [(slab.label, start, nbytes) for _, slab, start, nbytes in feed._first_use()]
            go_on.set()
            await until(lambda: expected[3] in found)
            gate.open()
            await assert_pass(setup, small)
            # Once the ring has been used, the last unit comes where the first was.
            assert order == expected[: len(order)] and len(order) in (4, 5)
            ring = sum(nbytes for label, _, nbytes in order if label == "ring")
            assert ring >= plan.placement.ring_nbytes - max(sizes)

    asyncio.run(scenario())
    # What had begun to be populated before its reads began is one piece at most.
    assert found[found.index(expected[3]) :] == expected[3 : 3 + len(found) - found.index(expected[3])]
    assert found.index(expected[3]) <= 1


def test_without_reading_ahead_no_memory_is_taken_ahead(small: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    found = record_populating(monkeypatch)

    async def scenario() -> None:
        async with streaming(small, plan_with(small, frozenset({1, 3})), 0) as setup:
            await asyncio.sleep(0.05)
            await assert_pass(setup, small)

    asyncio.run(scenario())
    assert not found


@pytest.mark.parametrize("prefetch", [None, 0])
def test_threads_have_started_before_anything_is_read(small: Store, prefetch: int | None) -> None:
    started: list[int] = []

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        started.append(sum(thread.name.startswith("tiered-read") for thread in threading.enumerate()))
        return os.preadv(fd, buffers, offset, flags)

    async def scenario() -> None:
        async with streaming(small, plan_with(small, frozenset({1})), prefetch, preadv) as setup:
            await assert_pass(setup, small)

    asyncio.run(scenario())
    # What is read when it is asked for is read by whoever is there.
    assert started[0] == (4 if prefetch is None else 1)


def test_leaving_waits_for_the_memory_that_is_being_populated(small: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # Unit 1 is not begun while unit 0 is being read.
    monkeypatch.setattr("tiered.stream.feed._READING_NBYTES", 1)
    begun, go_on, gate = threading.Event(), threading.Event(), Gate()

    def wait() -> None:
        begun.set()
        assert_set(go_on)

    found = record_populating(monkeypatch, wait)

    async def scenario() -> None:
        async with streaming(small, plan_with(small, frozenset({0, 1})), preadv=gate) as setup:
            assert await asyncio.to_thread(begun.wait, SECONDS)
            gate.open()
            leaving = asyncio.create_task(setup.inside.aclose())
            await turns_of_the_loop()
            await asyncio.sleep(0.05)
            assert not leaving.done()
            go_on.set()
            await asyncio.wait_for(leaving, SECONDS)
        assert len(found) == 1  # nothing more was touched

    asyncio.run(scenario())


def test_where_the_kernel_populates_nothing_blocks_come_all_the_same(
    small: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiered.stream.feed._READING_NBYTES", 1)
    refused = threading.Event()

    def refuse(slab: Slab, start: int, nbytes: int) -> bool:
        refused.set()
        return False

    monkeypatch.setattr(Slab, "populate", refuse)
    gate = Gate()

    async def scenario() -> None:
        async with streaming(small, plan_with(small, frozenset({0, 1})), preadv=gate) as setup:
            assert await asyncio.to_thread(refused.wait, SECONDS)
            gate.open()
            for _ in range(2):
                await assert_pass(setup, small)

    asyncio.run(scenario())


def test_few_resident_blocks_are_read_at_once(small: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiered.stream.feed._READING_NBYTES", 1)
    gate = Gate()

    async def scenario() -> None:
        async with streaming(small, plan_with(small, frozenset(range(5))), preadv=gate) as setup:
            assert await asyncio.to_thread(gate.begun.wait, SECONDS)
            await asyncio.sleep(0.05)
            assert gate.count == 1
            await setup.rewind()
            gate.open()
            for _ in range(2):
                await assert_pass(setup, small)

    asyncio.run(scenario())


def test_reading_goes_on_while_a_block_is_in_use(small: Store) -> None:
    async def scenario() -> None:
        async with streaming(small, plan_with(small, frozenset(), "all")) as setup:
            block = await setup.following()
            await assert_reads(setup.reader, small.tape_nbytes)  # all the others, and no more than the ring holds
            await setup.release(block)

    asyncio.run(scenario())


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_no_more_blocks_are_read_ahead_than_allowed(small: Store, prefetch: int) -> None:
    async def scenario() -> None:
        async with streaming(small, plan_with(small, frozenset(), "all"), prefetch) as setup:
            for asked in range(1, 3):
                ahead = sum(block.file.units_nbytes for block in small.tape[: asked - 1 + prefetch])
                await assert_reads(setup.reader, ahead)
                await setup.passing()

    asyncio.run(scenario())


def test_nothing_is_read_beyond_the_end_until_it_is_lifted(small: Store) -> None:
    async def scenario() -> None:
        async with streaming(small, plan_with(small, frozenset(), "all")) as setup:
            setup.streamer.begin(is_last=True)
            for _ in small.tape:
                await setup.passing()
            await assert_reads(setup.reader, small.tape_nbytes)
            setup.streamer.begin()
            block = await setup.following()
            assert block.block == small.tape[0].name
            assert_right(small, block)
            await setup.release(block)

    asyncio.run(scenario())


def test_waiting_for_blocks_is_accounted_for(small: Store) -> None:
    gate = Gate()

    async def scenario() -> None:
        async with streaming(small, plan_with(small, frozenset()), preadv=gate) as setup:
            while_waited_for(setup.streamer._units, gate.open)
            await setup.passing()
            assert setup.streamer.wait_seconds >= 0.04
            assert setup.trace.total("wait").seconds == pytest.approx(setup.streamer.wait_seconds)

    asyncio.run(scenario())


@pytest.mark.parametrize("prefetch", [0, None])
@pytest.mark.parametrize("resident", [(), (2,), (0, 1, 2, 3, 4)])
def test_a_failed_read_surfaces_where_its_block_would_have_come(
    small: Store, resident: tuple[int, ...], prefetch: int | None
) -> None:
    async def scenario() -> None:
        plan = plan_with(small, frozenset(resident))
        async with streaming(small, plan, prefetch, failing_at("layer-002")) as setup:
            for _ in range(3):  # in every pass: what was not read is never taken for present
                for info in small.tape[:2]:
                    block = await setup.following()
                    assert block.block == info.name
                    assert_right(small, block)
                    await setup.release(block)
                with pytest.raises(ReadError, match=r"layer-002\.safetensors: read of .*\(EIO\)"):
                    await setup.following()
                await setup.rewind()

    asyncio.run(scenario())


def test_a_corrupt_block_surfaces_by_name(tmp_path: Path) -> None:
    store = write_store(tmp_path / "x", SIZES)
    with store.file_path(store.tape[1]).open("r+b") as file:
        file.seek(30_000)
        file.write(b"flipped")

    async def scenario() -> None:
        async with streaming(store, plan_with(store, frozenset({1}))) as setup:
            await setup.passing()
            with pytest.raises(StoreError, match=r"layer-001\.safetensors: chunk 1 .* is corrupt"):
                await setup.following()

    asyncio.run(scenario())


def test_a_block_that_does_not_decode_surfaces_by_name(tmp_path: Path) -> None:
    store = write_store(tmp_path / "x", SIZES, compressed=frozenset({0}))
    (unit,) = store.layout(store.tape[0]).units
    with store.file_path(store.tape[0]).open("r+b") as file:
        file.seek(unit.offset + unit.compressed[0].source.offset + 20)
        file.write(b"\xff" * 8)

    async def scenario() -> None:
        async with streaming(store, plan_with(store, frozenset()), policy=VerifyPolicy.NEVER) as setup:
            with pytest.raises(StoreError, match=r"layer-000\.weight: a damaged frame"):
                await setup.following()

    asyncio.run(scenario())


def test_an_error_in_the_feed_itself_surfaces_again_and_again(small: Store) -> None:
    plan = plan_with(small, frozenset())
    small_ring = Placement(frozenset(), 0, max(sizes_of(small)[:4]))  # too small for the head

    async def scenario() -> None:
        async with streaming(small, replace(plan, placement=small_ring)) as setup:
            for _ in range(2):
                for _ in range(4):
                    await setup.passing()
                with pytest.raises(AssertionError, match="of a ring of"):
                    await setup.following()
                await setup.rewind()

    asyncio.run(scenario())


def test_errors_that_nobody_asks_for_make_no_noise(small: Store, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with streaming(small, plan_with(small, frozenset(), "all"), preadv=failing_at("layer-")):
            await asyncio.sleep(0.1)

    with caplog.at_level(logging.WARNING, logger="asyncio"):
        asyncio.run(scenario())
        import gc

        gc.collect()
    assert caplog.records == []


@pytest.mark.parametrize("resident", [(), (0, 1, 2, 3, 4)])
def test_leaving_while_reads_run_leaves_nothing_behind(large: Store, resident: tuple[int, ...]) -> None:
    resident = tuple(i for i in resident if i < len(large.tape))

    class Late(Gate):
        ended = 0

        def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
            try:
                return super().__call__(fd, buffers, offset, flags)
            finally:
                with self._lock:
                    self.ended += 1

    gate = Late()

    async def scenario() -> None:
        before = asyncio.all_tasks()
        async with streaming(large, plan_with(large, frozenset(resident), "all"), preadv=gate) as setup:
            await asyncio.to_thread(gate.begun.wait)
            asyncio.get_running_loop().call_later(0.1, gate.open)
            await setup.inside.aclose()
            # The memory is free for others now: no thread reads into it any more.
            assert asyncio.all_tasks() == before
            assert gate.count == gate.ended
            count = gate.count
            await asyncio.sleep(0.05)
            assert gate.count == count

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))


def test_leaving_after_an_error_leaves_nothing_behind(large: Store) -> None:
    async def scenario() -> None:
        before = asyncio.all_tasks()
        async with streaming(large, plan_with(large, frozenset(), "all"), preadv=failing_at("layer-")) as setup:
            with pytest.raises(ReadError):
                await setup.following()
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))


def test_a_wait_ends_soon_when_it_is_cancelled_and_the_next_pass_loses_no_block(small: Store) -> None:
    gate = Gate()

    async def scenario() -> None:
        async with streaming(small, plan_with(small, frozenset()), preadv=gate) as setup:
            await asyncio.to_thread(gate.begun.wait)
            asyncio.get_running_loop().call_later(0.02, setup.cancel.set)
            with pytest.raises(InterruptedRun):
                await setup.following()
            setup.cancel.clear()
            rewinding = asyncio.ensure_future(setup.rewind())
            await asyncio.sleep(0.01)
            gate.open()
            await rewinding
            for _ in range(2):
                await assert_pass(setup, small)

    asyncio.run(scenario())


def test_resident_blocks_that_are_read_are_lent_without_the_loop(small: Store) -> None:
    async def scenario() -> None:
        async with streaming(small, plan_with(small, frozenset(range(len(SIZES))))) as setup:
            for _ in SIZES:
                await setup.passing()
            waited = setup.streamer.wait_seconds
            # In the loop's own thread: whoever waited for it here would wait for ever.
            for number, info in enumerate(small.tape):
                with setup.streamer.lend(number) as block:
                    assert block.block == info.name
                    assert_right(small, block)
            assert setup.streamer.wait_seconds == waited
            assert setup.reader.bytes_read == small.tape_nbytes

    asyncio.run(scenario())


@pytest.mark.parametrize("prefetch", [0, 1, None])
@pytest.mark.parametrize("resident", [(), (0, 3), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("stop", range(len(SIZES) + 1))
def test_after_rewinding_the_first_block_is_next_and_resident_ones_are_not_read_again(
    small: Store, resident: tuple[int, ...], prefetch: int | None, stop: int
) -> None:
    held = sum(small.tape[i].file.units_nbytes for i in resident)

    async def scenario() -> None:
        async with streaming(small, plan_with(small, frozenset(resident), "all"), prefetch) as setup:
            for _ in range(stop):
                await setup.passing()
            await setup.rewind()
            dropped = setup.reader.bytes_read
            for number in range(2):
                setup.streamer.begin(is_last=number == 1)
                await assert_pass(setup, small)
            streamed = 2 * (small.tape_nbytes - held)
            assert streamed <= setup.reader.bytes_read - dropped <= streamed + held
            assert setup.trace.total("verify").spans == len(small.tape)

    asyncio.run(scenario())


def test_rewinding_waits_for_reads_in_flight(large: Store) -> None:
    gate = Gate()

    async def scenario() -> None:
        async with streaming(large, plan_with(large, frozenset(), "all"), preadv=gate) as setup:
            await asyncio.to_thread(gate.begun.wait)
            rewinding = asyncio.ensure_future(setup.rewind())
            await asyncio.sleep(0.05)
            assert not rewinding.done()
            gate.open()
            await asyncio.wait_for(rewinding, SECONDS)
            for _ in range(2):
                await assert_pass(setup, large)

    asyncio.run(scenario())


def test_a_rewind_that_nobody_waits_for_does_not_outlive_the_streamer(large: Store) -> None:
    gate = Gate()

    async def scenario() -> None:
        # Of the resident blocks' reads, which a rewind leaves alone, some are still in flight when it has ended.
        async with streaming(large, plan_with(large, frozenset({0, 1}), "all"), preadv=gate) as setup:
            await asyncio.to_thread(gate.begun.wait)
            rewinding = asyncio.ensure_future(setup.rewind())
            await asyncio.sleep(0.01)
            closing = asyncio.ensure_future(setup.inside.aclose())
            await asyncio.sleep(0.01)
            gate.open()
            await asyncio.wait_for(asyncio.gather(rewinding, closing), SECONDS)

    asyncio.run(scenario())


def test_nothing_is_held_after_leaving(small: Store) -> None:
    async def scenario() -> None:
        async with streaming(small, plan_with(small, frozenset({0, 2}))) as setup:
            for _ in small.tape:
                await setup.passing()
            await setup.inside.aclose()
            assert setup.streamer._units._items == {}
            assert not any(loan._views for loan in setup.streamer._loans)

    asyncio.run(scenario())


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two layers of four units each, and a head of two, of one size."""
    folder = tmp_path_factory.mktemp("stream") / "cut.tiered"
    store = write_store(folder, [80_000, 80_000, 40_000])
    return in_units(store, folder / "units", in_twenties)


def cut_plan(store: Store, units: int, resident: frozenset[int] = frozenset(), held: Held = UNHELD) -> Plan:
    """A plan with a ring of so many units."""
    blocks = store.dense_units
    sizes = [unit.memory_nbytes for block in blocks for unit in block]
    tape = tape_of(sizes, counts=list(map(len, blocks)))
    placement = Placement(resident, sum(sizes[unit] for unit in resident), units * max(sizes))
    return replace(plan_of(sizes, budget=GIB), tape=tape, held=held, placement=placement)


async def in_thread(work: Callable[[], T], setup: Setup) -> T:
    try:
        return await asyncio.wait_for(asyncio.to_thread(work), SECONDS)
    except TimeoutError:
        setup.cancel.set()
        raise


def test_while_one_unit_is_computed_with_the_next_is_read_and_no_more_than_the_ring_holds(cut: Store) -> None:
    nbytes = cut.dense_units[0][0].nbytes

    async def scenario() -> None:
        async with streaming(cut, cut_plan(cut, 2)) as setup:
            read = 0
            for number, parts in ((0, 4), (1, 4), (2, 2)):
                with setup.streamer.lend(number) as loan:
                    for key in loan.parts("weight"):
                        await in_thread(functools.partial(loan.borrow, key), setup)
                        read += nbytes
                        await assert_reads(setup.reader, read + nbytes)
                        loan.release(key)
                    assert len(loan.parts("weight")) == parts

    asyncio.run(scenario())


def test_what_is_held_stays_until_its_block_ends(cut: Store) -> None:
    nbytes = cut.dense_units[0][0].nbytes

    async def scenario() -> None:
        async with streaming(cut, cut_plan(cut, 5, held=Held(layers=True))) as setup:
            for number in range(2):
                with setup.streamer.lend(number, is_held=True) as loan:
                    for _ in range(2):
                        for key in loan.parts("weight"):
                            await in_thread(functools.partial(loan.borrow, key), setup)
                            loan.release(key)
                    await assert_reads(setup.reader, (4 * number + 5) * nbytes)

    asyncio.run(scenario())


def test_units_that_nobody_asks_for_are_passed_by(cut: Store) -> None:
    async def scenario() -> None:
        for prefetch in (None, 0, 1):
            async with streaming(cut, cut_plan(cut, 2), prefetch) as setup:
                for _ in range(3):
                    for number in range(3):
                        with setup.streamer.lend(number) as loan:
                            if number == 1:
                                await in_thread(functools.partial(loan.borrow, loan.parts("weight")[0]), setup)

    asyncio.run(scenario())


def test_a_unit_for_which_the_ring_has_no_room_is_an_error_by_name(cut: Store) -> None:
    async def scenario() -> None:
        async with streaming(cut, cut_plan(cut, 2)) as setup:
            for _ in range(2):
                wanted = r"'opt': layer-000/unit-2 .*\(layer-000/unit-0, layer-000/unit-1\).* expected layer-000/unit-0"
                with pytest.raises(UnsupportedFamilyError, match=wanted), setup.streamer.lend(0, is_held=True) as loan:
                    for key in loan.parts("weight"):
                        await in_thread(functools.partial(loan.borrow, key), setup)
                with pytest.raises(AssertionError, match="rewind first"):
                    setup.streamer.begin()
                await setup.rewind()

    asyncio.run(scenario())


def test_a_unit_that_has_gone_is_an_error_by_name(cut: Store) -> None:
    async def scenario() -> None:
        async with streaming(cut, cut_plan(cut, 2, frozenset({1}))) as setup:
            with setup.streamer.lend(0) as loan:
                first, second, *_ = loan.parts("weight")
                for key in (first, second, second):
                    await in_thread(functools.partial(loan.borrow, key), setup)
                    loan.release(key)
                with pytest.raises(UnsupportedFamilyError, match=r"of unit unit-0 after .*, expected unit unit-2"):
                    loan.borrow(first)

    asyncio.run(scenario())
