"""The KV cache's stream: pages come in order and ahead, go to disk behind, and no error is lost or hangs.

A pass is played without a model: each group writes what it should find there in the next pass.
"""

import asyncio
import errno
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from tests.waiting import SECONDS
from tiered.cache import CachePlan, KVPool, KVShape, LentBlocks, Part, SequenceKV, layer_groups
from tiered.errors import DiskFullError, InterruptedRun, ReadError
from tiered.io import Arena, Faults, SpillFile
from tiered.kernels import CancelFlag
from tiered.kernels.attention import PAGE_TOKENS
from tiered.stream import KVStream
from tiered.trace import Tracer

LAYERS: Final = 3
ALL_LAYERS: Final = LAYERS + 1
"""One of them keeps no keys."""
CONTEXT: Final = 10 * PAGE_TOKENS


def cache_plan(sequences: int, lent_pages: int, sources: Sequence[int] = range(ALL_LAYERS)) -> CachePlan:
    shape = KVShape(2, 16, 16, "bfloat16")
    shapes = [shape if source == layer else None for layer, source in enumerate(sources)]
    if not any(shape is None for shape in shapes):
        shapes[1] = None
    groups = layer_groups((0,) * ALL_LAYERS, shapes, sources=sources)
    return CachePlan(ALL_LAYERS, 8, True, groups, sequences, CONTEXT, sequences * CONTEXT, 64, lent_pages)


@dataclass
class Calls:
    """`preadv` or `pwritev` that tells `on_call` the offset first, which may raise or wait."""

    call: Faults
    on_call: Callable[[int], None] = lambda offset: None

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        self.on_call(offset)
        return self.call(fd, buffers, offset, flags)


@dataclass
class Setup:
    stream: KVStream
    pool: KVPool
    reads: Calls
    writes: Calls
    spill: SpillFile
    ring: Any
    cancel: CancelFlag

    def sequences(self, count: int) -> list[SequenceKV]:
        found = [self.pool.reserve(CONTEXT) for _ in range(count)]
        return [kv for kv in found if kv is not None]

    def groups(self, kvs: Sequence[SequenceKV], tokens: int) -> list[LentBlocks]:
        """A group for each sequence, which gets so many tokens more."""
        return [LentBlocks(self.pool, [Part(kv, kv.length, tokens)]) for kv in kvs]


@asynccontextmanager
async def streaming(
    folder: Path, sequences: int = 4, lent_pages: int = 10, sources: Sequence[int] = range(ALL_LAYERS)
) -> AsyncIterator[Setup]:
    """A stream with memory for some groups of the longest sequence; `sources`: whose pages each layer reads."""
    plan = cache_plan(sequences, lent_pages, sources)
    reads, writes = Calls(os.preadv), Calls(os.pwritev)
    with Arena(plan.ring_nbytes + plan.pool_nbytes + 3 * 4096) as arena:
        pool = KVPool(plan, arena.borrow(plan.pool_nbytes, "kv").tensor())
        ring = arena.borrow(plan.ring_nbytes, "ring")
        trace = Tracer()
        with SpillFile(folder, plan.blocks_nbytes, 4, trace, preadv=reads, pwritev=writes) as spill:
            async with KVStream(spill, ring, ALL_LAYERS, trace, cancel := CancelFlag()) as stream:
                yield Setup(stream, pool, reads, writes, spill, ring, cancel)


def run(work: Coroutine[Any, Any, None]) -> None:
    """A stream that hangs fails."""
    asyncio.run(asyncio.wait_for(work, SECONDS))


def marker(layer: int, kv: SequenceKV, page: int) -> int:
    return 1 + layer * 10_000 + kv.tail * 100 + page


