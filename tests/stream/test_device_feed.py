"""Streaming to a device: the right bytes whatever is where, and every wait that keeps them right is needed.

The device is emulated, in its chaotic mode: copies are late and early, poison lies where nothing has arrived, and
clocks check what is ordered by events.
"""

import asyncio
import contextlib
import functools
import logging
import os
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import pytest
import torch

from tests.quick import represented
from tests.store.make import load_unit, write_mixture, write_store
from tests.store.units import in_units
from tests.stream.streaming import (
    Pending,
    Setup,
    compute,
    device_plan,
    failing_at,
    in_thread,
    in_twenties,
    streaming,
    tensors_of,
)
from tests.waiting import SECONDS, until, wait_until
from tiered.device import Event
from tiered.device.clocks import RaceError
from tiered.device.copies import POISON, EmulatedEvent
from tiered.device.emulated import EmulatedDevice
from tiered.errors import BudgetError, InterruptedRun, ReadError
from tiered.io import Arena, ChunkVerifier, DiskReader, VerifyPolicy
from tiered.kernels import CancelFlag
from tiered.plan import ExpertCachePlan, Held, Plan
from tiered.store import Store
from tiered.stream import ExpertCache
from tiered.stream.bus import Bus, tell_write
from tiered.stream.device_experts import DeviceExperts
from tiered.stream.device_feed import DeviceFeed
from tiered.trace import Tracer
from tiered.units import MIB

SIZES = (20_000, 60_000, 5_000, 33_000, 90_000)
NAMES = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Blocks of different sizes, one of them compressed."""
    return write_store(tmp_path_factory.mktemp("device") / "small.tiered", SIZES, compressed=frozenset({1}))


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two layers of four units each, and a head of two, of one size."""
    folder = tmp_path_factory.mktemp("device") / "cut.tiered"
    return in_units(write_store(folder, [80_000, 80_000, 40_000]), folder / "units", in_twenties)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_mixture(tmp_path_factory.mktemp("device") / "mixture.tiered", 2, 6)


def chaos(plan: Plan, seed: int = 0) -> EmulatedDevice:
    """A device whose memory is exactly what is planned."""
    assert plan.device is not None
    return EmulatedDevice(plan.device.vram, seed)


@contextmanager
def closing(device: EmulatedDevice) -> Iterator[EmulatedDevice]:
    try:
        yield device
    finally:
        device.close()


@asynccontextmanager
async def on_device(
    store: Store, plan: Plan, device: EmulatedDevice, prefetch: int | None = None, preadv: object = None
) -> AsyncIterator[Setup]:
    faults = {"preadv": preadv} if preadv is not None else {}
    with closing(device):
        async with streaming(store, plan, prefetch, device=device, **faults) as setup:  # type: ignore[arg-type]
            yield setup


async def passing(setup: Setup, store: Store, passes: int = 3, **how: bool) -> None:
    for number in range(passes):
        work = functools.partial(compute, setup, store, is_last=number == passes - 1, **how)
        await in_thread(setup, work)


@pytest.mark.parametrize("prefetch", represented([0, 1, None], [0, None]))
@pytest.mark.parametrize("rings", represented(["smallest", "full", "all"], ["smallest", "full"]))
@pytest.mark.parametrize(
    ("there", "in_ram"),
    [((), ()), ((1,), ()), ((0, 4), (1,)), ((), (0, 2, 4)), ((0, 1, 2, 3, 4), ()), ((1, 3), (0, 2, 4)), ((), range(5))],
)
def test_units_come_with_the_bytes_of_their_files_wherever_they_are(
    small: Store, there: Sequence[int], in_ram: Sequence[int], rings: str, prefetch: int | None
) -> None:
    async def scenario(seed: int) -> None:
        plan = device_plan(small, there, in_ram, rings)
        async with on_device(small, plan, chaos(plan, seed), prefetch) as setup:
            await passing(setup, small)

    for seed in range(2):
        asyncio.run(scenario(seed))


@pytest.mark.parametrize("seed", range(6))
def test_no_schedule_of_copies_changes_a_byte(small: Store, seed: int) -> None:
    async def scenario() -> None:
        plan = device_plan(small, (2,), (0,), "smallest")
        async with on_device(small, plan, chaos(plan, seed)) as setup:
            await passing(setup, small, 6)

    asyncio.run(scenario())


