"""The KV cache's pages between disk and computation: read ahead, written behind, in the order of the computation.

    in the loop                                          in the thread that computes
    feed task: for each layer, each group of a pass:      begin()   a pass begins, with these groups
      find memory in the ring (waiting until it is       lend()    the next group's blocks, once they are read;
      free), wait for writes of the same layer that                then the pages that it has completed are
      an earlier pass began, start the reads                       written, and its memory is free again

A layer that has no pages of its own reads those of an earlier layer again, when that has computed and what it wrote is
on disk: to keep them in memory meanwhile would take as much as all sequences have there.

`lend` raises the error of a read or write that failed; that of a write perhaps only in the next pass. The sequences of
the pass must then be released, because some of their pages are missing.

Which pages a pass needs is known when it begins, so the feed begins and ends with it. The streamer of weights goes on
meanwhile.
"""

import asyncio
import contextlib
from collections import defaultdict, deque
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

from tiered.cache import Extent, LentBlocks
from tiered.io import Slab, SpillFile, all_of
from tiered.kernels import CancelFlag
from tiered.stream.handover import Handover, run_in
from tiered.stream.ring import Ring, RingSpan
from tiered.trace import Tracer


@dataclass(eq=False)
class _Lent:
    """A group's memory for one layer."""

    span: RingSpan | None
    """None where nothing is read and nothing will be completed."""
    read: asyncio.Task[None]


