"""The feed: reads the tape's units in a cycle, each into its place, ahead of the computation. All of it is the loop's.

For every unit of the tape, for ever: find memory (its own if resident, else a span of the ring, waiting until it is
free), and start its reads. The bytes to read do not depend on the tokens, so this never waits for a pass to end; what
bounds it is the ring. Resident units are read in the first pass. Memory that has never been used costs more time than
the reads that fill it on some machines, so a thread takes it from the system ahead of them.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

import torch

from tiered.io import ChunkBuffers, DiskReader, Slab
from tiered.io.threads import Check, IOThreads
from tiered.plan.order import Reading
from tiered.store import PAGE, Unit
from tiered.stream.ring import RingSpan
from tiered.stream.walk import Order, Receiver, Walk
from tiered.units import MIB, round_down

T = TypeVar("T")
_READING_NBYTES: Final = 128 * MIB
"""Bytes of resident units that are being read or wait for a thread to do so, at most: what keeps 8 threads busy with
parts of chunks, twice. Begun all at once, thousands of tasks would be made before the first read."""
_POPULATE_NBYTES: Final = 2 * MIB
"""Bytes populated at once, a huge page: 12 ms where a GiB takes 6 s. Whoever changes the process's map of memory (a
thread that starts, a large allocation) waits for them, and everybody's page faults for him."""
_POPULATE_NICE: Final = 10
"""Priority of the thread that populates, as of `nice`: computing comes first, which gives the ring back."""


class Feed(Walk[T]):
    """Reads `tape` with `reader` into `resident`, by number of the unit on the tape, and `ring`.

    Chunks of compressed units pass through `buffers`. `view` makes what is handed over of the unit of a number in its
    memory. `on_write` is told memory that is about to be read into. All else is as of `Walk`.
    """

    def __init__(
        self,
        tape: Sequence[Unit],
        order: Order,
        resident: Mapping[int, Slab],
        units: Receiver[T],
        view: Callable[[int, torch.Tensor], T],
        name: Callable[[int], str],
        family: str | None,
        prefetch: int | None,
        *,
        reader: DiskReader,
        ring: Slab | None,
        buffers: ChunkBuffers,
        on_write: Callable[[memoryview], None] | None = None,
    ) -> None:
        sizes = [unit.memory_nbytes for unit in tape]
        ring_nbytes = round_down(ring.nbytes, PAGE) if ring is not None else 0
        super().__init__(order, sizes, resident, ring_nbytes, units, name, family, prefetch)
        self._tape, self._reader, self._resident, self._ring_slab = tape, reader, resident, ring
        self._buffers, self._view, self._on_write = buffers, view, on_write
        self._populating: asyncio.Task[None] | None = None
        self._populater = IOThreads(1, "tiered-populate")
        self._loads: dict[asyncio.Task[None], int] = {}
        """Reads in flight, with the key of their unit."""
        self._held: set[int] = set()
        """Resident units that have been read, or are being read."""

    async def start(self) -> None:
        if self._prefetch != 0:
            self._reader.start_threads()
        await super().start()
        if self._prefetch != 0:
            assert self._group is not None
            self._populating = self._group.create_task(self._populater.call(self._populate), name="tiered-populate")

    async def close(self) -> None:
        await super().close()
        self._populater.close()

    def _dropped(self) -> Iterable[asyncio.Task[None]]:
        return [task for task, key in self._loads.items() if key >= 0]

    def _ended(self) -> Iterable[asyncio.Task[None]]:
        return [*([self._populating] if self._populating is not None else []), *self._loads]

    async def _begin_resident(self, turn: Reading) -> None:
        if turn.position in self._held:
            return
        await self._until_wanted(turn)
        while self._reading_nbytes() >= _READING_NBYTES:
            await self._change()
        self._held.add(turn.position)
        self._start(self.key(turn.number), turn.position, self._resident[turn.position].view)

    async def _begin_streamed(self, turn: Reading, span: RingSpan) -> None:
        assert self._ring_slab is not None
        self._start(turn.number, turn.position, self._ring_slab.view[span.start : span.stop])

    def _start(self, key: int, position: int, memory: memoryview) -> None:
        """Start the reads of the unit at `position` into `memory`."""
        assert self._group is not None
        if self._on_write is not None:
            self._on_write(memory)
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
        """Read a unit, and hand it over."""
        unit = self._tape[position]
        try:
            await self._reader.read_unit(unit, memory, self._buffers)
            found = self._view(position, torch.frombuffer(memory, dtype=torch.uint8))
        except Exception as error:
            self._held.discard(position)
            self._bring_back(key, error)
        else:
            self._bring_back(key, found)

    def _populate(self, check: Check) -> None:
        """In a thread of its own: take memory from the system in the order in which it is read, ahead of the reads.

        Those touch what they find untouched, so what is being read is left to them, and where this falls behind the
        work is shared. Ends with an InterruptedRun of `check`.
        """
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _POPULATE_NICE)
        for number, slab, start, nbytes in self._first_use():
            for offset in range(start, start + nbytes, _POPULATE_NBYTES):
                check()
                if number <= self.begun:
                    break
                if not slab.populate(offset, min(_POPULATE_NBYTES, start + nbytes - offset)):
                    return

    def _first_use(self) -> Iterator[tuple[int, Slab, int, int]]:
        """Number, slab, start and bytes of each unit's memory, in the order of the tape, until the ring has been used
        once."""
        left = self._ring_nbytes
        for turn, unit in zip(self._order(), self._tape, strict=False):
            if turn.start is None:
                yield turn.number, self._resident[turn.position], 0, unit.memory_nbytes
            elif left > 0 and self._ring_slab is not None:
                yield turn.number, self._ring_slab, turn.start, unit.memory_nbytes
                left -= unit.memory_nbytes