@pytest.mark.parametrize("prefetch", [0, None])
@pytest.mark.parametrize("there", [(), (1, 6), tuple(range(10))])
def test_units_of_a_block_that_is_held_stay_until_it_ends(
    cut: Store, there: Sequence[int], prefetch: int | None
) -> None:
    async def scenario() -> None:
        plan = device_plan(cut, there, (2,) if len(there) < 10 else (), held=Held(layers=True, head=True))
        async with on_device(cut, plan, chaos(plan), prefetch) as setup:
            await passing(setup, cut, is_held=True)

    asyncio.run(scenario())


def test_the_memory_of_the_device_is_what_is_planned_and_a_page_less_is_refused(small: Store) -> None:
    plan = device_plan(small, (1,), (0,))
    assert plan.device is not None
    nbytes, device = plan.device.placement.nbytes, chaos(plan)

    async def scenario(device: EmulatedDevice) -> None:
        async with on_device(small, plan, device) as setup:
            await passing(setup, small)
            assert device.in_use == {"ring of weights": plan.device.placement.ring_nbytes, "resident weights": 61440}  # type: ignore[union-attr]

    asyncio.run(scenario(device))
    assert device.peak_nbytes == nbytes and device.in_use == {}
    less = EmulatedDevice(nbytes - 4096)
    with pytest.raises(BudgetError, match="resident weights"):
        asyncio.run(scenario(less))
    assert less.in_use == {}


@pytest.mark.parametrize("prefetch", [0, 1, None])
def test_what_stays_somewhere_is_read_once_and_only_what_stays_on_the_device_is_copied_once(
    small: Store, prefetch: int | None
) -> None:
    sizes, files = [u.memory_nbytes for b in small.dense_units for u in b], [b.file.units_nbytes for b in small.tape]

    async def scenario() -> None:
        plan = device_plan(small, (1, 2), (0,))
        async with on_device(small, plan, chaos(plan), prefetch) as setup:
            await passing(setup, small, 4)
            copied = sum(sizes[1:3]) + 4 * (sizes[0] + sum(sizes[3:]))
            await until(lambda: setup.streamer.bus_nbytes >= copied)  # it is counted behind the computation
            await asyncio.sleep(0.05)
            assert setup.reader.bytes_read == sum(files[:3]) + 4 * sum(files[3:])
            assert setup.streamer.bus_nbytes == copied
            bus = setup.trace.total("bus")
            assert bus.nbytes == setup.streamer.bus_nbytes and bus.spans == 2 + 4 * 3
            assert bus.seconds == pytest.approx(setup.streamer.bus_seconds) and bus.seconds > 0
            assert setup.streamer.stalled_seconds > 0

    asyncio.run(scenario())


@pytest.mark.parametrize("prefetch", [0, None])
@pytest.mark.parametrize("stop", range(len(SIZES) + 1))
def test_after_a_pass_that_did_not_end_the_first_block_is_next(small: Store, stop: int, prefetch: int | None) -> None:
    async def scenario() -> None:
        plan = device_plan(small, (1,), (3,))
        async with on_device(small, plan, chaos(plan, stop), prefetch) as setup:
            for _ in range(2):
                with contextlib.suppress(asyncio.CancelledError):
                    await in_thread(setup, functools.partial(compute, setup, small, stop))
                await setup.rewind()
            await passing(setup, small)

    asyncio.run(scenario())


@pytest.mark.parametrize("prefetch", [0, None])
@pytest.mark.parametrize(("there", "in_ram"), [((), ()), ((2,), ()), ((), (2,)), ((0, 1, 2, 3, 4), ())])
def test_a_failed_read_surfaces_where_its_unit_would_have_come_until_it_can_be_read(
    small: Store, there: Sequence[int], in_ram: Sequence[int], prefetch: int | None
) -> None:
    is_broken, failing = [True], failing_at("layer-002")

    def preadv(fd: int, buffers: Sequence[memoryview], at: int, flags: int, /) -> int:
        return (failing if is_broken[0] else os.preadv)(fd, buffers, at, flags)

    async def scenario() -> None:
        plan = device_plan(small, there, in_ram)
        async with on_device(small, plan, chaos(plan), prefetch, preadv) as setup:
            for is_next_broken in (True, False):
                with pytest.raises(ReadError, match=r"layer-002\.safetensors: read of .*\(EIO\)"):
                    await in_thread(setup, functools.partial(compute, setup, small))
                is_broken[0] = is_next_broken  # a rewind begins to read again
                await setup.rewind()
            await passing(setup, small)

    asyncio.run(scenario())


class Flaky(EmulatedDevice):
    """Fails to copy what is so large."""

    def __init__(self, plan: Plan, nbytes: int) -> None:
        self.nbytes = nbytes
        assert plan.device is not None
        super().__init__(plan.device.vram)

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if source.nbytes == self.nbytes:
            raise RuntimeError("the bus is broken")
        super().move(source, target)


