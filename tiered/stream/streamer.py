"""The streamer: lends the blocks of the tape in order, unit by unit, while the feed reads ahead of the computation.

    in the loop (`feed.py`, `device_feed.py`)            in the thread that computes
    for every unit of the tape, for ever: find memory    begin()   a pass begins
      (its own if resident, else a span of the ring,     lend()    the next block of the tape: a loan, from which its
      waiting until it is free), and start its reads               weights are borrowed one by one; a unit's span
                                                                   may be overwritten once all have gone back

Resident units are read in the first pass and then borrowed without the loop. Streamer and feed alone know where on the
tape computing and reading are. Where a device computes, what is lent is in its memory, and `device_feed.py` brings it
there.
"""

import asyncio
import contextlib
import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

import torch

from tiered.device import Device, Event
from tiered.io import ChunkBuffers, DiskReader, Slab
from tiered.kernels import CancelFlag
from tiered.plan import Plan
from tiered.plan.order import feed_order
from tiered.store import Store, Unit
from tiered.stream.bus import Bus, tell_write
from tiered.stream.device_experts import DeviceExperts
from tiered.stream.device_feed import DeviceFeed
from tiered.stream.experts import NO_EXPERTS, ExpertCache, ExpertUse
from tiered.stream.feed import Feed
from tiered.stream.fork import Fork
from tiered.stream.handover import Handover
from tiered.stream.loan import AnyWeight, Brought, Loan
from tiered.stream.walk import Source
from tiered.trace import Tracer


