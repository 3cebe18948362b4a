"""The streamer: walks the tape in a cycle ahead of the computation, and lends its blocks in order.

    in the loop                                          in the thread that computes
    feed task: for every block of the tape, for ever:    begin()   a pass begins
      find memory (its own if resident, else a span      lend()    the next block of the tape, once it is read;
      of the ring, waiting until one is free), and                 then its span may be overwritten
      start its reads

The bytes to read do not depend on the tokens, so the feed never waits for a pass to end; what bounds it is the ring.
Resident blocks are read in the first pass and then lent without the loop. This module alone knows where on the tape
reading and computing are.
"""

import asyncio
import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from tiered.io import DiskReader, Slab
from tiered.io.threads import all_of
from tiered.kernels import CancelFlag
from tiered.plan import Placement
from tiered.quant import QuantizedWeight
from tiered.store import BlockInfo, Store
from tiered.stream.handover import Handover
from tiered.stream.ring import Ring, RingSpan
from tiered.trace import Tracer


@dataclass(frozen=True, eq=False)
class LoadedBlock:
    """A block whose bytes are in memory."""

    info: BlockInfo
    memory: torch.Tensor
    """uint8, the block from its first byte."""
    weights: Mapping[str, torch.Tensor | QuantizedWeight]
    """Views of the weights, by name inside the block's module."""
    span: RingSpan | None
    """The part of the ring it occupies; None for a resident block."""


