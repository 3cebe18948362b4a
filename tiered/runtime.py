"""The runtime of one open store: plan, memory, threads, streamer and engine, owned by one context manager.

Threads: a loop thread that schedules and never computes, one compute thread, a pool of readers. The caller's thread
only waits, with a timeout, so that signals reach it.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self, TypeVar

import torch

from tiered.arch import build_skeleton, load_config
from tiered.cache import KVPool, SequenceKV
from tiered.errors import ConfigError
from tiered.io import (
    Arena,
    ChunkVerifier,
    DiskReader,
    IdleClock,
    ReadMode,
    Slab,
    SpillFile,
    probe_mode,
)
from tiered.kernels import CancelFlag, Kernels, scratch_nbytes
from tiered.model import (
    BoundModel,
    ChunkLimits,
    Engine,
    MicroBatch,
    MicroBatches,
    OnBlock,
    OnLogits,
    Pass,
    Recorder,
    Segment,
    Segments,
    Work,
    check_layers,
    check_match,
    check_token_ids,
    model_shape,
    registered_attention,
    use_attention,
)
from tiered.options import Options, compute_dtype
from tiered.plan import (
    Budgets,
    Machine,
    ModelShape,
    Rate,
    Workload,
    available_budget,
    cpu_count,
    make_plan,
    process_peak_rss_bytes,
    process_rss_bytes,
    rates_wanted,
)
from tiered.plan.process import PROCESS, Member
from tiered.store import CHUNK_NBYTES, PAGE, BlockInfo, Store
from tiered.stream import EmbeddingRows, KVStream, Streamer, Streams, StreamThread
from tiered.trace import Tracer
from tiered.units import MIB

__all__ = ["READ_THREADS", "Options", "Runtime", "compute_dtype", "measure_inputs"]

READ_THREADS: Final = 16
"""Reads of weights in flight."""
SPILL_THREADS: Final = 8
"""Transfers of a KV cache on disk in flight, beside those of weights."""
_GROWTH_NBYTES: Final = 16 * MIB
"""What the process itself grows by while running: code pages touched for the first time, thread stacks."""
_ANOTHER_NBYTES: Final = 96 * MIB
"""What one more runtime in a process takes by itself, at least: graph, kernels, threads. Measured each time, it varied
by 60 MB with what the allocator had kept, and the budget that one refusal named met another."""
_POLL_SECONDS: Final = 0.1

T = TypeVar("T")
MeasureMachine = Callable[[Store, Kernels, ModelShape, Machine, Collection[Rate]], Machine]
"""The machine with the rates that are wanted: a runtime that is to choose its batch size is given one."""
_LOG: Final = logging.getLogger(__name__)


class Runtime:
    """Runs passes over one store. A context manager; leaving it ends every thread and returns all memory.

    Entering builds the graph, makes the plan (BudgetError if none fits) and reads nothing but headers; the first
    pass starts the streaming.

    Any thread may ask for a pass: they wait for each other. Leaving ends the pass that another thread waits for.
    """

    def __init__(
        self, store: Store, workload: Workload, options: Options, measure: MeasureMachine | None = None
    ) -> None:
        """`measure` is called where rates are wanted for the choice of a batch size."""
        self.store, self.workload, self.options = store, workload, options
        self._measure = measure
        self.trace = Tracer(options.keep_spans)
        self.cancel = CancelFlag()
        self.passes = 0
        self.is_open = False
        self._resources = contextlib.ExitStack()
        self._clock = IdleClock()
        self._stream_thread: StreamThread | None = None
        self._streams: Streams | None = None
        self._member: Member | None = None
        self._calls = threading.RLock()
        """Held by the thread whose turn it is, for as long as its call takes, whatever passes that makes."""
        self._passing = threading.Lock()
        """Held while a pass runs, and while the runtime opens or closes."""

    def __enter__(self) -> Self:
        self._check_not_forked()
        with self._passing:
            if self.is_open:
                raise ConfigError("the model is open already: one 'with' at a time; threads may share what it gives")
            self.cancel.clear()
            with PROCESS.opening, contextlib.ExitStack() as stack:
                self._build(stack)
                self._resources = stack.pop_all()
            self.is_open = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._member is not None and self._member.is_forked:
            return  # its threads are the parent's, which nobody here could wait for
        self.is_open = False
        self.cancel.set()
        with self._passing:
            self._resources.close()
            self._member = None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One call of one thread: others wait until it ends, its own passes and calls within it go through.

        What was set aside is for one call at a time. Raises ConfigError where the model is closed, or closes while
        this waits, and in a forked child.
        """
        # Before the lock as well: a child would wait for a thread that only its parent has.
        self._check_open()
        with self._calls:
            self._check_open()
            yield

    def _check_open(self) -> None:
        self._check_not_forked()
        if not self.is_open:
            raise ConfigError("the model is closed: use it inside 'with tiered.load(...) as loaded:'")

    def _check_not_forked(self) -> None:
        if self._member is not None and self._member.is_forked:
            raise ConfigError(
                "the model was opened before this process was forked, and its threads did not come along: call "
                "tiered.load in the child itself"
            )

    def _build(self, stack: contextlib.ExitStack) -> None:
        before = process_rss_bytes()
        member = stack.enter_context(PROCESS.member())
        model, machine = self._prepare(stack)
        budgets = self._budgets(member, before)
        if self._measure is not None and (wanted := rates_wanted(model, machine, self.workload, budgets)):
            machine = self._measure(self.store, self.kernels, model, machine, wanted)
            # The process has grown by what measured, and its peak counts.
            budgets = self._budgets(member, before)
        self.plan = make_plan(model, machine, self.workload, budgets)
        member.planned_nbytes = self.plan.nbytes
        self._open_memory(stack)
        verifier = ChunkVerifier(self.options.verify, self.trace, self.store.path)
        preadv = {"preadv": self.options.preadv} if self.options.preadv is not None else {}
        self.reader = stack.enter_context(
            DiskReader(
                self.store.path, verifier, self.trace, READ_THREADS, self.options.read_mode, clock=self._clock, **preadv
            )
        )
        self._embedding = EmbeddingRows(self.store, self.reader, verifier, self._staging)
        self.engine = Engine(self.model, self._recorder, self._embedding, self.cancel, self.trace)
        self._limits = ChunkLimits(
            rows=self.plan.micro_batch_rows,
            gathered=model.dense_attention,
            gathered_rows=self.plan.gathered_rows,
            within_pages=self.plan.cache.bits != 16,
            lent_pages=self.plan.cache.lent_pages,
        )
        stack.callback(self.stop_streaming)
        self._member = member

    def _prepare(self, stack: contextlib.ExitStack) -> tuple[ModelShape, Machine]:
        """Build what computes, before any weight is in memory, and tell what plans need to know of it."""
        config = load_config(self.store.path)
        self.dtype = compute_dtype(self.options.dtype, config)
        check_layers(self.store, config)
        skeleton = build_skeleton(config, self.dtype)
        check_match(self.store, skeleton)
        threads = self.options.threads or cpu_count()
        shape = model_shape(self.store, skeleton, self.dtype)
        self.kernels = stack.enter_context(self._open_kernels(threads))
        self._attention = stack.enter_context(registered_attention(self.kernels))
        use_attention(skeleton.model, self._attention.name)
        self.model = BoundModel(skeleton, self.dtype, self.kernels)
        self._recorder = Recorder(skeleton)
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="tiered-compute")
        stack.callback(self._compute.shutdown, wait=True)
        self._compute.submit(_warm_up, threads, self.dtype).result()
        return shape, Machine(scratch_nbytes(threads))

    def _budgets(self, member: Member, before: int) -> Budgets:
        """What may be used, and what of it the process takes by itself, which had `before` bytes before `_prepare`."""
        options = self.options
        member.budget = member.budget or options.ram or available_budget()
        PROCESS.pin_malloc()
        rss = process_rss_bytes()
        # Models that are open already may not have taken yet what they planned to.
        promised = PROCESS.planned_nbytes + max(rss - before, _ANOTHER_NBYTES)
        baseline = max(rss, process_peak_rss_bytes(), promised) + _GROWTH_NBYTES
        return Budgets(member.budget, baseline, options.tiers, options.kv, options.kv_bits, options.rows_per_chunk)

    def _open_kernels(self, threads: int) -> Kernels:
        kernels = Kernels(threads, self.cancel, self.options.kernel_mode, self.options.kernels)
        if kernels.refusal is not None and self.options.kernels == "auto":
            why = kernels.refusal
            _LOG.warning("native kernels are off, torch's slower operators compute: %s; see 'tiered doctor'", why)
        return kernels

    def _open_memory(self, stack: contextlib.ExitStack) -> None:
        """One arena for everything large, and the slabs that live as long as the runtime."""
        plan, side = self.plan, self.plan.side_nbytes
        placement, cache = plan.placement, plan.cache
        total = placement.nbytes + CHUNK_NBYTES + side + plan.needs.kv + PAGE * (len(self.store.tape) + 8)
        self.arena = stack.enter_context(Arena(total))
        self.pool = KVPool(cache, self._keep(stack, cache.pool_nbytes, "kv").tensor())
        self._kv_ring = self._keep(stack, cache.ring_nbytes, "kv ring") if cache.on_disk else None
        self.spill = self._open_spill(stack)
        self._staging = self._keep(stack, CHUNK_NBYTES, "staging")
        self._side = self._keep(stack, side, "embedding scales") if side else None
        self._ring = self._keep(stack, placement.ring_nbytes, "ring") if placement.ring_nbytes else None
        self._resident = {
            position: self._keep(stack, plan.tape_sizes[position], "resident")
            for position in sorted(placement.resident)
        }

    def _open_spill(self, stack: contextlib.ExitStack) -> SpillFile | None:
        """The KV cache's file, where it is on disk."""
        if not self.plan.cache.on_disk:
            return None
        folder = self.options.kv_folder or self.store.path
        return stack.enter_context(
            SpillFile(folder, self.plan.cache.records_nbytes, SPILL_THREADS, self.trace, clock=self._clock)
        )

    def _keep(self, stack: contextlib.ExitStack, nbytes: int, label: str) -> Slab:
        slab = self.arena.borrow(nbytes, label)
        stack.callback(self.arena.release, slab)
        return slab

    # What callers use.

    def scratch_memory(self) -> memoryview:
        """Memory of the plan that is unused while nothing streams: for measuring the disk within the budget."""
        assert self._streams is None
        slabs = [self._staging, *([self._ring] if self._ring is not None else []), *self._resident.values()]
        return max(slabs, key=lambda slab: slab.nbytes).view

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self.store.vocab_size

    def reserve(self, tokens: int) -> SequenceKV | None:
        """Room in the KV cache for a sequence of `tokens` tokens; None while others hold it."""
        return self.pool.reserve(tokens)

    def release(self, kv: SequenceKV) -> None:
        """Give a sequence's room back."""
        self.pool.release(kv)

    def run(
        self, segments: Sequence[Segment], on_logits: OnLogits, on_block: OnBlock | None = None, is_last: bool = False
    ) -> Pass:
        """One pass over tokens of many sequences; see `forward` for the rest."""
        for segment in segments:
            check_token_ids(torch.tensor([segment.input_ids]), self.store.vocab_size)
        work = Segments(segments, self.pool, self._limits, self.plan.head_rows, self._attention.packing, on_logits)
        return self._run(work, on_block, is_last)

    def forward(self, batch: Sequence[MicroBatch], on_block: OnBlock | None = None, is_last: bool = False) -> Pass:
        """One pass. `is_last` promises that none follows, so that nothing is read ahead for one.

        KeyboardInterrupt ends the pass within a panel of a linear layer; the runtime can be used again after it.
        """
        for micro_batch in batch:
            check_token_ids(micro_batch.input_ids, self.store.vocab_size)
        return self._run(MicroBatches(batch, self.plan.micro_batch_rows, len(self.model.layers)), on_block, is_last)

    def _run(self, work: Work, on_block: OnBlock | None, is_last: bool) -> Pass:
        """One pass of whoever's turn it is; ConfigError if the model is closed meanwhile."""
        with self.turn(), self._passing:
            self._check_open()
            try:
                return self._run_alone(work, on_block, is_last)
            except Exception as error:
                if self.is_open:
                    raise
                raise ConfigError("the model was closed while this ran: let calls end before 'with' does") from error

    def _run_alone(self, work: Work, on_block: OnBlock | None, is_last: bool) -> Pass:
        streams = self.start_streaming()
        self.passes += 1
        running = self._compute.submit(self.engine.run_pass, work, streams, on_block, is_last)
        try:
            return self._wait(running)
        except BaseException as error:
            self.cancel.set()
            # The flag is lowered again only when the compute thread has nothing left to do.
            concurrent.futures.wait([running])
            self.cancel.clear()
            if isinstance(error, Exception):
                self.stop_streaming()
            else:
                streams.rewind()
            raise

    def compute(self, work: Callable[[], T]) -> T:
        """Run `work` (sampling) in the compute thread, where torch's threads are."""
        return self._wait(self._compute.submit(work))

    @property
    def streamed_blocks(self) -> list[BlockInfo]:
        """The blocks of the tape that are not resident."""
        resident = self.plan.placement.resident
        return [block for position, block in enumerate(self.store.tape) if position not in resident]

    def probe_read_mode(self) -> ReadMode:
        """How the store's files will be read, found out by reading a page of one."""
        return self.options.read_mode or probe_mode(self.store.file_path(self.store.tape[0])).mode

    def start_streaming(self) -> Streams:
        """Start the loop thread and the reading; done by the first pass if not before."""
        if self._streams is not None:
            return self._streams
        self._stream_thread = StreamThread(self._load_tables, self._make_streams)
        try:
            self._streams = self._wait(self._stream_thread.ready)
        except BaseException:
            self.stop_streaming()
            raise
        return self._streams

    def stop_streaming(self) -> None:
        """End all reading ahead and wait for reads in flight. The next pass would start from the beginning."""
        thread, self._stream_thread, self._streams = self._stream_thread, None, None
        if thread is not None:
            thread.stop()

    @property
    def bytes_read(self) -> int:
        """Bytes the reader's system calls have delivered."""
        return self.reader.bytes_read

    @property
    def kv_bytes_read(self) -> int:
        """Bytes of the KV cache read from disk."""
        return self.spill.bytes_read if self.spill is not None else 0

    @property
    def kv_bytes_written(self) -> int:
        """Bytes of the KV cache written to disk."""
        return self.spill.bytes_written if self.spill is not None else 0

    @property
    def disk_idle_seconds(self) -> float:
        """Seconds in which neither weights nor the KV cache kept the disk busy."""
        return self._clock.seconds

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

    def _make_streams(self) -> Streams:
        blocks = Streamer(
            self.store,
            self.plan.placement,
            self.reader,
            self._resident,
            self._ring,
            self.trace,
            self.cancel,
            self.options.prefetch,
        )
        kv = None
        if self.spill is not None and self._kv_ring is not None:
            kv = KVStream(self.spill, self._kv_ring, self.plan.cache.shape.layers, self.trace, self.cancel)
        return Streams(asyncio.get_running_loop(), blocks, kv)

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


def measure_inputs(store: Store, options: Options) -> tuple[ModelShape, Machine, Budgets]:
    """What plans for `store` are made from, by this process as it is now.

    Builds what a runtime builds first, measures, and lets it go: neither memory is taken nor weights are read.
    """
    runtime = Runtime(store, Workload(), options)
    with PROCESS.opening, PROCESS.member() as member, contextlib.ExitStack() as stack:
        before = process_rss_bytes()
        model, machine = runtime._prepare(stack)
        return model, machine, runtime._budgets(member, before)
