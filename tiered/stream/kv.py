"""The KV cache's pages between disk and computation: read ahead, written behind, in the order of the computation.

    feed task     for each layer, for each unit of a pass: find memory in the ring (waiting until it is free), wait for
                  writes of the same layer that an earlier pass began, start the reads, queue it
    fetch()       lends the oldest queued unit's records to its chunks, once they are read
    store()       takes them back and writes the pages that have been completed; then the memory is free again

A read or write that failed is raised by `fetch`; the pass's sequences must then be released, because pages of theirs
are missing.

Which pages a pass needs is known when it begins, so the feed begins and ends with it; the blocks' own stream goes on
meanwhile.
"""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

from tiered.cache import Extent, LentRecords
from tiered.io import Slab, SpillFile, all_of
from tiered.stream.ring import Ring, RingSpan
from tiered.trace import Tracer


@dataclass(eq=False)
class _Queued:
    records: LentRecords
    layer: int
    span: RingSpan | None
    """None where nothing is read and nothing will be completed."""
    read: asyncio.Task[None]


@dataclass(frozen=True)
class _Failed:
    """In the queue in place of what the feed could not bring."""

    error: Exception


class KVStream:
    """Moves records between `spill` and `ring`, for `layers` layers. An async context manager; leaving it ends all I/O.

    `ring` holds the largest unit's records of a layer at least; several times that to read ahead.
    """

    def __init__(self, spill: SpillFile, ring: Slab, layers: int, trace: Tracer) -> None:
        self._spill, self._slab, self._layers, self._trace = spill, ring, layers, trace
        self._ring = Ring(ring.nbytes)
        self._queue: asyncio.Queue[_Queued | _Failed] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._feed: asyncio.Task[None] | None = None
        self._current: _Queued | None = None
        self._writes: dict[int, list[asyncio.Task[None]]] = {}
        """Of each layer, those that have not been seen to end."""
        self._returned: asyncio.Task[None] | None = None
        """The last span's return to the ring, which takes spans back in order."""
        self.wait_seconds = 0.0
        """Seconds the computation has waited in `fetch`."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.end()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def begin(self, units: Sequence[LentRecords]) -> None:
        """A pass begins, whose layers will ask for the records of `units` in this order."""
        assert self._feed is None or self._feed.done(), "one pass at a time"
        self._feed = self._task(self._feed_pass(tuple(units)))

    async def fetch(self, records: LentRecords, layer: int) -> None:
        """Lend the records of `layer` to the chunks that share them. Raises what reading or earlier writing raised."""
        start = time.perf_counter()
        item = await self._queue.get()
        if isinstance(item, _Failed):
            raise item.error
        self._current = item
        assert item.records is records and item.layer == layer, "units come in the order they were announced"
        await asyncio.wait([item.read])
        item.read.result()
        records.lend(layer, self._memory(item.span))
        self._note_wait(start, layer)

    def store(self, records: LentRecords, layer: int) -> None:
        """The chunks have computed: what they have completed is written, behind."""
        item, self._current = self._current, None
        assert item is not None and item.records is records
        records.take_back(layer)
        if item.span is None:
            return
        extents = records.map_of(layer).writes(layer)
        write = self._task(self._write(item.span, extents))
        self._writes.setdefault(layer, []).append(write)
        self._give_back(item.span, write)

    async def end(self) -> None:
        """A pass has ended, well or not: nothing is read any more; writes go on."""
        if self._feed is not None and not self._feed.done():
            self._feed.cancel()
            await asyncio.wait([self._feed])
        left = [] if self._current is None else [self._current]
        self._current = None
        while not self._queue.empty():
            item = self._queue.get_nowait()
            left += [item] if isinstance(item, _Queued) else []
        for item in left:
            item.read.cancel()
            if item.span is not None:
                self._give_back(item.span, item.read)

    async def _feed_pass(self, units: tuple[LentRecords, ...]) -> None:
        try:
            for layer in range(self._layers):
                await self._await_writes(layer)
                for records in units:
                    await self._queue.put(await self._start(records, layer))
        except Exception as error:
            # A feed that dies silently would leave `fetch` waiting for ever.
            await self._queue.put(_Failed(error))

    async def _await_writes(self, layer: int) -> None:
        """An earlier pass may still be writing what this one reads."""
        writes = self._writes.get(layer)
        if writes:
            await asyncio.wait(writes)
            # Not forgotten before: a pass that is interrupted in the line above leaves them to the next one.
            del self._writes[layer]
            for write in writes:
                write.result()

    async def _start(self, records: LentRecords, layer: int) -> _Queued:
        """Find memory for a unit's records and start their reads."""
        places = records.map_of(layer)
        span = await self._ring.borrow(places.lent_nbytes) if places.lent_nbytes else None
        extents = places.reads(layer) if span is not None else []
        return _Queued(records, layer, span, self._task(self._read(span, extents)))

    async def _read(self, span: RingSpan | None, extents: Sequence[Extent]) -> None:
        await all_of(self._spill.read(extent.offset, self._part(span, extent)) for extent in extents)

    async def _write(self, span: RingSpan, extents: Sequence[Extent]) -> None:
        await all_of(self._spill.write(extent.offset, self._part(span, extent)) for extent in extents)

    def _give_back(self, span: RingSpan, after: asyncio.Task[None]) -> None:
        """Return `span` once `after` has ended, and the spans before it have been returned."""
        earlier = self._returned

        async def give_back() -> None:
            await asyncio.wait([after] if earlier is None else [after, earlier])
            await self._ring.release(span)

        self._returned = self._task(give_back())

    def _part(self, span: RingSpan | None, extent: Extent) -> memoryview:
        assert span is not None
        start = span.start + extent.memory_offset
        return self._slab.view[start : start + extent.nbytes]

    def _memory(self, span: RingSpan | None) -> torch.Tensor:
        if span is None:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._slab.view[span.start : span.stop], dtype=torch.uint8)

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task whose failure is raised where its result is waited for, and nowhere else."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._note_end)
        return task

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen: asyncio is not to print it where nobody asks any more

    def _note_wait(self, start: float, layer: int) -> None:
        waited = time.perf_counter() - start
        self.wait_seconds += waited
        self._trace.record("wait", f"kv of layer {layer}", start, waited)
