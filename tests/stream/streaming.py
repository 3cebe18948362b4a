"""A streamer over memory that is exactly as large as planned, and what is compared with a store's files."""

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.store.make import load_unit
from tests.store.units import Group, Rows
from tiered.device import Device
from tiered.errors import InterruptedRun
from tiered.io import Arena, ChunkVerifier, DiskReader, Faults, VerifyPolicy
from tiered.kernels import CancelFlag
from tiered.plan import Plan
from tiered.quant import QuantizedWeight
from tiered.store import CHUNK_NBYTES, BlockInfo, Store
from tiered.stream import AnyWeight, Loan, Streamer
from tiered.trace import Tracer

SECONDS = 20.0
"""What takes longer hangs."""


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