@pytest.mark.parametrize(("there", "in_ram"), [((), ()), ((3,), ()), ((), (3,))])
def test_a_failed_copy_surfaces_where_its_unit_would_have_come(
    small: Store, there: Sequence[int], in_ram: Sequence[int]
) -> None:
    async def scenario() -> None:
        plan = device_plan(small, there, in_ram)
        device = Flaky(plan, small.dense_units[3][0].memory_nbytes)
        async with on_device(small, plan, device) as setup:
            for next_broken in (device.nbytes, 0):
                with pytest.raises(RuntimeError, match="the bus is broken"):
                    await in_thread(setup, functools.partial(compute, setup, small))
                device.nbytes = next_broken  # a rewind begins to copy again
                await setup.rewind()
            await passing(setup, small)

    asyncio.run(scenario())


@pytest.mark.parametrize("stop", [None, 0, 2])
@pytest.mark.parametrize("there", [(), (1, 3), (0, 1, 2, 3, 4)])
def test_leaving_in_the_middle_leaves_nothing_behind(small: Store, there: Sequence[int], stop: int | None) -> None:
    async def scenario() -> None:
        before, threads = asyncio.all_tasks(), threading.active_count()
        plan = device_plan(small, there, (2,) if len(there) < 5 else ())
        device = chaos(plan)
        async with on_device(small, plan, device) as setup:
            if stop is not None:
                await in_thread(setup, functools.partial(compute, setup, small, stop))
            await asyncio.wait_for(setup.inside.aclose(), SECONDS)
            assert asyncio.all_tasks() == before and device.in_use == {} and device._registered == {}
        # The loop's own may be left; the one that has computed ends by and by.
        wait_until(lambda: threading.active_count() <= threads + 1)

    asyncio.run(scenario())


def test_a_wait_ends_soon_when_it_is_cancelled_and_the_next_pass_loses_no_unit(small: Store) -> None:
    gate = threading.Event()

    def preadv(fd: int, buffers: Sequence[memoryview], at: int, flags: int, /) -> int:
        assert gate.wait(SECONDS)
        return os.preadv(fd, buffers, at, flags)

    async def scenario() -> None:
        plan = device_plan(small, (1,))
        async with on_device(small, plan, chaos(plan), preadv=preadv) as setup:
            asyncio.get_running_loop().call_later(0.02, setup.cancel.set)
            with pytest.raises(InterruptedRun):
                await in_thread(setup, functools.partial(compute, setup, small))
            setup.cancel.clear()
            gate.set()
            await setup.rewind()
            await passing(setup, small)

    asyncio.run(scenario())


def test_units_that_nobody_asks_for_are_passed_by(cut: Store) -> None:
    def some(setup: Setup) -> None:
        setup.streamer.begin()
        for number in range(3):
            with setup.streamer.lend(number) as loan:
                if number == 1:
                    loan.borrow(loan.parts("weight")[0])

    async def scenario(prefetch: int | None, seed: int) -> None:
        plan = device_plan(cut, (7,), (2,), "smallest")
        async with on_device(cut, plan, chaos(plan, seed), prefetch) as setup:
            for _ in range(3):
                await in_thread(setup, functools.partial(some, setup))
            await passing(setup, cut)

    for seed, prefetch in enumerate((None, 0, 1, None, None)):
        asyncio.run(scenario(prefetch, seed))