class Streamer:
    """Lends the blocks of `store`'s tape to one thread. An async context manager; leaving it ends all reads.

    Memory is as `plan` says: `resident` by number of the unit on the tape, and `ring` for all others. `prefetch` is how
    many units may be read before they are asked for: 0 reads each unit when it is asked for, which is the synchronous
    reference; None is bounded by the ring alone. Once `cancel` is set, waiting ends with InterruptedRun. Where the plan
    reads experts when they are chosen, `experts` is their memory. `buffers` are for chunks of compressed units, of
    which there are none without. `device` computes where the plan has one; the streamer borrows memory for weights
    from it while it is open. Of two streamers that share a `fork`, one lends to a device and the other to the
    processor: they are opened, rewound and left together.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        reader: DiskReader,
        resident: Mapping[int, Slab],
        ring: Slab | None,
        trace: Tracer,
        cancel: CancelFlag,
        prefetch: int | None = None,
        experts: Slab | None = None,
        buffers: Sequence[memoryview] = (),
        device: Device | None = None,
        fork: Fork | None = None,
    ) -> None:
        assert device is None or plan.device is not None, "the plan is for the processor alone"
        self._device, self._borrowed = device, contextlib.ExitStack()
        self._slabs = [slab for slab in (*resident.values(), ring, experts) if slab is not None]
        self._bus = Bus(trace)
        self._experts = None if fork is None else fork.experts
        if plan.experts is not None and experts is not None and self._experts is None:
            self._experts = ExpertCache(store, plan.experts, experts, reader, trace, cancel)
        self._there: DeviceExperts | None = None
        """Where experts that are read when they are chosen are lent, if not where they are read to."""
        if self._experts is not None and plan.experts is not None and device is not None:
            self._experts.on_write = functools.partial(tell_write, device)
            self._there = DeviceExperts(device, plan.experts.slot_nbytes, self._bus)
        if fork is not None:
            fork.experts = self._experts
        self._expert_use, self._expert_wait_seconds = NO_EXPERTS, 0.0
        self._family, self._prefetch = str(store.manifest.architecture["model_type"]), prefetch
        blocks = store.units_of_pass(plan.experts is not None)
        self._tape = [unit for units in blocks for unit in units]
        self._firsts = list(itertools.accumulate(map(len, blocks), initial=0))
        """The number on the tape of each block's first unit; last, how many units there are."""
        self._block_of = [number for number, units in enumerate(blocks) for _ in units]
        lasting = resident if device is None or plan.device is None else plan.device.placement.resident
        self._loans = [self._loan(number, store, units, lasting) for number, units in enumerate(blocks)]
        self._units: Handover[Brought] = Handover(cancel, trace)
        """Units in memory that have not been taken yet, by the feed's keys."""
        make_feed = functools.partial(Feed, reader=reader, ring=ring, buffers=ChunkBuffers(buffers))
        told = self._units, self._brought, self._name, self._family, prefetch
        self._feed: Source
        if device is not None:
            self._feed = DeviceFeed(self._tape, plan, device, resident, ring, make_feed, *told, self._bus, fork)
        elif fork is not None:
            self._feed = fork.share(self._units, self._brought)
        else:
            ring_nbytes = ring.nbytes if ring is not None else 0
            order = functools.partial(feed_order, plan.tape, plan.held, plan.placement.resident, ring_nbytes)
            self._feed = make_feed(self._tape, order, resident, *told)
        self._pass, self._next = 0, 0
        """Number of the pass, and of the block that is lent next: -1 while one is lent, and after an error. Used by the
        computing thread."""
        self._copy_wait_seconds = 0.0
        self._returned: deque[int] = deque()
        """Units that the computation has given back, and the loop has not taken back."""
        self._is_posted = False
        """Whether `_take_back` has been posted to the loop and has not run yet."""

    def _loan(self, block: int, store: Store, units: Sequence[Unit], resident: Collection[int]) -> Loan:
        info, first = store.tape[block], self._firsts[block]
        streamed = [number for number in range(len(units)) if first + number not in resident]
        bring, take_back = functools.partial(self._bring, first), functools.partial(self._post_returned, first)
        experts = functools.partial(self._each_expert, block) if self._experts is not None else None
        return Loan(info.name, info.prefix, units, streamed, self._family, bring, take_back, experts, self._device)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            stack.callback(self._bus.close)
            if self._device is not None:
                await self._bus.register(self._device, self._slabs, stack)
            if self._there is not None:
                self._there.open()
                stack.callback(self._there.close)
            await self._feed.start()
            self._borrowed = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._feed.close()
        for loan in self._loans:
            loan.forget()
        await self._rewind_experts()
        self._borrowed.close()

    # In the thread that computes.

    @property
    def wait_seconds(self) -> float:
        """Seconds the thread that computes has waited for units, and for experts."""
        return self._units.wait_seconds + self._expert_wait_seconds

    @property
    def bus_nbytes(self) -> int:
        """Bytes of weights that have been copied to the device so far."""
        return self._bus.nbytes

    @property
    def bus_seconds(self) -> float:
        """Seconds in which they were."""
        return self._bus.seconds

    @property
    def stalled_seconds(self) -> float:
        """Seconds the device that computes has stood still for copies."""
        return self._device.stalled_seconds if self._device is not None else 0.0

    @property
    def unseen_stalls(self) -> float:
        """Of these, the seconds in which the thread that computes did not wait as well."""
        return max(0.0, self.stalled_seconds - self._copy_wait_seconds)

    @property
    def expert_use(self) -> ExpertUse:
        """What experts that are read when they are chosen have cost so far."""
        return self._expert_use

    def begin(self, is_last: bool = False, on_wait: Callable[[float, float], None] | None = None) -> None:
        """A pass begins; if it `is_last`, nothing is read ahead for another. `on_wait` gets each wait's start and
        seconds."""
        assert self._next == 0, "the last pass ended in the middle: rewind first"
        self._units.on_wait = on_wait
        if self._experts is not None:
            self._experts.begin(on_wait)
        last = self._pass if is_last else None
        self._feed.begin_pass()
        if last != self._feed.last_pass:
            self._loop.call_soon_threadsafe(self._feed.set_last, last)

    @contextlib.contextmanager
    def lend(self, block: int, is_held: bool = False) -> Iterator[Loan]:
        """Block number `block`, which is the next of the tape, until the context ends. If it `is_held`, its units are
        free again only then, else as soon as each has been computed with."""
        assert block == self._next, f"block {block} is lent when {self._next} is next (-1: rewind first)"
        if block == 0:
            self._feed.begin_lending()
        loan, self._next = self._loans[block], -1
        loan.is_held = is_held
        try:
            yield loan
        finally:
            loan.close()
        self._next = block + 1
        if self._next == len(self._loans):
            self._pass, self._next = self._pass + 1, 0
            self._feed.end_pass()

    def _each_expert(
        self, block: int, chosen: Mapping[int, int], names: Sequence[str]
    ) -> Iterator[tuple[int, Sequence[AnyWeight]]]:
        """As `Loan.each_expert`; counts what that costs here, as another streamer may use the same cache."""
        cache = self._experts
        assert cache is not None
        use, waited = cache.use, cache.came.wait_seconds
        try:
            yield from cache.each(block, chosen, names, self._there)
        finally:
            self._expert_use += cache.use - use
            self._expert_wait_seconds += cache.came.wait_seconds - waited

    def _bring(self, first: int, number: int) -> Brought:
        """Wait for unit `number` of the block whose first unit is `first`. Raises what its reads or its copy raised."""
        asked = self._pass * len(self._tape) + first + number
        key = self._feed.key(asked)
        # Where its reads have begun the feed need not know, and each turn of the loop takes the interpreter from here.
        if self._prefetch is not None or (asked > self._feed.begun and key not in self._units):
            self._loop.call_soon_threadsafe(self._feed.set_asked, asked)
        brought = self._units.take(key, self._name(first + number))
        if self._device is not None and brought.arrived is not None:
            start = time.perf_counter()
            self._device.wait_for(brought.arrived)
            self._units.count_wait(f"{self._name(first + number)}/copy", start)
            self._copy_wait_seconds += time.perf_counter() - start
        return brought

    def _post_returned(self, first: int, numbers: Sequence[int]) -> None:
        """Have the loop take back units of the block whose first unit is `first`."""
        returned = [self._pass * len(self._tape) + first + number for number in numbers]
        self._feed.used(returned)
        self._returned.extend(returned)
        if not self._is_posted:
            self._is_posted = True
            self._loop.call_soon_threadsafe(self._take_back)

    def _name(self, position: int) -> str:
        """What a unit is called in traces and errors."""
        block = self._block_of[position]
        loan = self._loans[block]
        if len(loan.units) == 1:
            return loan.block
        return f"{loan.block}/{self._tape[position].name}"

    # In the loop.

    async def rewind(self) -> None:
        """Make the next pass start at the first block: end the reads in flight, and drop what was read ahead.

        Resident units stay, and reads of them go on. No block may be lent meanwhile.
        """
        await self._rewind_experts()
        await self._feed.rewind()
        self._returned.clear()
        self._pass, self._next = 0, 0

    async def rest(self) -> None:
        """Where the processor computes beside the device: give the device's memory back until the next pass begins. No
        block may be lent meanwhile."""
        assert isinstance(self._feed, DeviceFeed), "what the processor computes with is not a device's"
        await self._feed.rest()
        for loan in self._loans:
            loan.forget()
        if self._there is not None:
            self._there.close()
        self._returned.clear()
        self._pass, self._next = 0, 0

    async def _rewind_experts(self) -> None:
        if self._experts is not None:
            await asyncio.to_thread(self._experts.rewind)
        if self._there is not None:
            self._there.release_all()

    def _take_back(self) -> None:
        self._is_posted = False
        self._feed.take_back(self._returned)

    def _brought(self, position: int, memory: torch.Tensor, arrived: Event | None = None) -> Brought:
        """The unit at `position` of the tape in its memory, where it has come by `arrived`."""
        block = self._block_of[position]
        return Brought(self._loans[block].views(position - self._firsts[block], memory), memory, arrived)