class Streamer:
    """Lends the blocks of `store`'s tape to one thread. An async context manager; leaving it ends all reads.

    `prefetch` is how many blocks may be read before they are asked for: 0 reads each block when it is asked for, which
    is the synchronous reference; None is bounded by the ring alone. Once `cancel` is set, waiting ends with
    InterruptedRun.
    """

    def __init__(
        self,
        store: Store,
        placement: Placement,
        reader: DiskReader,
        resident: Mapping[int, Slab],
        ring: Slab | None,
        trace: Tracer,
        cancel: CancelFlag,
        prefetch: int | None = None,
    ) -> None:
        self._store, self._placement, self._reader, self._trace = store, placement, reader, trace
        self._resident, self._ring_slab, self._prefetch = resident, ring, prefetch
        self._blocks: Handover[LoadedBlock] = Handover(cancel, trace)
        """Blocks in memory, by `_key`."""
        self._next = 0
        """Number of the block that is lent next, on the endless tape. Used by the computing thread."""
        self._ring = Ring(ring.nbytes if ring is not None else 0)
        self._asked = -1
        """The last number that has been asked for."""
        self._last_pass: int | None = None
        """Number of the pass after which nothing is read; None: not known yet."""
        self._changed = asyncio.Event()
        """Set when `_asked` or `_last_pass` changes."""
        self._group: asyncio.TaskGroup | None = None
        self._feed: asyncio.Task[None] | None = None
        self._loads: dict[asyncio.Task[None], int] = {}
        """Reads in flight, with the number of their block."""
        self._held: set[int] = set()
        """Resident blocks that have been read, or are being read."""
        self._released: deque[RingSpan] = deque()
        self._is_closing = False
        self._is_posted = False
        """Whether `_take_back` has been posted to the loop and has not run yet."""

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
        self._blocks.clear(kept=-len(self._store.tape))  # their memory goes back to the arena

    # In the thread that computes.

    @property
    def wait_seconds(self) -> float:
        """Seconds the computation has waited for blocks."""
        return self._blocks.wait_seconds

    def begin(self, is_last: bool = False) -> None:
        """A pass begins; if it `is_last`, nothing is read ahead for another."""
        current, position = divmod(self._next, len(self._store.tape))
        assert position == 0, "the last pass ended in the middle: rewind first"
        last = current if is_last else None
        if last != self._last_pass:
            self._loop.call_soon_threadsafe(self._set_last, last)

    @contextlib.contextmanager
    def lend(self) -> Iterator[LoadedBlock]:
        """The next block of the tape, until the context ends. Raises what its reads raised."""
        number, position, key = self._next, self._next % len(self._store.tape), self._key(self._next)
        if self._prefetch is not None:
            self._loop.call_soon_threadsafe(self._set_asked, number)
        block = self._blocks.take(key, self._store.tape[position].name, keep=key < 0)
        self._next += 1
        try:
            yield block
        finally:
            if block.span is not None:
                self._released.append(block.span)
                if not self._is_posted:
                    self._is_posted = True
                    self._loop.call_soon_threadsafe(self._take_back)

    def _key(self, number: int) -> int:
        """Key of block `number` of the endless tape: `number`, or if resident one below 0, the same in each pass."""
        position = number % len(self._store.tape)
        return position - len(self._store.tape) if position in self._placement.resident else number

    # In the loop.

    async def rewind(self) -> None:
        """Make the next pass start at the first block: end the reads in flight, and drop what was read ahead.

        Resident blocks stay, and reads of them go on. No block may be lent meanwhile.
        """
        assert self._group is not None and self._feed is not None
        dropped = [self._feed, *(task for task, number in self._loads.items() if number >= 0)]
        for task in dropped:
            task.cancel()
        await asyncio.wait(dropped)
        if self._is_closing:
            return
        self._blocks.clear(kept=0)
        self._ring = Ring(self._ring_slab.nbytes if self._ring_slab is not None else 0)
        self._next, self._asked, self._last_pass = 0, -1, None
        self._feed = self._group.create_task(self._feed_tape(), name="tiered-feed")

    def _set_last(self, last: int | None) -> None:
        self._last_pass = last
        self._changed.set()

    def _set_asked(self, number: int) -> None:
        self._asked = number
        self._changed.set()

    def _take_back(self) -> None:
        self._is_posted = False
        while self._released:
            self._ring.release(self._released.popleft())

    async def _feed_tape(self) -> None:
        tape, resident = self._store.tape, self._placement.resident
        for number in itertools.count():
            current, position = divmod(number, len(tape))
            if current and len(resident) == len(tape):
                return
            key = self._key(number)
            try:
                if key >= 0:
                    span = await self._borrow(position)
                    # After the wait for the ring, because what is wanted may change during it.
                    await self._until_wanted(number, current)
                    self._start(key, position, span)
                elif position not in self._held:
                    await self._until_wanted(number, current)
                    self._held.add(position)
                    self._start(key, position, None)
            except Exception as error:
                # A feed that dies silently would leave the computation waiting for ever.
                self._blocks.put(key, error)
                return

    async def _borrow(self, position: int) -> RingSpan:
        return await self._ring.borrow(self._store.layout(self._store.tape[position]).memory_nbytes)

    async def _until_wanted(self, number: int, current: int) -> None:
        """Wait while block `number`, of pass `current`, is not to be read yet."""
        while (self._last_pass is not None and current > self._last_pass) or (
            self._prefetch is not None and number > self._asked + self._prefetch
        ):
            self._changed.clear()
            await self._changed.wait()

    def _start(self, key: int, position: int, span: RingSpan | None) -> None:
        """Start the reads of the block at `position`, into `span` of the ring or into memory of its own."""
        assert self._group is not None
        if span is None:
            view = self._resident[position].view
        else:
            assert self._ring_slab is not None
            view = self._ring_slab.view[span.start : span.stop]
        load = self._group.create_task(self._load(key, position, view, span), name=f"tiered-load-{key}")
        self._loads[load] = key
        load.add_done_callback(self._loads.pop)

    async def _load(self, key: int, position: int, view: memoryview, span: RingSpan | None) -> None:
        """Read a block's units side by side, one behind the other in `view`, then decode what is compressed."""
        info = self._store.tape[position]
        units = self._store.layout(info).units
        ends = list(itertools.accumulate((unit.memory_nbytes for unit in units), initial=0))
        parts = [view[start:stop] for start, stop in itertools.pairwise(ends)]
        try:
            await all_of(self._reader.read_unit(unit, part) for unit, part in zip(units, parts, strict=True))
            memory = torch.frombuffer(view, dtype=torch.uint8)
            weights: dict[str, torch.Tensor | QuantizedWeight] = {}
            for unit, part, start in zip(units, parts, ends, strict=False):
                for item in unit.compressed:
                    with self._trace.span("decode", item.target.name, item.target.nbytes):
                        await self._reader.call(functools.partial(item.decode, part))
                for name, weight in unit.weights.items():
                    weights[name.removeprefix(info.prefix)] = weight.view(memory[start:])
        except Exception as error:
            self._held.discard(position)
            self._blocks.put(key, error)
        else:
            self._blocks.put(key, LoadedBlock(info, memory, weights, span))
