"""The streamer: walks the tape in a cycle ahead of the computation, and lends its blocks in order, unit by unit.

    in the loop                                          in the thread that computes
    feed task: for every unit of the tape, for ever:     begin()   a pass begins
      find memory (its own if resident, else a span      lend()    the next block of the tape: a loan, from which its
      of the ring, waiting until it is free), and                  weights are borrowed one by one; a unit's span
      start its reads                                              may be overwritten once all have gone back

The bytes to read do not depend on the tokens, so the feed never waits for a pass to end; what bounds it is the ring.
Resident units are read in the first pass and then borrowed without the loop. This module alone knows where on the tape
reading and computing are.
"""

import asyncio
import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

import torch

from tiered.errors import UnsupportedFamilyError
from tiered.io import DiskReader, Slab
from tiered.kernels import CancelFlag
from tiered.plan import Plan
from tiered.store import PAGE, Store, Unit
from tiered.stream.handover import Handover
from tiered.stream.loan import AnyWeight, Loan
from tiered.stream.ring import Ring, RingSpan, ring_starts
from tiered.trace import Tracer
from tiered.units import format_size, round_down

Views = Mapping[str, AnyWeight]


def dense_units(store: Store) -> list[list[Unit]]:
    """What of each block of the tape is streamed or resident by plan, in the order of use."""
    return [[unit for unit in store.layout(block).units if unit.kind == "dense"] for block in store.tape]


