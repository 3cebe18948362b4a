"""The streamer: blocks in tape order with the right bytes, no byte read twice, no error lost, no task left."""

import asyncio
import errno
import logging
import os
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.store.make import load_unit, write_store
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import InterruptedRun, ReadError, StoreError
from tiered.io import Arena, ChunkVerifier, DiskReader, Faults, VerifyPolicy
from tiered.kernels import CancelFlag
from tiered.plan import Placement, place
from tiered.plan.placement import full_ring, interleave, smallest_ring
from tiered.store import CHUNK_NBYTES, Store
from tiered.stream import LoadedBlock, Streamer
from tiered.trace import Tracer

DOCS = Path(__file__).parents[1] / "data/models/opt-docs-8m"
SECONDS = 20.0
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


@dataclass
class Setup:
    streamer: Streamer
    reader: DiskReader
    trace: Tracer
    cancel: CancelFlag
    inside: AsyncExitStack
    """Closing it leaves the streamer, while reader and memory stay."""
    lent: dict[LoadedBlock, AbstractContextManager[LoadedBlock]] = field(default_factory=dict)

    async def following(self) -> LoadedBlock:
        """The next block, lent to another thread than the loop's; a streamer that hangs fails."""
        lending = self.streamer.lend()
        try:
            block = await asyncio.wait_for(asyncio.to_thread(lending.__enter__), SECONDS)
        except TimeoutError:
            self.cancel.set()  # or the thread would wait for ever
            raise
        self.lent[block] = lending
        return block

    async def release(self, block: LoadedBlock) -> None:
        self.lent.pop(block).__exit__(None, None, None)
        await asyncio.sleep(0)

    async def passing(self) -> None:
        """The next block comes and goes."""
        await self.release(await self.following())


def sizes_of(store: Store) -> list[int]:
    return [store.layout(block).memory_nbytes for block in store.tape]


def placement_of(store: Store, resident: frozenset[int], ring: str = "full") -> Placement:
    sizes = sizes_of(store)
    held = sum(sizes[i] for i in resident)
    streamed = [n for i, n in enumerate(sizes) if i not in resident]
    if not streamed:
        return Placement(resident, held, 0)
    nbytes = {"smallest": smallest_ring(streamed), "full": full_ring(streamed), "all": sum(streamed)}
    return Placement(resident, held, nbytes[ring])


@asynccontextmanager
async def streaming(
    store: Store,
    placement: Placement,
    prefetch: int | None = None,
    preadv: Faults = os.preadv,
    policy: VerifyPolicy = VerifyPolicy.FIRST,
) -> AsyncIterator[Setup]:
    """A streamer over memory that is exactly as large as planned."""
    trace, cancel = Tracer(keep_spans=True), CancelFlag()
    with Arena(placement.nbytes + 4096 * (len(store.tape) + 1)) as arena:
        sizes = sizes_of(store)
        resident = {i: arena.borrow(sizes[i], "resident") for i in sorted(placement.resident)}
        ring = arena.borrow(placement.ring_nbytes, "ring") if placement.ring_nbytes else None
        with DiskReader(store.path, ChunkVerifier(policy, trace), trace, 4, preadv=preadv) as reader:
            async with AsyncExitStack() as inside:
                streamer = Streamer(store, placement, reader, resident, ring, trace, cancel, prefetch)
                yield Setup(await inside.enter_async_context(streamer), reader, trace, cancel, inside)


async def assert_reads(reader: DiskReader, nbytes: int) -> None:
    """The reader gets to `nbytes`, and no further by itself."""
    for _ in range(int(SECONDS / 0.01)):
        if reader.bytes_read >= nbytes:
            break
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.03)
    assert reader.bytes_read == nbytes


def assert_right(store: Store, block: LoadedBlock) -> None:
    """The block's memory holds its units, and behind each what is decoded."""
    start = 0
    for unit in store.layout(block.info).units:
        expected, found = load_unit(store.path, unit), block.memory[start : start + unit.memory_nbytes]
        targets = [(item.target.offset, item.target.nbytes) for item in unit.compressed]
        for offset, nbytes in [(0, unit.nbytes), *targets]:
            assert torch.equal(found[offset : offset + nbytes], expected[offset : offset + nbytes])
        start += unit.memory_nbytes


async def assert_pass(setup: Setup, store: Store) -> None:
    """Every block of the tape comes, in order and with the right bytes."""
    for info in store.tape:
        block = await setup.following()
        assert block.info == info
        assert_right(store, block)
        await setup.release(block)


def test_weights_go_by_their_names_inside_the_block(docs: Store) -> None:
    async def scenario() -> None:
        async with streaming(docs, placement_of(docs, frozenset())) as setup:
            block = await setup.following()
            names = block.weights
            assert "self_attn.q_proj.weight" in names and "final_layer_norm.bias" in names
            assert len(names) == len(docs.layout(block.info).weights)

    asyncio.run(scenario())


