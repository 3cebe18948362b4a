"""The runtime of one open store: its plan, memory, streams and engine, on a host. A context manager.

Threads: a loop thread that schedules reading and never computes, the host's compute thread, a pool of readers. The
caller's thread only waits, with a timeout, so that signals reach it.
"""

import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from tiered.cache import SequenceKV, Snapshot
from tiered.errors import ConfigError
from tiered.host import PROCESS, Host, Member
from tiered.io import Faults, ReadMode, probe_mode
from tiered.model import ForwardBatch, ForwardWork, OnBlock, OnLogits, Pass, Segment, Segments, Work, check_token_ids
from tiered.opening import (
    FindHardware,
    Parts,
    Wanted,
    device_memory,
    load_side_tables,
    make_streams,
    open_parts,
)
from tiered.options import Options, compute_dtype
from tiered.plan import Workload
from tiered.plan.passes import limits_of
from tiered.prepare import host_for
from tiered.process import Held, interrupts_later
from tiered.store import Store
from tiered.stream import Streams, StreamThread

__all__ = ["Options", "Runtime", "compute_dtype"]


class Runtime:
    """Runs passes over one store. A context manager; leaving it ends every thread and returns all memory.

    Entering builds the graph, makes the plan (BudgetError if none fits) and reads nothing but headers; the first
    pass starts the streaming.

    Any thread may ask for a pass: they wait for each other. Leaving ends the pass that another thread waits for.
    """

    _preadv: Faults = staticmethod(os.preadv)
    """The call that reads blocks; tests replace it by one with faults."""

    def __init__(
        self,
        store: Store,
        workload: Workload,
        options: Options,
        find_hardware: FindHardware | None = None,
        host: Host | None = None,
        has_pool: bool = True,
    ) -> None:
        """`find_hardware` is asked before the plan is made; without it, plans go by bytes. Without `host`, one is made.
        Without `has_pool` nothing is reserved: callers bring caches of their own, for which the plan counts memory.

        Raises ConfigError if `options` want another number of threads, or other kernels, than `host` has.
        """
        if host is not None:
            host.check(options.threads, options.kernels, options.kernel_mode, options.device_name, options.vram)
        self.store, self.workload, self.options = store, workload, options
        self.host = host or host_for(options)
        self._wanted = Wanted(store, workload, options, find_hardware, has_pool)
        self.is_open = False
        self._resources = contextlib.ExitStack()
        self._streaming: StreamThread | None = None
        self._copied, self._copy_seconds = 0, 0.0
        """Bytes that streams which have ended have copied to the device, and the seconds that took."""
        self._device_is_held = False
        """Whether streams have been opened, or a pass has computed on the device, since its memory was given back."""
        self.rested_nbytes: int | None = None
        """Bytes of the device's memory that were kept when it was last given back; None: it never was."""
        self._member: Member | None = None
        self._calls = threading.RLock()
        """Held by the thread whose turn it is, for its whole call with all passes of it."""
        self._passing = threading.Lock()
        """Held while a pass runs, and while the runtime opens or closes."""

    def __enter__(self) -> Self:
        self._check_not_forked()
        is_mine = False
        try:
            with self._passing:
                if self.is_open:
                    raise ConfigError(
                        "the model is open already: one 'with' at a time; threads may share what it gives"
                    )
                is_mine = True
                # What an interrupt finds between being made and being known to somebody, nobody would close.
                with PROCESS.opening, interrupts_later() as held, contextlib.ExitStack() as stack:
                    self._take(self._open(stack, held))
                    stack.callback(self.stop_streaming)
                    self._resources = stack.pop_all()
                    self.is_open = True
            return self
        except BaseException:
            # One that has waited comes when all is open, and leaves nobody who would leave the context.
            if is_mine:
                self.__exit__(None, None, None)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._member is not None and self._member.is_forked:
            return  # its threads are in the parent only, and waiting for them would never end
        with interrupts_later():  # what is closed halfway would never be closed
            self.is_open = False
            # The host may compute for others: only a pass of this runtime's own is ended.
            self.host.interrupt(self)
            with self._passing:
                self._resources.close()
                self._member = None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One call of one thread. Other threads wait until it ends; passes and calls that it makes itself do not wait.

        The planned memory is for one call at a time. Raises ConfigError if the model is closed, or closes while this
        waits, and in a forked child.
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

    def _open(self, stack: contextlib.ExitStack, held: Held) -> Parts:
        return open_parts(self._wanted, self.host, self._preadv, stack, held)

    def _take(self, parts: Parts) -> None:
        self._parts, self._member, self._memory = parts, parts.member, parts.memory
        self.options, self.dtype, self.reader, self.engine = parts.options, parts.dtype, parts.reader, parts.engine
        chosen = parts.chosen
        self.plan, self.pace, self.shape, self.machine = chosen.plan, chosen.pace, chosen.shape, chosen.machine
        self.gpu = chosen.gpu

    # What callers use.

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """For a caller's own operations on what a device has computed, in its turn: they come behind that."""
        return self.engine.seats.decode.computing()

    def scratch_memory(self) -> memoryview:
        """Memory of the plan that is unused while nothing streams: for measuring the disk within the budget."""
        assert self._streaming is None
        return self._memory.largest.view

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary: ids are below it."""
        return self.store.vocab_size

    def reserve(self, tokens: int) -> SequenceKV | None:
        """Room in the KV cache for a sequence of `tokens` tokens; None while other sequences hold too much."""
        return self._memory.pool.reserve(tokens)

    def release(self, kv: SequenceKV) -> None:
        """Give a sequence's room back."""
        self._memory.pool.release(kv)

    def snapshot(self, kv: SequenceKV) -> Snapshot:
        """The sequence as it is now, to come back to by `restore`: a recurrent state cannot be computed backwards."""
        pool, states = self._memory.pool, self._memory.pool.states
        with self.turn(), self.computing():
            on_disk: tuple[torch.Tensor, ...] = ()
            if states is not None and (stream := self.start_streaming().kv) is not None:
                on_disk = stream.read_states(states.extents(kv.tail))
            return Snapshot(kv.length, tuple(memory.clone() for memory in pool.overwritten(kv)), on_disk)

    def restore(self, kv: SequenceKV, snapshot: Snapshot) -> None:
        """Take back the tokens since `snapshot`, which was made of `kv`. Raises ConfigError where they are more than a
        micro-batch has: pages that the sequence would need may have been overwritten."""
        pool, states = self._memory.pool, self._memory.pool.states
        most = self.plan.cache.tokens_at_once
        if not 0 <= kv.length - snapshot.length <= most:
            raise ConfigError(
                f"restore: the sequence has {kv.length} tokens, the snapshot {snapshot.length}; expected as many, or "
                f"at most {most} more"
            )
        with self.turn(), self.computing():
            for memory, kept in zip(pool.overwritten(kv), snapshot.in_memory, strict=True):
                memory.copy_(kept)
            if states is not None and (stream := self.start_streaming().kv) is not None:
                stream.write_states(states.extents(kv.tail), snapshot.on_disk)
            kv.length = snapshot.length

    def run(
        self, segments: Sequence[Segment], on_logits: OnLogits, on_block: OnBlock | None = None, is_last: bool = False
    ) -> Pass:
        """One pass over tokens of many sequences; see `forward` for the rest.

        Raises ConfigError where they are more than `plan.max_batched_tokens`: weights would have to stay for several
        micro-batches, without a place.
        """
        tokens, most = sum(len(segment.input_ids) for segment in segments), self.plan.max_batched_tokens
        if tokens > most:
            raise ConfigError(f"a pass of {tokens} tokens, expected at most the {most} that are planned for: split it")
        for segment in segments:
            check_token_ids(torch.tensor([segment.input_ids]), self.store.vocab_size)
        seats = self.engine.seats
        limits = limits_of(self.plan, seats.decode.model.skeleton.family.gathers)
        work = Segments(segments, self._memory.pool, limits, self.plan.head_rows, seats, on_logits)
        return self._run(work, on_block, is_last)

    def forward(self, batch: Sequence[ForwardBatch], on_block: OnBlock | None = None, is_last: bool = False) -> Pass:
        """One pass over `batch`. `is_last` promises that none follows, so that nothing is read ahead for it.

        KeyboardInterrupt ends the pass within a panel of a linear layer; the runtime can be used again after it.
        """
        for item in batch:
            check_token_ids(item.input_ids, self.store.vocab_size)
        plan = self.plan
        work = ForwardWork(batch, plan.micro_batch_rows, plan.cache.layers, self.engine.seats, plan.grid)
        if self.may_rest and all(seat.device is None for seat in work.seats):
            self.rest_device()  # the next prompt is another call's
        return self._run(work, on_block, is_last)

    def _run(self, work: Work, on_block: OnBlock | None, is_last: bool) -> Pass:
        """One pass, in this thread's turn. Raises ConfigError if the model is closed meanwhile."""
        with self.turn(), self._passing:
            self._check_open()
            try:
                return self._run_alone(work, on_block, is_last)
            except Exception as error:
                if self.is_open:
                    raise
                raise ConfigError("the model was closed while this ran: let calls end before 'with' does") from error

    @property
    def may_rest(self) -> bool:
        """Whether `rest_device` would give anything back, as the device computes prompts only."""
        return self.plan.device is not None and self.plan.decode_device == "cpu" and self._device_is_held

    def rest_device(self) -> None:
        """Give back the memory that the device computes prompts with, until the next one comes. For callers who know
        that none waits: a pass does not."""
        with self.turn(), self._passing:
            self._check_open()
            if self.may_rest:
                self._rest_device()

    def _rest_device(self) -> None:
        computer = self.host.computer
        assert computer is not None

        def rest() -> None:
            with computer.device.computing():
                self._memory.rest()
            computer.kernels.close()
            computer.device.trim()

        with self.host.trace.span("bus", "memory of the device given back"):
            try:
                if self._streaming is not None:
                    self.start_streaming().rest_device()
                self.host.compute(rest)
            except Exception:
                self.stop_streaming()
                raise
        self._device_is_held, self.rested_nbytes = False, computer.device.held_nbytes

    def _run_alone(self, work: Work, on_block: OnBlock | None, is_last: bool) -> Pass:
        streams = self.start_streaming()
        assert self._member is not None
        self._member.has_run = True
        self._device_is_held |= any(seat.device is not None for seat in work.seats)
        try:
            return self.host.compute(functools.partial(self._pass, work, streams, on_block, is_last), owner=self)
        except Exception:
            self.stop_streaming()
            raise
        except BaseException:
            streams.rewind()
            raise

    def _pass(self, work: Work, streams: Streams, on_block: OnBlock | None, is_last: bool) -> Pass:
        """In the compute thread. Closing interrupts what has begun here; what has not begun yet does not begin."""
        self._check_open()
        with device_memory():
            return self.engine.run_pass(work, streams, on_block, is_last)

    @property
    def streamed_files(self) -> list[Path]:
        """The files that hold what later passes read: units of the tape that are not resident, and experts."""
        on_demand, resident = self.plan.experts is not None, self.plan.placement.resident | self.plan.on_device
        units = itertools.chain.from_iterable(self.store.units_of_pass(on_demand))
        streamed = [unit for number, unit in enumerate(units) if number not in resident]
        if on_demand:
            streamed += itertools.chain.from_iterable(self.store.expert_units)
        paths = dict.fromkeys(unit.file.path for unit in streamed)
        return [self.store.path / path for path in paths]

    def probe_read_mode(self) -> ReadMode:
        """How the store's files will be read, which is found out by a small read of one of them."""
        return self.options.read_mode or probe_mode(self.store.file_path(self.store.tape[0])).mode

    def start_streaming(self) -> Streams:
        """Start the loop thread and the reading; done by the first pass if not before."""
        try:
            if self._streaming is None:
                # A thread that nobody knows would read into memory that is released.
                with interrupts_later():
                    load = functools.partial(load_side_tables, self._parts, self.store)
                    self._streaming = StreamThread(load, self._make_streams)
                    self._device_is_held = True
            return self._streaming.ready.result()
        except BaseException:
            self.stop_streaming()
            raise

    def _make_streams(self) -> Streams:
        return make_streams(self._parts, self.store, self.host)

    def stop_streaming(self) -> None:
        """End all reading ahead and wait for reads in flight. The next pass would start from the beginning."""
        # A thread that is forgotten before it has ended would read into memory that is released.
        with interrupts_later():
            thread, self._streaming = self._streaming, None
            if thread is not None:
                thread.stop()
                if thread.ready.error is None:
                    ended = thread.ready.result()
                    self._copied += ended.bus_nbytes
                    self._copy_seconds += ended.bus_seconds

    @property
    def passes(self) -> int:
        """Passes begun so far."""
        return self.engine.passes

    @property
    def on_disk(self) -> bool:
        """Whether the KV cache is on disk."""
        return self._memory.spill is not None

    @property
    def bytes_read(self) -> int:
        """Bytes the reader's system calls have delivered."""
        return self.reader.bytes_read

    @property
    def bus_nbytes(self) -> int:
        """Bytes of weights copied to the device; 0 without one."""
        return self._copied + (0 if self._streaming is None else self.start_streaming().bus_nbytes)

    @property
    def bus_seconds(self) -> float:
        """Seconds in which they were."""
        return self._copy_seconds + (0.0 if self._streaming is None else self.start_streaming().bus_seconds)

    @property
    def stalled_seconds(self) -> float:
        """Seconds in which the device has stood still for copies."""
        return 0.0 if self.host.computer is None else self.host.computer.device.stalled_seconds

    @property
    def kv_bytes_read(self) -> int:
        """Bytes of the KV cache read from disk."""
        spill = self._memory.spill
        return spill.bytes_read if spill is not None else 0

    @property
    def kv_bytes_written(self) -> int:
        """Bytes of the KV cache written to disk."""
        spill = self._memory.spill
        return spill.bytes_written if spill is not None else 0

    @property
    def disk_idle_seconds(self) -> float:
        """Seconds in which neither weights nor the KV cache kept the disk busy."""
        return self.host.clock.seconds