def check_and_fill(setup: Setup, group: LentBlocks, layer: int) -> None:
    """What a group computes: it finds every page it completed before, and completes more. A layer that reads those of
    another finds these, too."""
    source = setup.pool.source_of[layer]
    if setup.pool.group_of[source] is None:
        assert not len(group.memory(layer))
        return
    places, memory = group.map_of(source), group.memory(source)
    numbers, count = memory.view(torch.int64), setup.pool.layouts[0].block_nbytes // 8
    for number, part in enumerate(places.parts):
        for page in range(part.stop // PAGE_TOKENS):
            block = numbers[places.offset(number, page) // 8 :][:count]
            if page < part.first_page or source != layer:
                assert (block == marker(source, part.kv, page)).all()
            else:
                block[:] = marker(layer, part.kv, page)


async def run_pass(
    setup: Setup, groups: list[LentBlocks], stop_at: tuple[int, int] | None = None, pause: float = 0
) -> None:
    """All layers of `groups`, in a thread of their own as an engine's; ends before (layer, number), if asked to."""
    await asyncio.to_thread(_run_pass, setup, groups, stop_at, pause)


def _run_pass(setup: Setup, groups: list[LentBlocks], stop_at: tuple[int, int] | None, pause: float) -> None:
    with setup.stream.serving(groups):
        for layer in range(ALL_LAYERS):
            for number, group in enumerate(groups):
                if (layer, number) == stop_at:
                    return
                with setup.stream.lend(group, layer):
                    setup.cancel.check()  # as the engine does before every micro-batch
                    check_and_fill(setup, group, layer)
                    end = time.monotonic() + pause
                    while time.monotonic() < end:
                        setup.cancel.check()
                        time.sleep(0.001)
    for group in groups:
        for part in group.maps[0].parts:
            part.kv.length = part.stop


def test_pages_come_back_in_the_next_passes(tmp_path: Path) -> None:
    async def passes() -> None:
        async with streaming(tmp_path) as setup:
            kvs = setup.sequences(4)
            for tokens in (100, 28, 1, 200, 1, 63):
                await run_pass(setup, setup.groups(kvs, tokens))
            read = sum(before // PAGE_TOKENS for before in (100, 128, 129, 329, 330))
            nbytes = 4 * LAYERS * setup.pool.layouts[0].block_nbytes
            assert setup.spill.bytes_read == read * nbytes
        # Every complete page has been written once, and whole.
        assert setup.spill.bytes_written == 393 // PAGE_TOKENS * nbytes

    run(passes())


def test_a_group_may_hold_several_sequences(tmp_path: Path) -> None:
    async def passes() -> None:
        async with streaming(tmp_path) as setup:
            kvs = setup.sequences(4)
            for tokens in (130, 1, 70):
                parts = [Part(kv, kv.length, tokens) for kv in kvs]
                await run_pass(setup, [LentBlocks(setup.pool, pair) for pair in (parts[:2], parts[2:])])

    run(passes())


def test_the_next_group_is_read_before_this_one_is_stored(tmp_path: Path) -> None:
    async def passes() -> None:
        async with streaming(tmp_path) as setup:
            kvs = setup.sequences(3)
            await run_pass(setup, setup.groups(kvs, 200))
            seen = threading.Event()
            groups = setup.groups(kvs, 1)
            (second,) = groups[1].map_of(0).reads(0)
            setup.reads.on_call = lambda offset: seen.set() if offset == second.offset else None

            def first() -> None:
                with setup.stream.serving(groups), setup.stream.lend(groups[0], 0):
                    assert seen.wait(SECONDS)

            await asyncio.to_thread(first)

    run(passes())


def test_a_layer_is_read_only_when_its_earlier_writes_have_ended(tmp_path: Path) -> None:
    async def passes() -> None:
        async with streaming(tmp_path) as setup:
            kvs = setup.sequences(2)
            go, read = threading.Event(), threading.Event()
            setup.writes.on_call = lambda offset: None if go.wait(SECONDS) else fail(errno.EIO)
            first = asyncio.create_task(run_pass(setup, setup.groups(kvs, 128)))
            await first
            setup.reads.on_call = lambda offset: read.set()
            second = asyncio.create_task(run_pass(setup, setup.groups(kvs, 1)))
            await asyncio.sleep(0.05)
            assert not read.is_set()
            go.set()
            await second

    run(passes())


def test_layers_without_pages_read_those_of_another_when_they_are_written(tmp_path: Path) -> None:
    async def passes() -> None:
        async with streaming(tmp_path, sources=(0, 1, 0, 1)) as setup:
            kvs, is_read_early = setup.sequences(4), threading.Event()
            writing: list[int] = []

            def write(offset: int) -> None:
                writing.append(offset)
                # The others' writes begin while the first one's is waited for, and end later.
                is_read_early.wait(0.1 if len(writing) == 1 else 0.5)
                writing[writing.index(offset)] = -1

            setup.writes.on_call = write
            setup.reads.on_call = lambda offset: is_read_early.set() if offset in writing else None
            await run_pass(setup, setup.groups(kvs, 64), pause=0.02)
            assert not is_read_early.is_set() and len(writing) == 4 * 2
            setup.writes.on_call = lambda offset: None
            for tokens in (70, 1):
                await run_pass(setup, setup.groups(kvs, tokens))
            assert setup.spill.bytes_written == 4 * 2 * 2 * setup.pool.layouts[0].block_nbytes

    run(passes())


def test_writes_that_an_interrupted_pass_waited_for_are_waited_for_by_the_next(tmp_path: Path) -> None:
    async def passes() -> None:
        async with streaming(tmp_path) as setup:
            kvs = setup.sequences(2)
            go, read = threading.Event(), threading.Event()
            setup.writes.on_call = lambda offset: None if go.wait(SECONDS) else fail(errno.EIO)
            await run_pass(setup, setup.groups(kvs, 128))
            asyncio.get_running_loop().call_later(0.05, setup.cancel.set)
            with pytest.raises(InterruptedRun):
                await run_pass(setup, setup.groups(kvs, 1))
            setup.cancel.clear()
            setup.reads.on_call = lambda offset: read.set()
            following = asyncio.create_task(run_pass(setup, setup.groups(kvs, 1)))
            await asyncio.sleep(0.05)
            assert not read.is_set()
            go.set()
            await following

    run(passes())


def fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


def test_a_failed_read_surfaces_in_the_same_pass(tmp_path: Path) -> None:
    async def passes() -> None:
        async with streaming(tmp_path) as setup:
            kvs = setup.sequences(3)
            await run_pass(setup, setup.groups(kvs, 200))
            setup.reads.on_call = lambda offset: fail(errno.EIO)
            with pytest.raises(ReadError, match="Input/output error"):
                await run_pass(setup, setup.groups(kvs, 1))
            setup.reads.on_call = lambda offset: None
            await run_pass(setup, setup.groups(kvs, 1))

    run(passes())


def test_a_disk_that_fills_up_surfaces_in_the_next_pass_at_the_latest(tmp_path: Path) -> None:
    async def passes() -> None:
        async with streaming(tmp_path) as setup:
            kvs = setup.sequences(3)
            setup.writes.on_call = lambda offset: fail(errno.ENOSPC)
            with pytest.raises(DiskFullError, match="no space for"):
                await run_pass(setup, setup.groups(kvs, 100))
                await run_pass(setup, setup.groups(kvs, 1))
        assert not any(thread.name.startswith("tiered-spill") for thread in threading.enumerate())

    run(passes())


def test_writes_that_fail_when_nothing_follows_hold_nothing_up(tmp_path: Path) -> None:
    async def passes() -> None:
        async with streaming(tmp_path) as setup:
            setup.writes.on_call = lambda offset: fail(errno.ENOSPC)
            # Twice the ring: its memory must come back although nothing is written.
            await run_pass(setup, setup.groups(setup.sequences(4), CONTEXT))

    run(passes())


@pytest.mark.parametrize("stop_at", [(0, 0), (0, 2), (1, 0), (2, 3)])
def test_a_pass_that_ends_in_the_middle_leaves_the_stream_usable(tmp_path: Path, stop_at: tuple[int, int]) -> None:
    async def passes() -> None:
        async with streaming(tmp_path) as setup:
            kvs = setup.sequences(4)
            await run_pass(setup, setup.groups(kvs, 300))
            await run_pass(setup, setup.groups(kvs, 1), stop_at)
            for tokens in (1, 100, 1):
                await run_pass(setup, setup.groups(kvs, tokens))

    run(passes())


@pytest.mark.parametrize("moment", ["waiting", "computing"])
def test_a_cancelled_pass_leaves_the_stream_usable(tmp_path: Path, moment: str) -> None:
    async def passes() -> None:
        async with streaming(tmp_path) as setup:
            kvs = setup.sequences(4)
            await run_pass(setup, setup.groups(kvs, 300))
            go = threading.Event()
            if moment == "waiting":
                setup.reads.on_call = lambda offset: None if go.wait(SECONDS) else fail(errno.EIO)
            work = asyncio.create_task(run_pass(setup, setup.groups(kvs, 1), pause=60 if moment == "computing" else 0))
            await asyncio.sleep(0.05)
            setup.cancel.set()
            go.set()
            with pytest.raises(InterruptedRun):
                await work
            setup.cancel.clear()
            await run_pass(setup, setup.groups(kvs, 1))

    run(passes())


def test_leaving_waits_for_what_is_being_written(tmp_path: Path) -> None:
    async def passes() -> None:
        go = threading.Event()
        async with streaming(tmp_path) as setup:
            setup.writes.on_call = lambda offset: None if go.wait(SECONDS) else fail(errno.EIO)
            await run_pass(setup, setup.groups(setup.sequences(2), 64))
            assert setup.spill.bytes_written == 0
            asyncio.get_running_loop().call_later(0.05, go.set)
        assert setup.spill.bytes_written == 2 * LAYERS * setup.pool.layouts[0].block_nbytes

    run(passes())


def test_no_more_is_read_ahead_than_the_ring_holds(tmp_path: Path) -> None:
    async def passes() -> None:
        async with streaming(tmp_path, sequences=8) as setup:
            kvs = setup.sequences(8)
            await run_pass(setup, setup.groups(kvs, 500))
            before, groups = setup.spill.bytes_read, setup.groups(kvs, 1)
            one = 500 // PAGE_TOKENS * setup.pool.layouts[0].block_nbytes

            def first() -> None:
                with setup.stream.serving(groups):
                    with setup.stream.lend(groups[0], 0):
                        while setup.spill.bytes_read - before < setup.ring.nbytes // one * one:
                            time.sleep(0.001)
                        time.sleep(0.05)
                        assert setup.spill.bytes_read - before == setup.ring.nbytes // one * one < 8 * one
                    with setup.stream.lend(groups[1], 0):
                        pass

            await asyncio.to_thread(first)

    run(passes())


@pytest.mark.parametrize("lent_pages", [10, 13, 20])
def test_groups_of_all_sizes_fit_the_ring_whatever_came_before(tmp_path: Path, lent_pages: int) -> None:
    async def passes() -> None:
        async with streaming(tmp_path, lent_pages=lent_pages) as setup:
            kvs = setup.sequences(4)
            for tokens in ((500, 1, 130, 64), (1, 1, 1, 1), (130, 500, 1, 1), (1, 64, 300, 500), (1, 1, 1, 1)):
                groups = [LentBlocks(setup.pool, [Part(kv, kv.length, n)]) for kv, n in zip(kvs, tokens, strict=True)]
                await run_pass(setup, groups, pause=0.001)

    run(passes())


def test_groups_that_need_no_memory_pass_at_once(tmp_path: Path) -> None:
    async def passes() -> None:
        async with streaming(tmp_path) as setup:
            kvs = setup.sequences(4)
            for tokens in (10, 1, 1):
                await run_pass(setup, setup.groups(kvs, tokens))
            assert setup.spill.bytes_read == setup.spill.bytes_written == 0

    run(passes())


def test_time_waited_for_pages_is_counted(tmp_path: Path) -> None:
    async def passes() -> None:
        async with streaming(tmp_path) as setup:
            kvs = setup.sequences(1)
            await run_pass(setup, setup.groups(kvs, 100))
            before = setup.stream.wait_seconds
            setup.reads.on_call = lambda offset: time.sleep(0.1)
            # A pass that comes late to a read waits for less of it.
            while setup.stream.wait_seconds < before + 0.04:
                await run_pass(setup, setup.groups(kvs, 1))

    run(passes())
