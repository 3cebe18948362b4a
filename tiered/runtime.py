"""The runtime of one open store: plan, memory, threads, streamer and engine, owned by one context manager.

Threads: a loop thread that schedules and never computes, one compute thread, a pool of readers. The caller's thread
only waits, with a timeout, so that signals reach it.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

import torch
from transformers import PretrainedConfig

from tiered.arch import build_skeleton, load_config
from tiered.cache import KVCache, kv_shape
from tiered.errors import ConfigError
from tiered.io import Arena, ChunkVerifier, DiskReader, Faults, ReadMode, Slab, VerifyPolicy, probe_mode
from tiered.kernels import CancelFlag
from tiered.model import (
    BoundModel,
    Engine,
    Footprint,
    Load,
    MicroBatch,
    OnBlock,
    Pass,
    Recorder,
    activation_shape,
)
from tiered.plan import (
    Plan,
    Tier,
    available_budget,
    cpu_count,
    pin_malloc,
    process_peak_rss_bytes,
    process_rss_bytes,
)
from tiered.store import CHUNK_NBYTES, PAGE, Store
from tiered.stream import EmbeddingRows, Streamer
from tiered.trace import Tracer
from tiered.units import MIB

READ_THREADS: Final = 8
"""Reads in flight."""
_GROWTH_NBYTES: Final = 24 * MIB
"""What the process itself grows by while running: code pages touched for the first time, thread stacks."""
_POLL_SECONDS: Final = 0.1

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How to run; every field has a sensible default."""

    ram: int | None = None
    """Budget in bytes for the whole process; None: 90 % of what there is."""
    tiers: tuple[Tier, ...] = (Tier.DISK, Tier.CPU)
    dtype: str = "auto"
    threads: int | None = None
    verify: VerifyPolicy = VerifyPolicy.FIRST
    prefetch: int | None = None
    rows_per_chunk: int | None = None
    """Overrides the planned chunk, for tests and experiments."""
    keep_spans: bool = False
    read_mode: ReadMode | None = None
    preadv: Faults | None = None


def compute_dtype(name: str, config: PretrainedConfig) -> torch.dtype:
    """The dtype activations are computed in: "auto" is float32 for a float32 checkpoint, else bfloat16."""
    if name == "auto":
        return torch.float32 if config.dtype in (None, torch.float32) else torch.bfloat16
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in known:
        raise ConfigError(f"dtype {name!r}: expected auto, bfloat16 or float32")
    return known[name]