@pytest.mark.parametrize("prefetch", [0, 1, 3, None])
@pytest.mark.parametrize("ring", ["smallest", "full", "all"])
@pytest.mark.parametrize("resident", [(), (1,), (0, 4), (0, 1, 2, 3), (0, 1, 2, 3, 4)])
def test_blocks_come_in_order_with_the_right_bytes(
    small: Store, resident: tuple[int, ...], ring: str, prefetch: int | None
) -> None:
    async def scenario() -> None:
        async with streaming(small, placement_of(small, frozenset(resident), ring), prefetch) as setup:
            for _ in range(3):
                await assert_pass(setup, small)

    asyncio.run(scenario())


@pytest.mark.parametrize("prefetch", [0, None])
@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_a_converted_model_arrives_whole(docs: Store, count: int, prefetch: int | None) -> None:
    async def scenario() -> None:
        resident = interleave(count, len(docs.tape))
        async with streaming(docs, placement_of(docs, resident), prefetch) as setup:
            for _ in range(2):
                await assert_pass(setup, docs)

    asyncio.run(scenario())


@pytest.mark.parametrize("policy", VerifyPolicy)
def test_blocks_of_several_chunks_arrive_whole(large: Store, policy: VerifyPolicy) -> None:
    async def scenario() -> None:
        async with streaming(large, placement_of(large, frozenset({1})), policy=policy) as setup:
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
        async with streaming(small, placement_of(small, frozenset(resident)), prefetch) as setup:
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
    placement = place(sizes, int(max(sizes) + share * (sum(sizes) - max(sizes))))
    assert placement is not None

    async def scenario() -> None:
        async with streaming(small, placement) as setup:
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


def test_reading_goes_on_while_a_block_is_in_use(small: Store) -> None:
    async def scenario() -> None:
        async with streaming(small, placement_of(small, frozenset(), "all")) as setup:
            block = await setup.following()
            await assert_reads(setup.reader, small.tape_nbytes)  # all the others, and no more than the ring holds
            await setup.release(block)

    asyncio.run(scenario())


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_no_more_blocks_are_read_ahead_than_allowed(small: Store, prefetch: int) -> None:
    async def scenario() -> None:
        async with streaming(small, placement_of(small, frozenset(), "all"), prefetch) as setup:
            for asked in range(1, 3):
                ahead = sum(block.file.units_nbytes for block in small.tape[: asked - 1 + prefetch])
                await assert_reads(setup.reader, ahead)
                await setup.passing()

    asyncio.run(scenario())


def test_nothing_is_read_beyond_the_end_until_it_is_lifted(small: Store) -> None:
    async def scenario() -> None:
        async with streaming(small, placement_of(small, frozenset(), "all")) as setup:
            setup.streamer.begin(is_last=True)
            for _ in small.tape:
                await setup.passing()
            await assert_reads(setup.reader, small.tape_nbytes)
            waiting = asyncio.ensure_future(setup.following())
            await asyncio.sleep(0.05)
            assert not waiting.done()
            setup.streamer.begin()
            block = await waiting
            assert block.info == small.tape[0]
            assert_right(small, block)

    asyncio.run(scenario())


def test_waiting_for_blocks_is_accounted_for(small: Store) -> None:
    gate = Gate()

    async def scenario() -> None:
        async with streaming(small, placement_of(small, frozenset()), preadv=gate) as setup:
            asyncio.get_running_loop().call_later(0.05, gate.open)
            await setup.following()
            assert setup.streamer.wait_seconds >= 0.04
            assert setup.trace.total("wait").seconds == pytest.approx(setup.streamer.wait_seconds)

    asyncio.run(scenario())