class Slow(EmulatedDevice):
    """Copies nothing until its gate is open."""

    def __init__(self, plan: Plan) -> None:
        assert plan.device is not None
        super().__init__(plan.device.vram, mode="plain")
        self.issued, self.gate = 0, threading.Event()

    def copy_in(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        self.issued += 1
        return super().copy_in(source, target, after)

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        assert self.gate.wait(SECONDS)
        super().move(source, target)


@pytest.mark.parametrize("there", [(), (0, 1, 2, 3, 4)])
def test_few_copies_are_on_their_way_so_that_little_is_waited_for(
    small: Store, there: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiered.stream.bus._ON_THE_WAY_NBYTES", 1)

    async def scenario() -> None:
        plan = device_plan(small, there, rings="all")
        device = Slow(plan)
        async with on_device(small, plan, device) as setup:
            await until(lambda: device.issued >= 2)
            await asyncio.sleep(0.05)
            assert device.issued == 2
            device.gate.set()
            await passing(setup, small)

    asyncio.run(scenario())


def test_a_view_of_a_unit_that_has_been_given_back_shows_poison(small: Store) -> None:
    async def scenario() -> None:
        plan = device_plan(small, rings="all")

        def work() -> None:
            with setup.streamer.lend(0) as loan:
                (name,) = loan.names
                view = loan.borrow(name)
                assert isinstance(view, torch.Tensor) and not bool((view == POISON).all())
                loan.release(name)
                assert bool((view == POISON).all())

        async with on_device(small, plan, chaos(plan)) as setup:
            await in_thread(setup, work)

    asyncio.run(scenario())


def test_host_memory_is_registered_once_and_a_refusal_is_told_once(
    small: Store, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing(EmulatedDevice):
        asked = 0

        def register(self, address: int, nbytes: int) -> str | None:
            self.asked += 1
            return "there is not enough memory to lock"

    plan = device_plan(small, (1,), (0, 3))
    assert plan.device is not None
    refusing, willing = Refusing(plan.device.vram), chaos(plan)

    async def scenario(device: EmulatedDevice, nbytes: int) -> None:
        async with on_device(small, plan, device) as setup:
            await passing(setup, small)
            assert sum(device._registered.values()) == nbytes

    asyncio.run(scenario(willing, plan.placement.nbytes))
    assert willing._registered == {} and caplog.records == []
    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario(refusing, 0))
    assert refusing.asked == 1
    (told,) = caplog.messages
    assert told == "copies to emulated are staged, and so slower: there is not enough memory to lock"


def test_a_start_that_is_cancelled_leaves_no_memory_registered(small: Store) -> None:
    class Slow(EmulatedDevice):
        began, may_go_on, calls = threading.Event(), threading.Event(), 0

        def register(self, address: int, nbytes: int) -> str | None:
            self.calls += 1
            self.began.set()
            assert self.may_go_on.wait(SECONDS)
            return super().register(address, nbytes)

    plan = device_plan(small, (1,), (0, 3))
    assert plan.device is not None
    device = Slow(plan.device.vram)

    async def start() -> None:
        async with on_device(small, plan, device):
            pass

    async def scenario() -> None:
        starting = asyncio.create_task(start())
        await asyncio.to_thread(device.began.wait, SECONDS)
        for _ in range(2):
            starting.cancel()
            await asyncio.sleep(0.01)
        assert not starting.done()
        device.may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert device._registered == {} and device.in_use == {}

    asyncio.run(scenario())


class NoWait(EmulatedDevice):
    """Computing does not wait for copies."""

    def wait_for(self, event: Event) -> None:
        pass


async def no_wait(self: Bus, event: Event) -> None:
    """The host does not wait for copies."""


async def not_settled(self: Bus) -> None:
    """Nobody waits for copies in flight before memory is used for something else."""


def test_computing_must_wait_for_copies(small: Store) -> None:
    async def scenario(seed: int) -> None:
        plan = device_plan(small, (1,), (0,))
        assert plan.device is not None
        async with on_device(small, plan, NoWait(plan.device.vram, seed)) as setup:
            await passing(setup, small)

    for seed in range(3):
        with pytest.raises(RaceError, match=r"^computing \(computing\), reading .* behind copying to the device"):
            asyncio.run(scenario(seed))


@pytest.mark.parametrize(
    ("of", "name", "instead", "told"),
    [
        (
            DeviceFeed,
            "_last_uses",
            lambda feed, span: [],
            r"^copying to the device .* behind (computing|discarding) \(computing\)",
        ),
        (Bus, "until_done", no_wait, r"^(writing memory of the host|giving memory back) \(the host\)"),
    ],
    ids=["a copy into a slot for the slot's last use", "reads into the host's ring for the copy from there"],
)
def test_each_other_wait_is_needed(
    small: Store, of: type, name: str, instead: object, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of, name, instead)

    async def scenario(seed: int) -> None:
        plan = device_plan(small, (), (0,))
        async with on_device(small, plan, chaos(plan, seed)) as setup:
            await passing(setup, small)

    for seed in range(3):
        with pytest.raises(RaceError, match=told):
            asyncio.run(scenario(seed))


def test_the_ring_is_used_again_only_when_what_stays_on_the_device_has_been_copied_from_it(
    small: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bus, "settled", not_settled)
    # Of eight runs one is enough that uses the ring again while the copy is held back, a tenth of a second or so.
    monkeypatch.setattr("tiered.device.copies._LATE_SECONDS", 0.2)

    async def scenario(seed: int) -> None:
        plan = device_plan(small, (4,))
        async with on_device(small, plan, chaos(plan, seed)) as setup:
            await passing(setup, small)

    caught = 0
    for seed in range(8):
        try:
            asyncio.run(scenario(seed))
        except RaceError as error:
            assert "(the host)" in str(error)
            caught += 1
    assert caught > 0


def test_after_a_rewind_slots_are_free_only_behind_what_was_computed_before(
    small: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DeviceFeed._restart

    def forgetful(self: DeviceFeed) -> None:
        original(self)
        self._freed.clear()

    monkeypatch.setattr(DeviceFeed, "_restart", forgetful)

    async def scenario() -> None:
        plan = device_plan(small, rings="smallest")
        async with on_device(small, plan, chaos(plan)) as setup:
            await in_thread(setup, functools.partial(compute, setup, small, 1))
            await setup.rewind()
            await passing(setup, small)

    with pytest.raises(RaceError, match=r"^copying to the device .* behind (computing|discarding) \(computing\)"):
        asyncio.run(scenario())


@contextmanager
def caching(
    store: Store, device: EmulatedDevice, slots: int, kind: type[DeviceExperts] = DeviceExperts
) -> Iterator[tuple[ExpertCache, DeviceExperts]]:
    trace, size = Tracer(), max(unit.memory_nbytes for unit in store.expert_units[0])
    plan = ExpertCachePlan(slots, size)
    verifier = ChunkVerifier(VerifyPolicy.FIRST, trace, store.path)
    with Arena(plan.nbytes) as arena, DiskReader(store.path, verifier, trace, 4) as reader, closing(device):
        memory = arena.borrow(plan.nbytes, "experts")
        cache, bus = ExpertCache(store, plan, memory, reader, trace, CancelFlag()), Bus(trace)
        cache.on_write, there = functools.partial(tell_write, device), kind(device, size, bus)
        there.open()
        yield cache, there
        cache.rewind()
        there.close()
        bus.close()
        assert device.in_use == {} and bus.nbytes == trace.total("bus").nbytes > 0


def go_through(cache: ExpertCache, there: DeviceExperts, store: Store) -> None:
    for layer, chosen in [(0, [0, 3, 5]), (1, [1, 3]), (0, range(6)), (1, [0, 1, 2, 5]), (1, [])] * 2:
        cache.begin(None)
        for expert, matrices in cache.each(layer, dict.fromkeys(chosen, 1), NAMES, there):
            unit = store.expert_units[layer][expert]
            memory = load_unit(store.path, unit)
            for matrix, weight in zip(matrices, unit.weights.values(), strict=True):
                pairs = zip(tensors_of(matrix), tensors_of(weight.view(memory)), strict=True)
                assert all(torch.equal(found, right) for found, right in pairs)


@pytest.mark.parametrize("slots", [1, 4, 12])
def test_chosen_experts_come_to_the_device_with_the_bytes_of_their_files(mixture: Store, slots: int) -> None:
    for seed in range(3):
        device = EmulatedDevice(MIB, seed)
        with caching(mixture, device, slots) as both:
            go_through(*both, mixture)
        assert device.peak_nbytes == 2 * mixture.expert_units[0][0].memory_nbytes


class Blind(DeviceExperts):
    """Copies into slots that may still be computed with."""

    def release(self) -> None:
        super().release()
        self._freed = [()] * len(self._freed)


def test_an_expert_is_copied_only_behind_the_last_use_of_its_slot(mixture: Store) -> None:
    device = EmulatedDevice(MIB)
    with pytest.raises(RaceError, match=r"^copying to the device"), caching(mixture, device, 4, Blind) as both:
        go_through(*both, mixture)


def test_experts_come_into_memory_that_is_borrowed_again_behind_what_was_computed_there(mixture: Store) -> None:
    device = Pending(MIB)
    with caching(mixture, device, 4) as (cache, there):
        for _ in range(2):
            go_through(cache, there, mixture)
            there.close()
            device.is_used = True


def test_a_rewind_in_the_middle_of_experts_loses_none(mixture: Store) -> None:
    with caching(mixture, EmulatedDevice(MIB), 3) as (cache, there):
        cache.begin(None)
        going = cache.each(0, dict.fromkeys(range(6), 1), NAMES, there)
        next(going)
        next(going)
        going.close()  # type: ignore[attr-defined]
        cache.rewind()
        there.release_all()
        go_through(cache, there, mixture)


def test_an_expert_is_read_over_another_only_when_that_has_been_copied(
    mixture: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmulatedEvent, "wait", lambda event: None)
    with (
        pytest.raises(RaceError, match=r"^(writing memory of the host|giving memory back) \(the host\)"),
        caching(mixture, EmulatedDevice(MIB), 1) as both,
    ):
        go_through(*both, mixture)