class Runtime:
    """Runs passes over one store. A context manager; leaving it ends every thread and returns all memory.

    Entering builds the graph, makes the plan (BudgetError if none fits) and reads nothing but headers; the first
    pass starts the streaming.
    """

    def __init__(self, store: Store, load: Load, options: Options) -> None:
        self.store, self.load, self.options = store, load, options
        self.trace = Tracer(options.keep_spans)
        self.cancel = CancelFlag()
        self.passes = 0
        self._resources = contextlib.ExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streamer: Streamer | None = None
        self._stop: asyncio.Event | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._build(stack)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.cancel.set()
        self._resources.close()

    def _build(self, stack: contextlib.ExitStack) -> None:
        pin_malloc()
        # Completions of reads wait for the interpreter lock; the default of 5 ms is longer than a read.
        interval = sys.getswitchinterval()
        sys.setswitchinterval(5e-4)
        stack.callback(sys.setswitchinterval, interval)
        config = load_config(self.store.path)
        self.dtype = compute_dtype(self.options.dtype, config)
        skeleton = build_skeleton(config, self.dtype)
        shape = activation_shape(skeleton, self.dtype)
        self.model = BoundModel(skeleton, self.dtype, self.cancel)
        recorder = Recorder(skeleton)
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="tiered-compute")
        stack.callback(self._compute.shutdown, wait=True)
        threads = self.options.threads or cpu_count()
        self._compute.submit(_warm_up, threads, self.dtype).result()
        self.kv_shape = kv_shape(config, self.dtype)
        self.budget = self.options.ram or available_budget()
        self.baseline = max(process_rss_bytes(), process_peak_rss_bytes()) + _GROWTH_NBYTES
        self.footprint = footprint = Footprint(self.store, self.dtype, shape, self.kv_shape, self.load, self.baseline)
        self.workspace = footprint.workspace(self.budget)
        self.plan = footprint.plan(self.budget, self.options.tiers)
        self._open_memory(stack, self.plan, footprint.side_nbytes)
        verifier = ChunkVerifier(self.options.verify, self.trace)
        preadv = {"preadv": self.options.preadv} if self.options.preadv is not None else {}
        self.reader = stack.enter_context(
            DiskReader(self.store.path, verifier, self.trace, READ_THREADS, self.options.read_mode, **preadv)
        )
        self._embedding = EmbeddingRows(self.store, self.reader, verifier, self._staging)
        self.engine = Engine(
            self.model,
            recorder,
            self._embedding,
            self._compute,
            self.cancel,
            self.trace,
            self.rows_per_micro_batch,
        )
        stack.callback(self.stop_streaming)

    def _open_memory(self, stack: contextlib.ExitStack, plan: Plan, side: int) -> None:
        """One arena for everything large, and the slabs that live as long as the runtime."""
        placement = plan.placement
        total = placement.nbytes + CHUNK_NBYTES + side + plan.needs.kv + PAGE * (len(self.store.tape) + 8)
        self.arena = stack.enter_context(Arena(total))
        self._staging = self._keep(stack, CHUNK_NBYTES, "staging")
        self._side = self._keep(stack, side, "embedding scales") if side else None
        self._ring = self._keep(stack, placement.ring_nbytes, "ring") if placement.ring_nbytes else None
        self._resident = {
            position: self._keep(stack, plan.tape_sizes[position], "resident")
            for position in sorted(placement.resident)
        }

    def _keep(self, stack: contextlib.ExitStack, nbytes: int, label: str) -> Slab:
        slab = self.arena.borrow(nbytes, label)
        stack.callback(self.arena.release, slab)
        return slab

    # What callers use.

    def scratch_memory(self) -> memoryview:
        """Memory of the plan that is unused while nothing streams: for measuring the disk within the budget."""
        assert self._streamer is None
        slabs = [self._staging, *([self._ring] if self._ring is not None else []), *self._resident.values()]
        return max(slabs, key=lambda slab: slab.nbytes).view

    @contextlib.contextmanager
    def new_cache(self, sequences: int, capacity: int) -> Iterator[KVCache]:
        """A KV cache in the arena, for as long as the context lasts."""
        slab = self.arena.borrow(self.kv_shape.nbytes(sequences, capacity), "kv")
        try:
            yield KVCache(self.kv_shape, sequences, capacity, slab.tensor())
        finally:
            self.arena.release(slab)

    def forward(self, batch: Sequence[MicroBatch], on_block: OnBlock | None = None, is_last: bool = False) -> Pass:
        """One pass. `is_last` promises that none follows, so that nothing is read ahead for one.

        KeyboardInterrupt ends the pass within a panel of a linear layer; the runtime can be used again after it.
        """
        self.start_streaming()
        assert self._loop is not None and self._streamer is not None
        self.passes += 1
        end = self.passes - self._passes_before if is_last else None
        self._loop.call_soon_threadsafe(self._streamer.end_after, end)
        pass_ = self.engine.run_pass(list(batch), self._streamer, len(self.store.tape), on_block)
        try:
            return self._wait(asyncio.run_coroutine_threadsafe(pass_, self._loop))
        except BaseException as error:
            self.cancel.set()
            # The compute thread is done with the interrupted block before the flag is lowered again.
            self._compute.submit(lambda: None).result()
            self.cancel.clear()
            if isinstance(error, Exception):
                # Which block of the tape comes next is only known after an interruption; a failure starts over.
                self.stop_streaming()
            raise

    def compute(self, work: Callable[[], T]) -> T:
        """Run `work` (sampling) in the compute thread, where torch's threads are."""
        return self._wait(self._compute.submit(work))

    @property
    def rows_per_micro_batch(self) -> int:
        """Sequences that are computed together at most."""
        return self.options.rows_per_chunk or self.workspace.rows

    def probe_read_mode(self) -> ReadMode:
        """How the store's files will be read, found out by reading a page of one."""
        return self.options.read_mode or probe_mode(self.store.file_path(self.store.tape[0])).mode

    def start_streaming(self) -> None:
        """Start the loop thread and the reading; done by the first pass if not before."""
        if self._streamer is not None:
            return
        self._passes_before = self.passes
        self.engine.rewind()
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run_loop, args=(started,), name="tiered-loop", daemon=True)
        self._thread.start()
        self._wait(started)

    def stop_streaming(self) -> None:
        """End all reading ahead and wait for reads in flight. The next pass would start from the beginning."""
        if self._streamer is None or self._loop is None or self._stop is None:
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._streamer = self._loop = self._stop = None

    @property
    def bytes_read(self) -> int:
        """Bytes the reader's system calls have delivered."""
        return self.reader.bytes_read

    @property
    def disk_idle_seconds(self) -> float:
        """Seconds in which no read was queued or running."""
        return self.reader.idle_seconds

    @property
    def wait_seconds(self) -> float:
        """Seconds the computation has waited for blocks."""
        return self._streamer.wait_seconds if self._streamer is not None else 0.0

    def _wait(self, future: Future[T]) -> T:
        """The result of `future`, waited for in slices, because a signal is only seen between them."""
        try:
            while True:
                try:
                    return future.result(timeout=_POLL_SECONDS)
                except concurrent.futures.TimeoutError:
                    if future.done():
                        return future.result()
        except BaseException:
            future.cancel()
            raise

    def _run_loop(self, started: Future[None]) -> None:
        try:
            asyncio.run(self._serve(started))
        except BaseException as error:
            if started.done():
                logger.exception("the scheduler ended with an error")
            else:
                started.set_exception(error)

    async def _serve(self, started: Future[None]) -> None:
        """The loop thread's one long-lived task: owns the streamer."""
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        streamer = Streamer(
            self.store,
            self.plan.placement,
            self.reader,
            self._resident,
            self._ring,
            self.trace,
            self.options.prefetch,
        )
        await self._load_tables()
        async with streamer:
            self._streamer = streamer
            started.set_result(None)
            await self._stop.wait()
        if not self.cancel.is_set:
            await self._finish_reads()

    async def _finish_reads(self) -> None:
        """Wait for reads that were running when they were cancelled: their memory is about to be used again."""
        # All threads of the pool meet here, so each of them has ended what it did before.
        meeting = threading.Barrier(READ_THREADS)

        def meet() -> None:
            meeting.wait()

        await asyncio.gather(*(self.reader.call(meet) for _ in range(READ_THREADS)))

    async def _load_tables(self) -> None:
        """Read what stays in memory apart from blocks: outer tensors, embedding scales and zeros."""
        await self._embedding.load_side(self._side)
        block = self.store.blocks.get("outer")
        if block is None:
            return
        layout = self.store.layout(block)
        # Not from the arena: the tensors outlive the reading only in the compute dtype, and the rest goes back.
        memory = _aligned(layout.memory_nbytes)
        view = memoryview(memory.numpy())  # type: ignore[arg-type]  # numpy's stubs lack the buffer protocol here
        for chunk in range(-(-block.file.nbytes // CHUNK_NBYTES)):
            await self.reader.read_chunk(block.file, chunk, view)
        for item in layout.compressed:
            item.decode(view)
        tensors = {name: weight.view(memory) for name, weight in layout.weights.items()}
        self.model.set_outer({name: tensor.clone() for name, tensor in tensors.items()})  # type: ignore[union-attr]


def _aligned(nbytes: int) -> torch.Tensor:
    """uint8 memory that starts on a page."""
    raw = torch.empty(nbytes + PAGE, dtype=torch.uint8)
    start = -raw.data_ptr() % PAGE
    return raw[start : start + nbytes]


def _warm_up(threads: int, dtype: torch.dtype) -> None:
    """Touch what every run touches (thread pool, linear algebra, attention), so that the baseline includes it."""
    torch.set_num_threads(threads)
    x = torch.ones(1, 2, 8, 64, dtype=dtype)
    torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    for rows in (1, 8):
        torch.nn.functional.linear(torch.ones(rows, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype))
    torch.nn.functional.layer_norm(x, (64,))


def open_runtime(path: Path | str, load: Load, options: Options) -> Runtime:
    """The runtime of the store at `path`, not yet entered."""
    return Runtime(Store.open(path), load, options)
