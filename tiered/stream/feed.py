"""The feed: reads the tape's units in a cycle, each into its place, ahead of the computation. All of it is the loop's.

For every unit of the tape, for ever: find memory (its own if resident, else a span of the ring, waiting until it is
free), and start its reads. The bytes to read do not depend on the tokens, so this never waits for a pass to end; what
bounds it is the ring. Resident units are read in the first pass. Memory that has never been used costs more time than
the reads that fill it on some machines, so a thread takes it from the system ahead of them.
"""

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import torch

from tiered.errors import UnsupportedFamilyError
from tiered.io import ChunkBuffers, DiskReader, Slab
from tiered.io.threads import Check, IOThreads
from tiered.plan import Plan
from tiered.plan.order import Reading, feed_order
from tiered.store import PAGE, Unit
from tiered.stream.handover import Handover
from tiered.stream.loan import AnyWeight
from tiered.stream.ring import Ring, RingSpan
from tiered.units import MIB, format_size, round_down

Views = Mapping[str, AnyWeight]
_READING_NBYTES: Final = 128 * MIB
"""Bytes of resident units that are being read or wait for a thread to do so, at most: what keeps 16 threads busy with
parts of chunks, twice. Begun all at once, thousands of tasks would be made before the first read."""
_POPULATE_NBYTES: Final = 4 * MIB
"""Bytes populated at once: 24 ms where a GiB takes 6 s, so that closing does not wait."""
_POPULATE_NICE: Final = 10
"""Priority of the thread that populates, as of `nice`: computing comes first, which gives the ring back."""
_AHEAD_NBYTES: Final = 64 * MIB
"""How far ahead of what has been read memory is populated at least: reads in flight touch what is nearer."""


