"""The streamer: walks the tape in a cycle ahead of the computation, and hands out blocks in order.

    feed task     for every block of the tape, for ever: find memory (its own if resident, else a span of the ring,
                  waiting until one is free), start its reads, queue it
    next()        the oldest queued block, once its reads are done
    release()     its span may be overwritten

The bytes to read do not depend on the tokens, so the feed never waits for a pass to end; what bounds it is the ring.
This module is the only place that spawns tasks.
"""

import asyncio
import functools
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from tiered.io import DiskReader, Slab, all_of
from tiered.plan import Placement
from tiered.quant import QuantizedWeight
from tiered.store import CHUNK_NBYTES, BlockInfo, Store
from tiered.stream.ring import Ring, RingSpan
from tiered.trace import Tracer


@dataclass(eq=False)
class LoadedBlock:
    """A block whose bytes are in memory, from `Streamer.next` until `Streamer.release`."""

    position: int
    """On the tape."""
    info: BlockInfo
    memory: torch.Tensor
    """uint8, the block from its first byte."""
    weights: Callable[[], Mapping[str, torch.Tensor | QuantizedWeight]]
    """Views of the weights by name inside the block's module."""
    span: RingSpan | None
    """The part of the ring it occupies; None for a resident block."""


@dataclass(eq=False)
class _Queued:
    loaded: LoadedBlock | None
    done: asyncio.Future[None]
    """Set when the block's bytes are in memory; a failed read is its exception, so that it surfaces in `next`."""


