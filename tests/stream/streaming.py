"""A streamer over memory that is exactly as large as planned, and what is compared with a store's files."""

import asyncio
import contextlib
import errno
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tests.plan.plans import plan_of, tape_of
from tests.store.make import load_unit
from tests.store.units import Group, Rows
from tests.waiting import SECONDS, wait_until
from tiered.device import Device
from tiered.device.emulated import EmulatedDevice
from tiered.errors import InterruptedRun
from tiered.io import Arena, ChunkVerifier, DiskReader, Faults, VerifyPolicy
from tiered.kernels import CancelFlag
from tiered.plan import DeviceNeeds, DevicePlan, Held, Placement, Plan, full_ring
from tiered.plan.placement import UNHELD, smallest_ring
from tiered.quant import QuantizedWeight
from tiered.store import CHUNK_NBYTES, BlockInfo, Store
from tiered.stream import AnyWeight, Handover, Loan, Streamer
from tiered.trace import Tracer
from tiered.units import GIB


@dataclass
class Setup:
    streamer: Streamer
    reader: DiskReader
    trace: Tracer
    cancel: CancelFlag
    inside: AsyncExitStack
    """Closing it leaves the streamer, while reader and memory stay."""
    next: int = 0
    lent: dict[Loan, AbstractContextManager[Loan]] = field(default_factory=dict)

    async def following(self) -> Loan:
        """The next block, with all its weights borrowed by another thread than the loop's; what hangs fails."""
        lending = self.streamer.lend(self.next)

        def borrow() -> Loan:
            loan = lending.__enter__()
            try:
                for name in loan.names:
                    loan.borrow(name)
            except BaseException as error:
                with contextlib.suppress(type(error)):
                    lending.__exit__(type(error), error, None)
                raise
            return loan

        try:
            loan = await asyncio.wait_for(asyncio.to_thread(borrow), SECONDS)
        except InterruptedRun:
            raise
        except TimeoutError:
            self.cancel.set()  # or the thread would wait for ever
            raise
        self.lent[loan] = lending
        self.next = (self.next + 1) % len(self.streamer._loans)
        return loan

    async def release(self, loan: Loan) -> None:
        self.lent.pop(loan).__exit__(None, None, None)
        await asyncio.sleep(0)

    async def passing(self) -> None:
        """The next block comes and goes."""
        await self.release(await self.following())

    async def rewind(self) -> None:
        await self.streamer.rewind()
        self.next = 0


def while_waited_for(items: Handover[Any], call: Callable[[], object]) -> None:
    """Have another thread call `call` 50 ms after one has begun to wait for `items`."""

    def wait() -> None:
        wait_until(lambda: items._changed._waiters)  # type: ignore[attr-defined]
        time.sleep(0.05)
        call()

    threading.Thread(target=wait).start()


def sizes_of(store: Store) -> list[int]:
    return [store.layout(block).memory_nbytes for block in store.tape]


@asynccontextmanager
async def streaming(
    store: Store,
    plan: Plan,
    prefetch: int | None = None,
    preadv: Faults = os.preadv,
    policy: VerifyPolicy = VerifyPolicy.FIRST,
    device: Device | None = None,
) -> AsyncIterator[Setup]:
    """A streamer over memory that is exactly as large as planned."""
    trace, cancel, placement = Tracer(keep_spans=True), CancelFlag(), plan.placement
    units = [unit.nbytes for units in store.dense_units for unit in units if unit.compressed]
    part = min(CHUNK_NBYTES, max(units, default=0))
    with Arena(placement.nbytes + 4096 * (len(plan.tape.nbytes) + 1) + 2 * part) as arena:
        buffers = [arena.borrow(part, "compressed chunk").view for _ in range(2) if part]
        resident = {i: arena.borrow(plan.tape.nbytes[i], "resident") for i in sorted(placement.resident)}
        ring = arena.borrow(placement.ring_nbytes, "ring") if placement.ring_nbytes else None
        with DiskReader(store.path, ChunkVerifier(policy, trace), trace, 4, preadv=preadv) as reader:
            async with AsyncExitStack() as inside:
                streamer = Streamer(store, plan, reader, resident, ring, trace, cancel, prefetch, None, buffers, device)
                yield Setup(await inside.enter_async_context(streamer), reader, trace, cancel, inside)


