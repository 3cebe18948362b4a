"""The stage between the feed and the computation where a device computes: one copy for each unit, into a slot there.

    disk --Feed--> host ring or resident memory --DeviceFeed--> ring of device slots --Loan--> modules on the device

It is to `Streamer` what the feed is where the processor computes. Units that stay on the device are read once, through
the ring, before anything else; the host's tape is without them. What is read ahead is bounded by the host's ring, what
is copied ahead by the ring of slots. A host's span is free again when its copy has ended, a slot when the copy into it
has waited for the computation's last use: no thread waits for that.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import torch

from tiered.device import Device, Event
from tiered.io import Slab
from tiered.io.threads import IOThreads
from tiered.plan import Held, Plan, Tape
from tiered.plan.order import Reading, feed_order
from tiered.store import Unit
from tiered.stream.feed import Feed
from tiered.stream.loan import Brought
from tiered.stream.ring import RingSpan
from tiered.stream.walk import Order, Receiver, Walk
from tiered.trace import Tracer
from tiered.units import GIB

logger = logging.getLogger(__name__)

_REGISTERED_NBYTES: Final = 64 * GIB
"""Bytes that are registered in one piece at most: drivers refuse more."""

MakeFeed = Callable[..., Feed[torch.Tensor]]
"""`Feed` with a reader, the host's ring and buffers."""