class Streamer:
    """Lends the blocks of `store`'s tape to one thread. An async context manager; leaving it ends all reads.

    Memory is as `plan` says: `resident` by number of the unit on the tape, and `ring` for all others. `prefetch` is how
    many units may be read before they are asked for: 0 reads each unit when it is asked for, which is the synchronous
    reference; None is bounded by the ring alone. Once `cancel` is set, waiting ends with InterruptedRun.
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
    ) -> None:
        self._reader, self._trace = reader, trace
        self._resident, self._ring_slab, self._prefetch = resident, ring, prefetch
        self._family = str(store.manifest.architecture["model_type"])
        self._pieces = plan.tape.streamed(plan.held, plan.placement.resident)
        blocks = dense_units(store)
        self._tape = [unit for units in blocks for unit in units]
        self._firsts = list(itertools.accumulate(map(len, blocks), initial=0))
        """The number on the tape of each block's first unit; last, how many units there are."""
        self._loans = [self._loan(number, store, units) for number, units in enumerate(blocks)]
        self._block_of = [number for number, units in enumerate(blocks) for _ in units]
        self._units: Handover[Views] = Handover(cancel, trace)
        """Units in memory that have not been taken yet, by `_key`."""
        self._pass, self._next = 0, 0
        """Number of the pass, and of the block that is lent next: -1 while one is lent, and after an error. Used by the
        computing thread."""
        self._returned: deque[int] = deque()
        """Units that the computation has given back, and the loop has not taken back."""
        self._is_posted = False
        """Whether `_take_back` has been posted to the loop and has not run yet."""
        self._group: asyncio.TaskGroup | None = None
        self._feed: asyncio.Task[None] | None = None
        self._loads: dict[asyncio.Task[None], int] = {}
        """Reads in flight, with the key of their unit."""
        self._held: set[int] = set()
        """Resident units that have been read, or are being read."""
        self._is_closing = False
        self._restart()

    def _restart(self) -> None:
        """The state of the loop's side before the first unit."""
        self._ring = Ring(self._ring_nbytes)
        self._changed = asyncio.Event()
        """Set whenever what the feed waits for may have come about."""
        self._asked = -1
        """The last number that has been asked for."""
        self._last_pass: int | None = None
        """Number of the pass after which nothing is read; None: not known yet."""
        self._spans: dict[int, RingSpan] = {}
        """The memory of streamed units that are being read or are in memory, by number on the endless tape."""
        self._reading: set[int] = set()
        self._unwanted: set[int] = set()
        """Units that the computation has passed by before they were read."""
        self._ahead: deque[int] = deque()
        """Units whose reads began before they were asked for; those that have been asked for since leave at times."""
        self._failure: tuple[int, Exception] | None = None
        """The error because of which the feed has ended, and the first number that will not come."""

    @property
    def _ring_nbytes(self) -> int:
        return round_down(self._ring_slab.nbytes, PAGE) if self._ring_slab is not None else 0

    def _loan(self, block: int, store: Store, units: Sequence[Unit]) -> Loan:
        info, first = store.tape[block], self._firsts[block]
        streamed = [number for number in range(len(units)) if first + number not in self._resident]
        bring, take_back = functools.partial(self._bring, first), functools.partial(self._post_returned, first)
        return Loan(info.name, info.prefix, units, streamed, self._family, bring, take_back)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._feed = self._group.create_task(self._feed_tape(), name="tiered-feed")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._group is not None and self._feed is not None
        self._is_closing = True
        for task in (self._feed, *self._loads):
            task.cancel()
        await self._group.__aexit__(None, None, None)
        self._units.clear(kept=-len(self._tape))  # their memory goes back to the arena
        for loan in self._loans:
            loan.forget()

    # In the thread that computes.

    @property
    def wait_seconds(self) -> float:
        """Seconds the computation has waited for units."""
        return self._units.wait_seconds

    def begin(self, is_last: bool = False, on_wait: Callable[[float, float], None] | None = None) -> None:
        """A pass begins; if it `is_last`, nothing is read ahead for another. `on_wait` gets each wait's start and
        seconds."""
        assert self._next == 0, "the last pass ended in the middle: rewind first"
        self._units.on_wait = on_wait
        last = self._pass if is_last else None
        if last != self._last_pass:
            self._loop.call_soon_threadsafe(self._set_last, last)

    @contextlib.contextmanager
    def lend(self, block: int, is_held: bool = False) -> Iterator[Loan]:
        """Block number `block`, which is the next of the tape, until the context ends. If it `is_held`, its units are
        free again only then, else as soon as each has been computed with."""
        assert block == self._next, f"block {block} is lent when {self._next} is next (-1: rewind first)"
        loan, self._next = self._loans[block], -1
        loan.is_held = is_held
        try:
            yield loan
        finally:
            loan.close()
        self._next = block + 1
        if self._next == len(self._loans):
            self._pass, self._next = self._pass + 1, 0

    def _bring(self, first: int, number: int) -> Views:
        """Wait for unit `number` of the block whose first unit is `first`. Raises what its reads raised."""
        position = first + number
        asked, key = self._pass * len(self._tape) + position, self._key(self._pass, position)
        if self._prefetch is not None or key not in self._units:
            self._loop.call_soon_threadsafe(self._set_asked, asked)
        return self._units.take(key, self._name(position))

    def _post_returned(self, first: int, numbers: Sequence[int]) -> None:
        """Have the loop take back units of the block whose first unit is `first`."""
        self._returned.extend(self._pass * len(self._tape) + first + number for number in numbers)
        if not self._is_posted:
            self._is_posted = True
            self._loop.call_soon_threadsafe(self._take_back)

    def _key(self, number_of_pass: int, position: int) -> int:
        """Key of a unit: its number on the endless tape, or if resident one below 0, the same in each pass."""
        tape = len(self._tape)
        return position - tape if position in self._resident else number_of_pass * tape + position

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
        assert self._group is not None and self._feed is not None
        dropped = [self._feed, *(task for task, key in self._loads.items() if key >= 0)]
        for task in dropped:
            task.cancel()
        await asyncio.wait(dropped)
        if self._is_closing:
            return
        self._units.clear(kept=0)
        self._returned.clear()
        self._pass, self._next = 0, 0
        self._restart()
        self._feed = self._group.create_task(self._feed_tape(), name="tiered-feed")

    def _set_last(self, last: int | None) -> None:
        self._last_pass = last
        self._changed.set()

    def _set_asked(self, number: int) -> None:
        self._asked = number
        self._changed.set()
        self._raise_failure()

    def _raise_failure(self) -> None:
        """Hand the feed's error to whoever waits for what will not come."""
        if self._failure is not None and self._asked >= self._failure[0]:
            self._units.put(self._key(*divmod(self._asked, len(self._tape))), self._failure[1])

    def _take_back(self) -> None:
        self._is_posted = False
        while self._returned:
            number = self._returned.popleft()
            if number in self._spans and number not in self._reading:
                self._units.discard(number)
                self._ring.release(self._spans.pop(number))
            else:
                self._unwanted.add(number)
        self._changed.set()

    async def _feed_tape(self) -> None:
        starts = ring_starts(self._pieces, self._ring_nbytes)
        for number in itertools.count():
            current, position = divmod(number, len(self._tape))
            if current and not self._pieces:
                return
            try:
                if position not in self._resident:
                    await self._feed_streamed(number, current, position, next(starts))
                elif position not in self._held:
                    await self._until_wanted(number, current)
                    self._held.add(position)
                    self._start(self._key(current, position), position, self._resident[position].view)
            except Exception as error:
                # A feed that dies silently would leave the computation waiting for ever.
                self._failure = number, error
                self._raise_failure()
                return

    async def _feed_streamed(self, number: int, current: int, position: int, start: int) -> None:
        """Find memory at `start` of the ring for a unit, and start its reads; unless the computation passes it by."""
        while number not in self._unwanted:
            span = self._ring.borrow_at(start, self._tape[position].memory_nbytes)
            if span is None:
                self._check_not_stuck(number)
                await self._change()
                continue
            # After the wait for the ring, because what is wanted may change during it.
            await self._until_wanted(number, current)
            if number in self._unwanted:
                self._ring.release(span)
                break
            self._spans[number] = span
            self._reading.add(number)
            assert self._ring_slab is not None
            self._start(number, position, self._ring_slab.view[span.start : span.stop])
            return
        self._unwanted.discard(number)

    def _check_not_stuck(self, number: int) -> None:
        """Raises UnsupportedFamilyError if unit `number`, for which there is no memory now, will never find any: the
        computation waits for it, or for a later one, and so gives nothing back."""
        if number > self._asked or not self._unwanted.isdisjoint(self._spans):
            return
        asked, *lent = (self._name(unit % len(self._tape)) for unit in (self._asked, *sorted(self._spans)))
        raise UnsupportedFamilyError(
            f"model family {self._family!r}: {asked} is asked for while units that have not been given back "
            f"({', '.join(lent)}) leave no room in the ring of {format_size(self._ring_nbytes)}, expected {lent[0]} "
            "to be used first; layers use weights in another order than the store was made for: convert the model "
            "again with this version of tiered and transformers"
        )

    async def _until_wanted(self, number: int, current: int) -> None:
        """Wait while unit `number`, of pass `current`, is not to be read yet."""
        while number not in self._unwanted and not self._is_wanted(number, current):
            await self._change()
        if self._prefetch is not None and number > self._asked:
            self._ahead.append(number)

    def _is_wanted(self, number: int, current: int) -> bool:
        if self._last_pass is not None and current > self._last_pass:
            return False
        while self._ahead and self._ahead[0] <= self._asked:
            self._ahead.popleft()
        return self._prefetch is None or number <= self._asked or len(self._ahead) < self._prefetch

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _start(self, key: int, position: int, memory: memoryview) -> None:
        """Start the reads of the unit at `position` into `memory`."""
        assert self._group is not None
        load = self._group.create_task(self._load(key, position, memory), name=f"tiered-load-{key}")
        self._loads[load] = key
        load.add_done_callback(self._loads.pop)

    async def _load(self, key: int, position: int, memory: memoryview) -> None:
        """Read a unit's chunks side by side, then decode what is compressed."""
        unit, found = self._tape[position], None
        try:
            await self._reader.read_unit(unit, memory)
            for item in unit.compressed:
                with self._trace.span("decode", item.target.name, item.target.nbytes):
                    await self._reader.call(functools.partial(item.decode, memory))
            block = self._block_of[position]
            raw = torch.frombuffer(memory, dtype=torch.uint8)
            found = self._loans[block].views(position - self._firsts[block], raw)
        except Exception as error:
            self._held.discard(position)
            self._bring_back(key, error)
        else:
            self._bring_back(key, found)

    def _bring_back(self, key: int, found: Views | Exception) -> None:
        """Hand over a unit whose reads have ended, unless the computation has passed it by meanwhile."""
        self._reading.discard(key)
        if key in self._unwanted:
            self._unwanted.discard(key)
            self._ring.release(self._spans.pop(key))
            self._changed.set()
        else:
            self._units.put(key, found)