class KVStream:
    """Moves KV blocks of `layers` layers between `spill` and `ring`. An async context manager; leaving it ends all I/O.

    `ring` must hold at least the largest group's blocks of one layer, and several times that to read ahead. Once
    `cancel` is set, waiting ends with InterruptedRun.
    """

    def __init__(self, spill: SpillFile, ring: Slab, layers: int, trace: Tracer, cancel: CancelFlag) -> None:
        self._spill, self._slab, self._layers = spill, ring, layers
        self._read_groups: Handover[_Lent] = Handover(cancel, trace)
        self._next = 0
        """Number of the next loan in this pass: layer by layer, group by group. Used by the computing thread."""
        self._groups: tuple[LentBlocks, ...] = ()
        self._ring = Ring(ring.nbytes)
        self._lent: deque[_Lent] = deque()
        """What the feed has found memory for and the computation has not given back."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._feed: asyncio.Task[None] | None = None
        self._writes: dict[int, list[asyncio.Task[None]]] = {}
        """For each layer, the writes whose end nobody has waited for yet."""
        self._computed: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)
        """By number, which loans of this pass have ended."""
        self._returned: asyncio.Task[None] | None = None
        """The task that returns the last span: the ring takes spans back in order."""

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._end()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # In the thread that computes.

    @property
    def wait_seconds(self) -> float:
        """Seconds the computation has waited for pages."""
        return self._read_groups.wait_seconds

    @contextlib.contextmanager
    def serving(self, groups: Sequence[LentBlocks]) -> Iterator[None]:
        """One pass, each layer of which borrows the blocks of `groups` in this order. When the context ends, reading
        stops; writes go on."""
        self._next, self._groups = 0, tuple(groups)
        self._loop.call_soon_threadsafe(self._begin)
        try:
            yield
        finally:
            run_in(self._loop, self._end())

    @contextlib.contextmanager
    def lend(self, blocks: LentBlocks, layer: int) -> Iterator[None]:
        """Lend `blocks` the memory with its KV blocks of `layer`. Raises what reading or earlier writing raised.

        If the context ends without an error, the pages completed in it are written in the background.
        """
        number = self._next
        expected = self._groups[number % len(self._groups)]
        assert (blocks, layer) == (expected, number // len(self._groups)), (
            "groups come in the order they were announced"
        )
        lent = self._read_groups.take(number, f"kv of layer {layer}")
        self._next += 1
        blocks.lend(layer, self._memory(lent.span))
        try:
            yield
        finally:
            blocks.take_back(layer)
        extents = blocks.writes(layer) if lent.span is not None else []
        self._loop.call_soon_threadsafe(self._store, number, lent, layer, extents)

    def read_states(self, extents: Mapping[int, tuple[int, int]]) -> tuple[torch.Tensor, ...]:
        """Copies (uint8) of what is in the file at `extents` (offset and bytes, by layer), between two passes. Raises
        what reading or earlier writing raised."""
        return run_in(self._loop, self._move(extents, [None] * len(extents)))

    def write_states(self, extents: Mapping[int, tuple[int, int]], states: Sequence[torch.Tensor]) -> None:
        """Put back what `read_states` gave."""
        run_in(self._loop, self._move(extents, states))

    # In the loop.

    async def _move(
        self, extents: Mapping[int, tuple[int, int]], states: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, ...]:
        """Write `states` to `extents`, or read where there is None; returns copies of what is there then."""
        found = []
        for (layer, (offset, nbytes)), state in zip(extents.items(), states, strict=True):
            await self._await_writes(layer)
            span = await self._ring.borrow(nbytes)
            memory, extent = self._memory(span), [Extent(offset, 0, nbytes)]
            if state is not None:
                memory[:nbytes] = state
            moved = self._task(self._read(span, extent) if state is None else self._write(span, extent))
            try:
                await moved
                found.append(memory[:nbytes].clone())
            finally:
                self._give_back(span, moved)
        return tuple(found)

    def _begin(self) -> None:
        assert self._feed is None or self._feed.done(), "one pass at a time"
        self._computed.clear()
        self._feed = self._task(self._feed_pass(self._groups))

    def _store(self, number: int, lent: _Lent, layer: int, extents: Sequence[Extent]) -> None:
        """Write what a group has completed in `layer`, in loan `number`; then its memory is free again."""
        self._lent.remove(lent)
        if lent.span is not None:
            write = self._task(self._write(lent.span, extents))
            self._writes.setdefault(layer, []).append(write)
            self._give_back(lent.span, write)
        self._computed[number].set()

    async def _end(self) -> None:
        """End the pass, whether it succeeded or not: stop its reads and take its memory back."""
        if self._feed is not None and not self._feed.done():
            self._feed.cancel()
            await asyncio.wait([self._feed])
        while self._lent:
            lent = self._lent.popleft()
            lent.read.cancel()
            if lent.span is not None:
                self._give_back(lent.span, lent.read)
        self._read_groups.clear()

    async def _feed_pass(self, groups: tuple[LentBlocks, ...]) -> None:
        for number in range(self._layers * len(groups)):
            layer, group = divmod(number, len(groups))
            try:
                source = groups[group].pool.source_of[layer]
                if source != layer:
                    # What the pass adds to the pages of the other layer is read with them.
                    await self._computed[source * len(groups) + group].wait()
                if group == 0 or source != layer:
                    await self._await_writes(source)
                await self._start(number, groups[group], layer)
            except Exception as error:
                # A feed that dies silently would leave the computation waiting for ever.
                self._read_groups.put(number, error)
                return

    async def _await_writes(self, layer: int) -> None:
        """Wait for writes in `layer` that have begun: what is read next may be what they write."""
        writes = self._writes.get(layer, [])[:]
        if writes:
            await asyncio.wait(writes)
            # Only now: if the pass is interrupted in the line above, the next one must wait for them. Others may have
            # begun meanwhile.
            self._writes[layer] = [write for write in self._writes[layer] if write not in writes]
            for write in writes:
                write.result()

    async def _start(self, number: int, blocks: LentBlocks, layer: int) -> None:
        """Find memory for a group's blocks and start their reads."""
        nbytes = blocks.lent_nbytes(layer)
        span = await self._ring.borrow(nbytes) if nbytes else None
        extents = blocks.reads(layer) if span is not None else []
        lent = _Lent(span, self._task(self._read(span, extents)))
        self._lent.append(lent)
        lent.read.add_done_callback(lambda read: self._note_read(number, lent))

    def _note_read(self, number: int, lent: _Lent) -> None:
        """Hand over a group whose reads have ended, unless its pass has ended before."""
        if lent in self._lent and not lent.read.cancelled():
            error = lent.read.exception()
            self._read_groups.put(number, error if isinstance(error, Exception) else lent)

    async def _read(self, span: RingSpan | None, extents: Sequence[Extent]) -> None:
        await all_of(self._spill.read(extent.offset, self._part(span, extent)) for extent in extents)

    async def _write(self, span: RingSpan, extents: Sequence[Extent]) -> None:
        await all_of(self._spill.write(extent.offset, self._part(span, extent)) for extent in extents)

    def _give_back(self, span: RingSpan, after: asyncio.Task[None]) -> None:
        """Return `span` once `after` has ended, and the spans before it have been returned."""
        earlier = self._returned

        async def give_back() -> None:
            await asyncio.wait([after] if earlier is None else [after, earlier])
            self._ring.release(span)

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
            task.exception()  # marks it as seen: asyncio prints errors that nobody asks for
