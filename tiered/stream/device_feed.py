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
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from tiered.device import Device, Event, Lease
from tiered.io import Slab
from tiered.plan import Held, Plan, Tape
from tiered.plan.order import Reading, feed_order
from tiered.store import Unit
from tiered.stream.bus import Bus, tell_write
from tiered.stream.feed import Feed
from tiered.stream.fork import HELD, Fork, Share
from tiered.stream.loan import Brought
from tiered.stream.ring import RingSpan
from tiered.stream.walk import Order, Receiver, Walk

MakeFeed = Callable[..., Feed[torch.Tensor]]
"""`Feed` with a reader, the host's ring and buffers."""


class DeviceFeed(Walk[Brought]):
    """Copies `tape` to `device`, as `plan` says, from `resident` memory of the host, by number of the unit on the tape,
    and from its `ring`, into which feeds that `make_feed` makes read. `make` makes what is handed over of the unit of a
    number in its memory, and `bus` knows of its copies. Where the processor computes as well, `fork` has the feed, and
    no unit stays on the device. All else is as of `Walk`.
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
        bus: Bus,
        fork: Fork | None = None,
    ) -> None:
        assert plan.device is not None
        placement = plan.device.placement
        self._tape, self._device, self._bus, self._make = tape, device, bus, make
        self._hosts = [position for position in range(len(tape)) if position not in placement.resident]
        """Positions of the units on the host's tape, in its order."""
        self._host_number = {position: number for number, position in enumerate(self._hosts)}
        self._host_resident = {self._host_number[position]: slab for position, slab in resident.items()}
        self._host_ring_nbytes = ring.nbytes if ring is not None else 0
        self._make_feed = functools.partial(make_feed, on_write=functools.partial(tell_write, device))
        self._found = _Found(lambda: self._changed.set())
        self._host: Feed[torch.Tensor] | Share | None = None
        """None before all units that stay on the device have been read, and where there are no others."""
        self._share: Share | None = None
        if fork is not None:
            assert not placement.resident, "what stays on the device would never come to the processor"
            self._share = fork.share(self._found, _whole)
            ring_nbytes, held = self._host_ring_nbytes, frozenset(resident)
            turns = functools.partial(feed_order, plan.tape, HELD, held, ring_nbytes)
            fork.set_feed(self._make_feed(tape, turns, resident, fork, _whole, name, None, prefetch))
        self._kept = sorted(placement.resident)
        self._on_device: set[int] = set()
        """Those of them that have been copied, or are being copied."""
        self._memory = contextlib.ExitStack()
        self._slots = Lease(device, placement.ring_nbytes, "ring of weights")
        self._is_resting = False
        """Nothing is brought, and no slot is there, until a pass begins."""
        self._own: dict[int, torch.Tensor] = {}
        """The memory of units that stay on the device, by position."""
        self._ending = asyncio.Lock()
        """Held while the host's feed is rewound or closed."""
        self._last_use: dict[int, Event] = {}
        """Comes when units that are to be given back have been computed with, by number."""
        self._freed: list[tuple[int, int, Event]] = []
        """Bytes of slots that were given back, and the event behind which they are free."""
        order = functools.partial(feed_order, plan.tape, plan.held, placement.resident, placement.ring_nbytes)
        sizes = [unit.memory_nbytes for unit in tape]
        super().__init__(order, sizes, placement.resident, placement.ring_nbytes, units, name, family, prefetch)

    # Begin and end.

    async def start(self) -> None:
        with contextlib.ExitStack() as stack:
            self._take_slots()
            stack.callback(self._slots.end)
            own = self._borrow(stack, sum(self._sizes[position] for position in self._kept), "resident weights")
            ends = itertools.accumulate((self._sizes[position] for position in self._kept), initial=0)
            for position, (start, stop) in zip(self._kept, itertools.pairwise(ends), strict=True):
                self._own[position] = own[start:stop]
            self._memory = stack.pop_all()
        if self._share is not None:
            await self._share.start()
            self._host = self._share
        await super().start()

    def _take_slots(self) -> None:
        """Borrow the ring of slots, if it is not. What was computed there for others may not be done."""
        if not self._slots.is_held:
            self._slots.take()
            self._freed = [(0, self._ring_nbytes, self._device.record())]

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
            await self._bus.settled()
            if self._host is not None:
                await self._host.close()
        await super().close()
        try:
            await self._bus.until_done(self._device.record())
        finally:
            self._bus.close()
            self._own.clear()
            self._memory.close()

    async def _settle(self) -> None:
        async with self._ending:
            await self._bus.settled()
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

    async def rest(self) -> None:
        """Between two passes, where the processor computes as well: drop what was copied ahead, and give the slots back
        until the next pass begins. Numbers of units begin anew."""
        assert self._share is not None and self._task is not None
        self._is_resting = True
        self._task.cancel()
        await asyncio.wait([self._task])
        async with self._ending:
            await self._bus.settled()
            self._share.rest()
            self._units.clear(kept=0)
            self._restart()
            await self._bus.until_done(self._device.record())
            self._slots.end()

    def _wake(self) -> None:
        """A pass begins."""
        if self._is_resting and not self._is_closing:
            self._is_resting = False
            self._begin_walk()

    def _begin_walk(self) -> None:
        if not self._is_resting:
            super()._begin_walk()

    # What the computation says.

    def begin_pass(self) -> None:
        if self._share is not None:
            self._share.begin_pass(self._wake)

    def begin_lending(self) -> None:
        if self._share is not None:
            self._share.begin_lending()

    def end_pass(self) -> None:
        if self._share is not None:
            self._share.end_pass()

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
            await self._bus.settled()
            await feed.close()

    def _once(self, sizes: Sequence[int]) -> Iterator[Reading]:
        """Units of these sizes, once through the host's ring."""
        tape = Tape(tuple(sizes), tuple(sizes), (1,) * len(sizes))
        return itertools.islice(feed_order(tape, Held(), frozenset(), self._host_ring_nbytes), len(sizes))

    async def _start_host(self) -> Feed[torch.Tensor]:
        """What brings all units that do not stay on the device."""
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
        self._found.clear(-len(self._sizes))
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
        host, number, host_number = self._host, turn.number, self._number_on_host(turn)
        found = await self._until_found(host, host_number)
        if self._is_passed_by(number):
            _give_back(host, host_number)
            return
        if isinstance(found, Exception):
            _give_back(host, host_number)
            self._units.put(number, found)
            return
        self._take_slots()
        slot = self._slots.take()[span.start : span.start + self._sizes[turn.position]]
        self._units.put(
            number, self._copy(turn.position, found, slot, self._last_uses(span), host, host_number, number)
        )

    def _pass_by(self, turn: Reading) -> None:
        assert self._host is not None
        self._last_use.pop(turn.number, None)
        _give_back(self._host, self._number_on_host(turn))

    def _number_on_host(self, turn: Reading) -> int:
        """The number of a unit on the host's endless tape."""
        return turn.passed * len(self._hosts) + self._host_number[turn.position]

    async def _until_found(self, feed: Feed[torch.Tensor] | Share, number: int) -> torch.Tensor | Exception:
        """Wait until `feed` has unit `number`, in numbers of its tape, and the bus is free for it."""
        while self._bus.is_busy:
            await self._change()
        key = feed.key(number)
        while key not in self._found.items:
            feed.set_asked(number)
            if key not in self._found.items:  # an error may have come at once
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
        feed: Feed[torch.Tensor] | Share,
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
            self._changed.set()

        assert self._group is not None
        self._bus.follow(self._group, arrived, self._name(position), nbytes, end)
        return self._make(position, target, arrived)


class _Found:
    """The units that the host has, by key of its feed. What is resident stays."""

    def __init__(self, changed: Callable[[], None]) -> None:
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


def _give_back(feed: Feed[torch.Tensor] | Share, number: int) -> None:
    """Unit `number` of the feed's tape has gone on; what is resident stays."""
    if feed.key(number) >= 0:
        feed.take_back(deque([number]))