class DeviceFeed(Walk[Brought]):
    """Copies `tape` to `device`, as `plan` says, from `resident` memory of the host, by number of the unit on the tape,
    and from its `ring`, into which feeds that `make_feed` makes read. `make` makes what is handed over of the unit of a
    number in its memory. All else is as of `Walk`.
    """

    def __init__(
        self,
        tape: Sequence[Unit],
        plan: Plan,
        device: Device,
        resident: Mapping[int, Slab],
        ring: Slab | None,
        make_feed: MakeFeed,
        units: Receiver[Brought],
        make: Callable[[int, torch.Tensor, Event], Brought],
        name: Callable[[int], str],
        family: str,
        prefetch: int | None,
        trace: Tracer,
    ) -> None:
        assert plan.device is not None
        placement = plan.device.placement
        self._tape, self._device, self._trace, self._make = tape, device, trace, make
        self._hosts = [position for position in range(len(tape)) if position not in placement.resident]
        """Positions of the units on the host's tape, in its order."""
        self._host_number = {position: number for number, position in enumerate(self._hosts)}
        self._host_resident = {self._host_number[position]: slab for position, slab in resident.items()}
        self._host_ring_nbytes = ring.nbytes if ring is not None else 0
        self._make_feed = functools.partial(make_feed, on_write=self._tell_write)
        self._host: Feed[torch.Tensor] | None = None
        """None before all units that stay on the device have been read, and where there are no others."""
        self._found = _Found()
        self._kept = sorted(placement.resident)
        self._on_device: set[int] = set()
        """Those of them that have been copied, or are being copied."""
        self._memory = contextlib.ExitStack()
        self._slots = torch.empty(0, dtype=torch.uint8)
        self._own: dict[int, torch.Tensor] = {}
        """The memory of units that stay on the device, by position."""
        self._copies: set[asyncio.Task[None]] = set()
        """Copies in flight."""
        self._ending = asyncio.Lock()
        """Held while the host's feed is rewound or closed."""
        self._waiter = IOThreads(1, "tiered-copied")
        self._last_use: dict[int, Event] = {}
        """Comes when units that are to be given back have been computed with, by number."""
        self._freed: list[tuple[int, int, Event]] = []
        """Bytes of slots that were given back, and the event behind which they are free."""
        self.bus_nbytes, self.bus_seconds = 0, 0.0
        """Bytes that have been copied to the device so far, and the seconds that took."""
        order = functools.partial(feed_order, plan.tape, plan.held, placement.resident, placement.ring_nbytes)
        sizes = [unit.memory_nbytes for unit in tape]
        super().__init__(order, sizes, placement.resident, placement.ring_nbytes, units, name, family, prefetch)

    # Begin and end.

    async def start(self) -> None:
        with contextlib.ExitStack() as stack:
            self._slots = self._borrow(stack, self._ring_nbytes, "ring of weights")
            own = self._borrow(stack, sum(self._sizes[position] for position in self._kept), "resident weights")
            ends = itertools.accumulate((self._sizes[position] for position in self._kept), initial=0)
            for position, (start, stop) in zip(self._kept, itertools.pairwise(ends), strict=True):
                self._own[position] = own[start:stop]
            self._memory = stack.pop_all()
        await super().start()

    def _borrow(self, stack: contextlib.ExitStack, nbytes: int, label: str) -> torch.Tensor:
        memory = self._device.borrow(nbytes, label) if nbytes else torch.empty(0, dtype=torch.uint8)
        if nbytes:
            stack.callback(self._device.release, memory)
        return memory

    async def close(self) -> None:
        assert self._task is not None
        self._is_closing = True
        self._task.cancel()
        await asyncio.wait([self._task])
        async with self._ending:
            await self._settled()
            if self._host is not None:
                await self._host.close()
        await super().close()
        await self._until_done(self._device.record())
        self._waiter.close()
        self._own.clear()
        self._slots = torch.empty(0, dtype=torch.uint8)
        self._memory.close()

    async def _settle(self) -> None:
        async with self._ending:
            await self._settled()
            if self._host is None or self._is_closing:
                return
            if len(self._on_device) == len(self._kept):
                await self._host.rewind()
            else:
                # The ring is needed once more for those that have not come.
                await self._host.close()
                self._host = None

    def _restart(self) -> None:
        super()._restart()
        self._last_use.clear()
        # Whatever was computed last may still use any of the slots.
        self._freed = [(0, self._ring_nbytes, self._device.record())]

    # What the computation says.

    def set_last(self, last: int | None) -> None:
        super().set_last(last)
        if self._host is not None:
            self._host.set_last(last)

    def used(self, numbers: Sequence[int]) -> None:
        event = self._device.record()
        for number in numbers:
            self._last_use[number] = event

    def _release(self, number: int) -> None:
        span, event = self._spans[number], self._last_use.pop(number, None)
        if event is not None:
            self._freed.append((span.start, span.stop, event))
        super()._release(number)

    def _last_uses(self, span: RingSpan) -> list[Event]:
        """The events behind which `span` is free: of units, or parts of them, that lay there and are forgotten now."""
        events, left = [], []
        for start, stop, event in self._freed:
            pieces = [(start, min(stop, span.start)), (max(start, span.stop), stop)]
            if start < span.stop and span.start < stop:
                events.append(event)
            left += [(low, high, event) for low, high in pieces if low < high]
        self._freed = left
        return events

    # The walk.

    async def _walk(self) -> None:
        try:
            await self._fill()
            if self._host is None and self._hosts:
                self._host = await self._start_host()
        except Exception as error:
            self._fail(0, error)
            return
        await super()._walk()

    async def _fill(self) -> None:
        """Bring the units that stay on the device. The error of one is handed over in its place."""
        missing = [position for position in self._kept if position not in self._on_device]
        if not missing:
            return
        turns = functools.partial(self._once, [self._sizes[position] for position in missing])
        feed = await self._begin_feed(missing, turns, {})
        try:
            for number, position in enumerate(missing):
                found = await self._until_found(feed, number)
                key = position - len(self._sizes)
                if isinstance(found, Exception):
                    _give_back(feed, number)
                    self._units.put(key, found)
                    continue
                self._on_device.add(position)
                self._units.put(key, self._copy(position, found, self._own[position], (), feed, number))
        finally:
            await self._settled()
            await feed.close()

    def _once(self, sizes: Sequence[int]) -> Iterator[Reading]:
        """Units of these sizes, once through the host's ring."""
        tape = Tape(tuple(sizes), tuple(sizes), (1,) * len(sizes))
        return itertools.islice(feed_order(tape, Held(), frozenset(), self._host_ring_nbytes), len(sizes))

    async def _start_host(self) -> Feed[torch.Tensor]:
        """The feed of all units that do not stay on the device."""
        sizes = tuple(self._sizes[position] for position in self._hosts)
        # Each goes on as soon as it has come: none is held for another.
        tape = Tape(sizes, sizes, (1,) * len(sizes))
        resident = frozenset(self._host_resident)
        order = functools.partial(feed_order, tape, Held(), resident, self._host_ring_nbytes)
        feed = await self._begin_feed(self._hosts, order, self._host_resident)
        feed.set_last(self.last_pass)
        return feed

    async def _begin_feed(
        self,
        positions: Sequence[int],
        order: Order,
        resident: Mapping[int, Slab],
    ) -> Feed[torch.Tensor]:
        """A feed of the units at `positions`, whose units come to `_found`."""
        self._found = _Found(lambda: self._changed.set())
        tape = [self._tape[position] for position in positions]
        # Where units may not come ahead they are asked for one by one.
        prefetch = None if self._prefetch is None else 0
        feed = self._make_feed(tape, order, resident, self._found, _whole, self._name, None, prefetch)
        await feed.start()
        return feed

    async def _begin_resident(self, turn: Reading) -> None:
        """It has come before all others."""

    async def _begin_streamed(self, turn: Reading, span: RingSpan) -> None:
        assert self._host is not None
        host, number = self._host, turn.number
        host_number = turn.passed * len(self._hosts) + self._host_number[turn.position]
        found = await self._until_found(host, host_number)
        if self._is_passed_by(number):
            _give_back(host, host_number)
            return
        if isinstance(found, Exception):
            _give_back(host, host_number)
            self._units.put(number, found)
            return
        slot = self._slots[span.start : span.start + self._sizes[turn.position]]
        self._units.put(
            number, self._copy(turn.position, found, slot, self._last_uses(span), host, host_number, number)
        )

    async def _until_found(self, feed: Feed[torch.Tensor], number: int) -> torch.Tensor | Exception:
        """Wait until `feed` has unit `number`, in numbers of its tape."""
        key = feed.key(number)
        if key not in self._found.items:
            feed.set_asked(number)
        while key not in self._found.items:
            await self._change()
        found = self._found.items[key]
        if key >= 0 or isinstance(found, Exception):
            del self._found.items[key]
        return found

    # Copies.

    def _copy(
        self,
        position: int,
        source: torch.Tensor,
        target: torch.Tensor,
        after: Sequence[Event],
        feed: Feed[torch.Tensor],
        host_number: int,
        number: int | None = None,
    ) -> Brought:
        """Copy the unit at `position`, and see to it that `feed` gets its memory back. `number` is that of a unit that
        does not stay."""
        nbytes = self._sizes[position]
        arrived = self._device.copy_in(source[:nbytes], target, after)

        def end(error: Exception | None) -> None:
            if error is not None:
                self._on_device.discard(position)
                self._units.put(position - len(self._sizes) if number is None else number, error)
            _give_back(feed, host_number)

        assert self._group is not None
        following = self._follow(arrived, self._name(position), nbytes, end)
        copy = self._group.create_task(following, name=f"tiered-copy-{position}")
        self._copies.add(copy)
        copy.add_done_callback(self._copies.discard)
        return self._make(position, target, arrived)

    async def _follow(self, arrived: Event, name: str, nbytes: int, end: Callable[[Exception | None], None]) -> None:
        """Wait for the end of a copy. Nobody may cancel it: its memory is in use until then."""
        try:
            await self._until_done(arrived)
        except Exception as error:
            end(error)
            return
        seconds = arrived.seconds
        self._trace.record("bus", name, time.perf_counter() - seconds, seconds, nbytes)
        self.bus_nbytes, self.bus_seconds = self.bus_nbytes + nbytes, self.bus_seconds + seconds
        end(None)

    async def _until_done(self, event: Event) -> None:
        """Wait for `event`, while the loop goes on."""
        try:
            await self._waiter.call(lambda check: event.wait())
        finally:
            event.wait()  # for this thread, which goes on with its memory

    async def _settled(self) -> None:
        """Wait for all copies in flight."""
        while self._copies:
            await asyncio.wait(set(self._copies))

    def _tell_write(self, memory: memoryview) -> None:
        self._device.host_writes(torch.frombuffer(memory, dtype=torch.uint8))