def assert_right(store: Store, loan: Loan) -> None:
    """The block's weights are those of its file."""
    info = next(block for block in store.tape if block.name == loan.block)
    units = [unit for unit in store.layout(info).units if unit.kind == "dense"]
    expected = {
        name: weight.view(load_unit(store.path, unit)) for unit in units for name, weight in unit.weights.items()
    }
    assert len(loan.names) == len(expected)
    for name, whole in expected.items():
        found = loan.borrow(name.removeprefix(info.prefix))
        pairs = zip(tensors_of(found), tensors_of(whole), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def tensors_of(weight: AnyWeight) -> Sequence[torch.Tensor]:
    return weight.codes if isinstance(weight, QuantizedWeight) else [weight]


async def assert_pass(setup: Setup, store: Store) -> None:
    """Every block of the tape comes, in order and with the right bytes."""
    for info in store.tape:
        block = await setup.following()
        assert block.block == info.name
        assert_right(store, block)
        await setup.release(block)


def failing_at(name: str, offset: int = 0) -> Faults:
    def preadv(fd: int, buffers: Sequence[memoryview], at: int, flags: int, /) -> int:
        if at >= offset and name in str(Path(f"/proc/self/fd/{fd}").readlink()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(fd, buffers, at, flags)

    return preadv


def in_twenties(block: BlockInfo, names: Sequence[str]) -> list[Group]:
    end = 40_000 if block.role == "head" else 80_000
    return [Group("dense", [Rows("weight", start, start + 20_000)]) for start in range(0, end, 20_000)]


def compute(setup: Setup, store: Store, stop: int | None = None, is_held: bool = False, is_last: bool = False) -> None:
    """In the thread that computes: a pass, or its blocks up to `stop`. Each weight is that of its file."""
    setup.streamer.begin(is_last)
    for number in range(len(store.tape[:stop])):
        compute_block(setup.streamer, store, number, is_held)


def compute_block(streamer: Streamer, store: Store, number: int, is_held: bool = False) -> None:
    """Borrow all that is in a block, once or several times: each weight is that of its file."""
    info = store.tape[number]
    expected: dict[str, AnyWeight] = {}
    for unit in store.dense_units[number]:
        memory = load_unit(store.path, unit)
        expected |= {key.removeprefix(info.prefix): weight.view(memory) for key, weight in unit.weights.items()}
    with streamer.lend(number, is_held) as loan:
        assert loan.block == info.name
        for _ in range(2 if is_held else 1):
            for key in [part for name in loan.names for part in loan.parts(name)]:
                pairs = zip(tensors_of(loan.borrow(key)), tensors_of(expected[key]), strict=True)
                assert all(torch.equal(found, right) for found, right in pairs), f"{info.name}: {key}"
                loan.release(key)


async def in_thread(setup: Setup, work: Callable[[], None]) -> None:
    """Let a thread of its own compute; what hangs fails."""
    ended = asyncio.get_running_loop().create_future()

    def run() -> None:
        error: BaseException | None = None
        try:
            work()
        except BaseException as raised:
            error = raised
        ended.get_loop().call_soon_threadsafe(ended.set_result, error)

    threading.Thread(target=run, daemon=True).start()
    try:
        error = await asyncio.wait_for(ended, SECONDS)
    except TimeoutError:
        setup.cancel.set()
        raise
    if error is not None:
        raise error


def device_plan(
    store: Store, on_device: Sequence[int] = (), in_ram: Sequence[int] = (), rings: str = "full", held: Held = UNHELD
) -> Plan:
    """A plan with these units resident, and rings of the size that is named so, in both memories."""
    blocks = store.dense_units
    sizes = [unit.memory_nbytes for block in blocks for unit in block]
    tape = tape_of(sizes, counts=list(map(len, blocks)))

    def ring(resident: frozenset[int], held: Held) -> int:
        pieces = tape.streamed(held, resident)
        return {"smallest": smallest_ring(pieces), "full": full_ring(pieces), "all": sum(map(sum, pieces))}[rings]

    def placed(resident: Sequence[int], ring_nbytes: int) -> Placement:
        return Placement(frozenset(resident), sum(sizes[unit] for unit in resident), ring_nbytes)

    # What stays on the device passes through the host's ring once.
    host = max([ring(frozenset([*on_device, *in_ram]), UNHELD), *(sizes[unit] for unit in on_device)])
    there = placed(on_device, ring(frozenset(on_device), held))
    device = DevicePlan(there.nbytes, DeviceNeeds(0, 0, 0, 0), there)
    return replace(plan_of(sizes, budget=GIB), tape=tape, held=held, placement=placed(in_ram, host), device=device)


class Pending(EmulatedDevice):
    """Memory that it lends may still be computed with on somebody else's behalf, as that of CUDA may: torch's allocator
    gives out again what kernels use that have not run yet. From when `is_used` is set."""

    is_used = False

    def borrow(self, nbytes: int, label: str) -> torch.Tensor:
        memory = super().borrow(nbytes, label)
        if self.is_used:
            self.uses(memory, writes=True)
        return memory