def failing_at(name: str, offset: int = 0) -> Faults:
    def preadv(fd: int, buffers: Sequence[memoryview], at: int, flags: int, /) -> int:
        if at >= offset and name in str(Path(f"/proc/self/fd/{fd}").readlink()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(fd, buffers, at, flags)

    return preadv


@pytest.mark.parametrize("prefetch", [0, None])
@pytest.mark.parametrize("resident", [(), (2,), (0, 1, 2, 3, 4)])
def test_a_failed_read_surfaces_where_its_block_would_have_come(
    small: Store, resident: tuple[int, ...], prefetch: int | None
) -> None:
    async def scenario() -> None:
        placement = placement_of(small, frozenset(resident))
        async with streaming(small, placement, prefetch, failing_at("layer-002")) as setup:
            for _ in range(3):  # in every pass: what was not read is never taken for present
                for info in small.tape[:2]:
                    block = await setup.following()
                    assert block.info == info
                    assert_right(small, block)
                    await setup.release(block)
                with pytest.raises(ReadError, match=r"layer-002\.safetensors: read of .*\(EIO\)"):
                    await setup.following()
                await setup.streamer.rewind()

    asyncio.run(scenario())


def test_a_corrupt_block_surfaces_by_name(tmp_path: Path) -> None:
    store = write_store(tmp_path / "x", SIZES)
    with store.file_path(store.tape[1]).open("r+b") as file:
        file.seek(30_000)
        file.write(b"flipped")

    async def scenario() -> None:
        async with streaming(store, placement_of(store, frozenset({1}))) as setup:
            await setup.passing()
            with pytest.raises(StoreError, match=r"layer-001\.safetensors: chunk 1 .* is corrupt"):
                await setup.following()

    asyncio.run(scenario())


def test_a_block_that_does_not_decode_surfaces_by_name(tmp_path: Path) -> None:
    store = write_store(tmp_path / "x", SIZES, compressed=frozenset({0}))
    (unit,) = store.layout(store.tape[0]).units
    with store.file_path(store.tape[0]).open("r+b") as file:
        file.seek(unit.offset + unit.compressed[0].source.offset + 40)
        file.write(b"flipped")

    async def scenario() -> None:
        async with streaming(store, placement_of(store, frozenset()), policy=VerifyPolicy.NEVER) as setup:
            with pytest.raises(StoreError, match=r"layer-000\.weight: damaged zstd frame"):
                await setup.following()

    asyncio.run(scenario())


def test_an_error_in_the_feed_itself_surfaces_again_and_again(small: Store) -> None:
    sizes = sizes_of(small)

    async def scenario() -> None:
        placement = Placement(frozenset(), 0, max(sizes[:4]))  # too small for the head
        async with streaming(small, placement) as setup:
            for _ in range(4):
                await setup.passing()
            for _ in range(2):
                with pytest.raises(AssertionError, match="in a ring of"):
                    await setup.following()

    asyncio.run(scenario())


def test_errors_that_nobody_asks_for_make_no_noise(small: Store, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with streaming(small, placement_of(small, frozenset(), "all"), preadv=failing_at("layer-")):
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
        async with streaming(large, placement_of(large, frozenset(resident), "all"), preadv=gate) as setup:
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
        async with streaming(large, placement_of(large, frozenset(), "all"), preadv=failing_at("layer-")) as setup:
            with pytest.raises(ReadError):
                await setup.following()
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))


def test_a_wait_ends_soon_when_it_is_cancelled_and_loses_no_block(small: Store) -> None:
    gate = Gate()

    async def scenario() -> None:
        async with streaming(small, placement_of(small, frozenset()), preadv=gate) as setup:
            await asyncio.to_thread(gate.begun.wait)
            for _ in range(3):
                asyncio.get_running_loop().call_later(0.02, setup.cancel.set)
                with pytest.raises(InterruptedRun):
                    await setup.following()
                setup.cancel.clear()
            gate.open()
            for number in range(7):
                block = await setup.following()
                assert block.info == small.tape[number % len(small.tape)]
                assert_right(small, block)
                await setup.release(block)

    asyncio.run(scenario())


def test_resident_blocks_that_are_read_are_lent_without_the_loop(small: Store) -> None:
    async def scenario() -> None:
        async with streaming(small, placement_of(small, frozenset(range(len(SIZES))))) as setup:
            for _ in SIZES:
                await setup.passing()
            waited = setup.streamer.wait_seconds
            # In the loop's own thread: whoever waited for it here would wait for ever.
            for info in small.tape:
                with setup.streamer.lend() as block:
                    assert block.info == info and block.span is None
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
        async with streaming(small, placement_of(small, frozenset(resident), "all"), prefetch) as setup:
            for _ in range(stop):
                await setup.passing()
            await setup.streamer.rewind()
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
        async with streaming(large, placement_of(large, frozenset(), "all"), preadv=gate) as setup:
            await asyncio.to_thread(gate.begun.wait)
            rewinding = asyncio.ensure_future(setup.streamer.rewind())
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
        async with streaming(large, placement_of(large, frozenset({0, 1}), "all"), preadv=gate) as setup:
            await asyncio.to_thread(gate.begun.wait)
            rewinding = asyncio.ensure_future(setup.streamer.rewind())
            await asyncio.sleep(0.01)
            closing = asyncio.ensure_future(setup.inside.aclose())
            await asyncio.sleep(0.01)
            gate.open()
            await asyncio.wait_for(asyncio.gather(rewinding, closing), SECONDS)

    asyncio.run(scenario())


def test_nothing_is_held_after_leaving(small: Store) -> None:
    async def scenario() -> None:
        async with streaming(small, placement_of(small, frozenset({0, 2}))) as setup:
            for _ in small.tape:
                await setup.passing()
            await setup.inside.aclose()
            assert setup.streamer._blocks._items == {}

    asyncio.run(scenario())