class Feed:
    """Reads `tape` with `reader` into `resident`, by number of the unit on the tape, and `ring`, and hands units over
    in `units`, by `key`.

    Chunks of compressed units pass through `buffers`. `view` makes the views of the unit of a number in its memory;
    `name` is what a unit is called. `prefetch` is that of `Streamer`. An error that ends the feed is handed over to
    whoever asks for what will not come; one that names `family` where the computation waits for what can never come.
    """

    def __init__(
        self,
        tape: Sequence[Unit],
        plan: Plan,
        reader: DiskReader,
        resident: Mapping[int, Slab],
        ring: Slab | None,
        units: Handover[Views],
        view: Callable[[int, torch.Tensor], Views],
        name: Callable[[int], str],
        family: str,
        prefetch: int | None,
        buffers: ChunkBuffers,
    ) -> None:
        self._tape, self._reader, self._resident, self._ring_slab = tape, reader, resident, ring
        self._buffers = buffers
        self._units, self._view, self._name = units, view, name
        self._family, self._prefetch = family, prefetch
        self._plan = plan
        self._ring_nbytes = round_down(ring.nbytes, PAGE) if ring is not None else 0
        self._group: asyncio.TaskGroup | None = None
        self._task: asyncio.Task[None] | None = None
        self._populating: asyncio.Task[None] | None = None
        self._populater = IOThreads(1, "tiered-populate")
        self._loads: dict[asyncio.Task[None], int] = {}
        """Reads in flight, with the key of their unit."""
        self._held: set[int] = set()
        """Resident units that have been read, or are being read."""
        self._is_closing = False
        self._restart()

    def _restart(self) -> None:
        """The state before the first unit."""
        self._ring = Ring(self._ring_nbytes)
        self._changed = asyncio.Event()
        """Set whenever what the feed waits for may have come about."""
        self._asked = -1
        """The last number that has been asked for; one whose reads have begun need not be."""
        self.begun = -1
        """The last number that the feed is done with: its reads have begun, if it has any. The computing thread looks
        at it."""
        self.last_pass: int | None = None
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

    async def start(self) -> None:
        """Begin to read."""
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._task = self._group.create_task(self._feed_tape(), name="tiered-feed")
        if self._prefetch != 0:
            self._populating = self._group.create_task(self._populater.call(self._populate), name="tiered-populate")

    async def close(self) -> None:
        """End all reads."""
        assert self._group is not None and self._task is not None
        self._is_closing = True
        for task in (self._task, self._populating, *self._loads):
            if task is not None:
                task.cancel()
        await self._group.__aexit__(None, None, None)
        self._populater.close()
        self._units.clear(kept=-len(self._tape))  # their memory goes back to the arena

    def key(self, number: int) -> int:
        """Key of a unit by its number on the endless tape: the number, or if resident one below 0, the same in each
        pass."""
        position = number % len(self._tape)
        return position - len(self._tape) if position in self._resident else number

    async def rewind(self) -> None:
        """Begin at the first unit: end the reads in flight, and drop what was read ahead. Resident units stay, and
        reads of them go on."""
        assert self._group is not None and self._task is not None
        dropped = [self._task, *(task for task, key in self._loads.items() if key >= 0)]
        for task in dropped:
            task.cancel()
        await asyncio.wait(dropped)
        if self._is_closing:
            return
        self._units.clear(kept=0)
        self._restart()
        self._task = self._group.create_task(self._feed_tape(), name="tiered-feed")

    def set_last(self, last: int | None) -> None:
        """Read nothing after pass `last`; None: it is not known yet which is the last one."""
        self.last_pass = last
        self._changed.set()

    def set_asked(self, number: int) -> None:
        """The computation waits for unit `number`."""
        self._asked = number
        self._changed.set()
        self._raise_failure()

    def _raise_failure(self) -> None:
        """Hand the feed's error to whoever waits for what will not come."""
        if self._failure is not None and self._asked >= self._failure[0]:
            self._units.put(self.key(self._asked), self._failure[1])

    def take_back(self, numbers: deque[int]) -> None:
        """Take back units that the computation has used, or has passed by. Empties `numbers`."""
        while numbers:
            number = numbers.popleft()
            if number in self._spans and number not in self._reading:
                self._units.discard(number)
                self._ring.release(self._spans.pop(number))
            else:
                self._unwanted.add(number)
        self._changed.set()

    def _order(self) -> Iterator[Reading]:
        """The turns of the tape's units, from the first one on."""
        return feed_order(self._plan.tape, self._plan.held, self._plan.placement.resident, self._ring_nbytes)

    async def _feed_tape(self) -> None:
        for turn in self._order():
            try:
                if turn.start is not None:
                    await self._feed_streamed(turn, turn.start)
                elif turn.position not in self._held:
                    await self._until_wanted(turn)
                    while self._reading_nbytes() >= _READING_NBYTES:
                        await self._change()
                    self._held.add(turn.position)
                    self._start(self.key(turn.number), turn.position, self._resident[turn.position].view)
                self.begun = turn.number
            except Exception as error:
                # A feed that dies silently would leave the computation waiting for ever.
                self._failure = turn.number, error
                self._raise_failure()
                return

    async def _feed_streamed(self, turn: Reading, start: int) -> None:
        """Find memory at `start` of the ring for a unit, and start its reads; unless the computation passes it by."""
        number, position = turn.number, turn.position
        while number not in self._unwanted:
            span = self._ring.borrow_at(start, self._tape[position].memory_nbytes)
            if span is None:
                self._check_not_stuck(number)
                await self._change()
                continue
            # After the wait for the ring, because what is wanted may change during it.
            await self._until_wanted(turn)
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

    async def _until_wanted(self, turn: Reading) -> None:
        """Wait while a unit is not to be read yet."""
        number = turn.number
        while number not in self._unwanted and not self._is_wanted(number, turn.passed):
            await self._change()
        if self._prefetch is not None and number > self._asked:
            self._ahead.append(number)

    def _is_wanted(self, number: int, passed: int) -> bool:
        if self.last_pass is not None and passed > self.last_pass:
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
        load.add_done_callback(self._end)

    def _end(self, load: asyncio.Task[None]) -> None:
        """The reads of a unit have ended."""
        if self._loads.pop(load) < 0:  # fewer bytes of resident units are being read
            self._changed.set()

    def _reading_nbytes(self) -> int:
        """Bytes of the resident units that are being read."""
        return sum(self._tape[key].nbytes for key in self._loads.values() if key < 0)

    async def _load(self, key: int, position: int, memory: memoryview) -> None:
        """Read a unit, and hand over its views."""
        unit = self._tape[position]
        try:
            await self._reader.read_unit(unit, memory, self._buffers)
            found = self._view(position, torch.frombuffer(memory, dtype=torch.uint8))
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

    def _populate(self, check: Check) -> None:
        """In a thread of its own: take memory from the system in the order in which it is read, ahead of the reads.

        Those touch what they find untouched, so where this falls behind it goes on further ahead, and the work is
        shared. Ends with an InterruptedRun of `check`.
        """
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _POPULATE_NICE)
        done, before = 0, self._reader.bytes_read
        for slab, start, nbytes in self._first_use():
            for offset in range(start, start + nbytes, _POPULATE_NBYTES):
                check()
                size = min(_POPULATE_NBYTES, start + nbytes - offset)
                if done >= self._reader.bytes_read - before + _AHEAD_NBYTES and not slab.populate(offset, size):
                    return
                done += size

    def _first_use(self) -> Iterator[tuple[Slab, int, int]]:
        """Slab, start and bytes of each unit's memory, in the order of the tape, until the ring has been used once."""
        left = self._ring_nbytes
        for turn, unit in zip(self._order(), self._tape, strict=False):
            if turn.start is None:
                yield self._resident[turn.position], 0, unit.memory_nbytes
            elif left > 0 and self._ring_slab is not None:
                yield self._ring_slab, turn.start, unit.memory_nbytes
                left -= unit.memory_nbytes