def register(device: Device, slabs: Sequence[Slab], stack: contextlib.ExitStack) -> None:
    """Make memory of the host known to `device`, until `stack` is closed. It touches all of it, which takes time."""
    for address, nbytes in _runs(slabs):
        refusal = device.register(address, nbytes)
        if refusal is not None:
            logger.warning("copies to %s are staged, and so slower: %s", device.name, refusal)
            return
        stack.callback(device.unregister, address)


class _Found:
    """The units that the host has, by key of its feed. What is resident stays."""

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self.items: dict[int, torch.Tensor | Exception] = {}
        self._changed = changed

    def put(self, key: int, item: torch.Tensor | Exception) -> None:
        self.items[key] = item
        self._changed()

    def discard(self, key: int) -> None:
        self.items.pop(key, None)

    def clear(self, kept: int = 0) -> None:
        self.items = {k: item for k, item in self.items.items() if k < kept and not isinstance(item, Exception)}


def _whole(position: int, memory: torch.Tensor) -> torch.Tensor:
    """What the host's feed hands over of a unit: its bytes."""
    return memory


def _give_back(feed: Feed[torch.Tensor], number: int) -> None:
    """Unit `number` of the feed's tape has gone on; what is resident stays."""
    if feed.key(number) >= 0:
        feed.take_back(deque([number]))


def _runs(slabs: Sequence[Slab]) -> Iterator[tuple[int, int]]:
    """Address and bytes of stretches that are together `slabs`, none larger than what is registered in one piece unless
    a slab is."""
    address = nbytes = 0
    for slab in sorted(slabs, key=lambda slab: slab.address):
        if slab.address == address + nbytes and nbytes + slab.nbytes <= _REGISTERED_NBYTES and nbytes:
            nbytes += slab.nbytes
            continue
        if nbytes:
            yield address, nbytes
        address, nbytes = slab.address, slab.nbytes
    if nbytes:
        yield address, nbytes