class Streamer:
    """Feeds the blocks of `store`'s tape, for ever. An async context manager; leaving it ends all reads.

    `prefetch` is how many blocks may be read before they are asked for: 0 reads each block when it is wanted, which
    is the synchronous reference; None is bounded by the ring alone.
    """

    def __init__(
        self,
        store: Store,
        placement: Placement,
        reader: DiskReader,
        resident: Mapping[int, Slab],
        ring: Slab | None,
        trace: Tracer,
        prefetch: int | None = None,
    ) -> None:
        self._store, self._placement, self._reader, self._trace = store, placement, reader, trace
        self._resident = resident
        self._loading: dict[int, asyncio.Future[None]] = {}
        """Resident blocks that have been asked for: a later pass waits for the same reads, and fails with them."""
        self._views: dict[int, Mapping[str, torch.Tensor | QuantizedWeight]] = {}
        """Of resident blocks, which stay where they are: making some forty views a block takes a while."""
        self._ring_slab = ring
        self._ring = Ring(ring.nbytes) if ring is not None else None
        self._queue: asyncio.Queue[_Queued] = asyncio.Queue(maxsize=len(store.tape))
        self._oldest: _Queued | None = None
        """Taken from the queue and not handed out yet: where the one who waited for it was cancelled."""
        self._asked = False
        self._credits = asyncio.Semaphore(prefetch) if prefetch is not None else None
        self._last_pass: int | None = None
        self._resumed = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._feed: asyncio.Task[None] | None = None
        self._loads: set[asyncio.Task[None]] = set()
        self.wait_seconds = 0.0
        """Seconds the computation has waited in `next`."""

    async def __aenter__(self) -> Self:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._feed = self._group.create_task(self._feed_tape(), name="tiered-feed")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._group is not None and self._feed is not None
        for task in (self._feed, *self._loads):
            task.cancel()
        await self._group.__aexit__(None, None, None)
        self._views.clear()  # their memory goes back to the arena

    def end_after(self, passes: int | None) -> None:
        """Read nothing beyond pass number `passes` (counted from 1, since the start); None: no end is known."""
        self._last_pass = passes
        self._resumed.set()

    async def next(self) -> LoadedBlock:
        """The next block of the tape, read and decoded. Raises what its reads raised.

        Cancelled, it may be called again, for the same block.
        """
        start = time.perf_counter()
        if self._credits is not None and not self._asked:
            self._credits.release()
        self._asked = True
        if self._oldest is None:
            self._oldest = await self._queue.get()
        queued = self._oldest
        # Not `await queued.done`: cancelling that would cancel the future itself, which the load has yet to set.
        await asyncio.wait([queued.done])
        if queued.loaded is None:
            # The feed has ended with this error, nothing will follow.
            queued.done.result()
            raise AssertionError("only errors come without a block")
        self._oldest, self._asked = None, False
        if queued.done.exception() is not None:
            self._loading.pop(queued.loaded.position, None)
            await self.release(queued.loaded)
        queued.done.result()
        waited = time.perf_counter() - start
        self.wait_seconds += waited
        self._trace.record("wait", queued.loaded.info.name, start, waited)
        return queued.loaded

    def next_resident(self) -> LoadedBlock | None:
        """The next block, if it is a resident one that has been read: several of them need no hand-over each."""
        if self._credits is not None:
            return None
        if self._oldest is None and not self._queue.empty():
            self._oldest = self._queue.get_nowait()
        queued = self._oldest
        if queued is None or queued.loaded is None or queued.loaded.span is not None:
            return None
        if not queued.done.done() or queued.done.exception() is not None:
            return None
        self._oldest = None
        return queued.loaded

    async def release(self, block: LoadedBlock) -> None:
        """The computation is done with `block`."""
        if block.span is not None:
            assert self._ring is not None
            await self._ring.release(block.span)

    async def _feed_tape(self) -> None:
        tape = self._store.tape
        try:
            for number in itertools.count():
                current_pass, position = divmod(number, len(tape))
                if self._credits is not None:
                    await self._credits.acquire()
                while self._last_pass is not None and current_pass >= self._last_pass:
                    self._resumed.clear()
                    await self._resumed.wait()
                await self._queue.put(await self._start(position))
        except Exception as error:
            # A feed that dies silently would leave `next` waiting for ever.
            failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            _fail(failed, error)
            await self._queue.put(_Queued(None, failed))

    async def _start(self, position: int) -> _Queued:
        """Find memory for the block at `position` and start its reads."""
        assert self._group is not None
        info = self._store.tape[position]
        layout = self._store.layout(info)
        span: RingSpan | None = None
        if position in self._placement.resident:
            view = self._resident[position].view
        else:
            assert self._ring is not None and self._ring_slab is not None
            span = await self._ring.borrow(layout.memory_nbytes)
            view = self._ring_slab.view[span.start : span.stop]
        memory = torch.frombuffer(view, dtype=torch.uint8)

        def weights() -> Mapping[str, torch.Tensor | QuantizedWeight]:
            views = self._views.get(position)
            if views is None:
                views = {n.removeprefix(info.prefix): weight.view(memory) for n, weight in layout.weights.items()}
                if span is None:
                    self._views[position] = views
            return views

        done = self._loading.get(position)
        if done is None:
            done = asyncio.get_running_loop().create_future()
            load = self._group.create_task(self._load(info, view, done), name=f"tiered-load-{info.name}")
            self._loads.add(load)
            load.add_done_callback(self._loads.discard)
            if span is None:
                self._loading[position] = done
        return _Queued(LoadedBlock(position, info, memory, weights, span), done)

    async def _load(self, info: BlockInfo, view: memoryview, done: asyncio.Future[None]) -> None:
        """Read a block's chunks side by side, then decode what is compressed."""
        chunks = range(-(-info.file.nbytes // CHUNK_NBYTES))
        try:
            # All of them end before one that failed is reported: the memory may then be lent to another block.
            await all_of(self._reader.read_chunk(info.file, chunk, view) for chunk in chunks)
            for item in self._store.layout(info).compressed:
                with self._trace.span("decode", item.target.name, item.target.nbytes):
                    await self._reader.call(functools.partial(item.decode, view))
        except Exception as error:
            _fail(done, error)
        else:
            done.set_result(None)


def _fail(future: asyncio.Future[None], error: Exception) -> None:
    """Set the exception, and note it as seen: where nobody asks for it any more, asyncio is not to print it."""
    future.set_exception(error)
    future.exception()
