"""One pass over the tape: while a block is lent, all micro-batches of the work compute with its weights.

    rows of tables for all tokens -> record every micro-batch
    for each layer: for each seat: for each micro-batch: hidden = layer(hidden), in which each linear layer waits for
        its weight
    head: replay -> logits

Within a block, one text may pass in several micro-batches, one behind the other: each finds the keys of the earlier
ones in the cache. So a long prompt costs one pass, and activations stay small. With several micro-batches a block's
weights stay until the last one has used them; with one, each goes back as soon as it has been computed with.

A pass has one seat or two (`seat.py`): what a device is given it computes later, while the processor does its own part
of the same layer. Each seat has a loan of its own.

All of it is a plain loop in the compute thread. Reading goes on in the event loop's thread meanwhile (`stream/`).
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tiered.cache import Outbox
from tiered.kernels import CancelFlag
from tiered.model.seat import Seat, Seats
from tiered.model.waiting import WaitingRoom
from tiered.model.work import Embedded, Group, MicroBatch, Work
from tiered.stream import NO_EXPERTS, EmbeddingRows, ExpertUse, KVStream, Streamer, Streams, run_in
from tiered.trace import Tracer

OnBlock = Callable[[int, int], None]
"""Called after each block, in the compute thread, with (blocks done, blocks in a pass)."""


@dataclass(frozen=True)
class Pass:
    """The result of one traversal of the tape, and what it cost."""

    logits: tuple[torch.Tensor, ...]
    """Per `ForwardBatch`, [rows, kept, vocab]; empty where a callback got the logits."""
    seconds: float
    compute_seconds: float
    wait_seconds: float
    """Seconds in which the computation waited for units, or for KV blocks on disk."""
    block_seconds: tuple[float, ...]
    """Seconds of each block beyond waiting and computing: lending weights and bookkeeping."""
    experts: ExpertUse = NO_EXPERTS
    """Of experts that are read when they are chosen."""
    waiting_nbytes: int = 0
    """Bytes of hidden states that came back to a device, having waited in the host's memory."""


@dataclass
class _Clock:
    """What a pass has cost so far."""

    lenders: Sequence[Streamer | KVStream]
    """Those that computing may wait for."""
    trace: Tracer
    compute_seconds: float = 0.0
    block_seconds: list[float] = field(default_factory=list)
    computing_since: float | None = None
    """When computing began, or went on after a wait; None: something else is being done."""
    name: str = ""
    """What is being computed."""

    @property
    def waited(self) -> float:
        """Seconds waited since the streams were opened."""
        return sum(lender.wait_seconds for lender in self.lenders)

    @contextlib.contextmanager
    def computing(self, name: str) -> Iterator[None]:
        """Time the body, less waits for units in it, as computing `name`."""
        self.name, self.computing_since = name, time.perf_counter()
        try:
            yield
        finally:
            self._computed(time.perf_counter())
            self.computing_since = None

    def on_wait(self, start: float, seconds: float) -> None:
        """A wait ends one stretch of computing and begins another."""
        if self.computing_since is not None:
            self._computed(start)
            self.computing_since = start + seconds

    def _computed(self, stop: float) -> None:
        assert self.computing_since is not None
        self.compute_seconds += stop - self.computing_since
        self.trace.record("compute", self.name, self.computing_since, stop - self.computing_since)

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """Time the body as a block, in which all that is neither waiting nor computing is overhead."""
        start, busy = time.perf_counter(), self.waited + self.compute_seconds
        yield
        self.block_seconds.append(time.perf_counter() - start - (self.waited + self.compute_seconds - busy))


@dataclass(frozen=True, eq=False)
class _Turn:
    """What one seat does in a pass."""

    seat: Seat
    lender: Streamer
    groups: Sequence[Group]
    is_held: bool
    """Whether a layer's weights are used more than once: by several micro-batches, or by several scans of one."""


class Engine:
    """Runs passes over what streams lend, at the seats that the work has. For use in the compute thread."""

    def __init__(
        self,
        seats: Seats,
        embedding: EmbeddingRows,
        cancel: CancelFlag,
        trace: Tracer,
        outbox: Outbox | None = None,
        room: WaitingRoom | None = None,
    ) -> None:
        """`outbox`: that of the pool which the works' sequences are in. `room`: where a device's micro-batches wait;
        None: on it."""
        self.seats, self.embedding, self._outbox, self._room = seats, embedding, outbox, room
        self.passes = 0
        """Passes begun so far."""
        self._cancel, self._trace = cancel, trace

    @torch.no_grad()
    def run_pass(self, work: Work, streams: Streams, on_block: OnBlock | None = None, is_last: bool = False) -> Pass:
        """Compute `work` through all blocks; its caches grow. Raises what reading or computing raised.

        `is_last` promises that no other pass follows. After an error the streams must be rewound.
        """
        lenders = [_lender(seat, streams) for seat in work.seats]
        start, clock = time.perf_counter(), _Clock([*lenders, *filter(None, [streams.kv])], self._trace)
        waited, used = clock.waited, [lender.expert_use for lender in lenders]
        stalled = sum(lender.unseen_stalls for lender in lenders)
        returned = 0 if self._room is None else self._room.nbytes
        self.passes += 1
        for lender in lenders:
            lender.begin(is_last, clock.on_wait)
        try:
            groups = self._record(work, streams, clock)
            turns = [_turn(seat, lender, groups) for seat, lender in zip(work.seats, lenders, strict=True)]
            logits = self._run(work, turns, streams, clock, on_block)
        except BaseException:
            if self._outbox is not None:
                self._outbox.drop()
            if self._room is not None:
                self._room.drop()
            raise
        work.commit()
        seconds, waits = time.perf_counter() - start, clock.waited - waited
        # A device waits by itself: what took the host as long as computing was partly that.
        hidden = min(sum(lender.unseen_stalls for lender in lenders) - stalled, clock.compute_seconds)
        experts = sum((lender.expert_use - before for lender, before in zip(lenders, used, strict=True)), NO_EXPERTS)
        computed = clock.compute_seconds - hidden
        returned = 0 if self._room is None else self._room.nbytes - returned
        return Pass(logits, seconds, computed, waits + hidden, tuple(clock.block_seconds), experts, returned)

    def _record(self, work: Work, streams: Streams, clock: _Clock) -> list[Group]:
        """The micro-batches of `work`, ready for the first layer."""
        ids = work.ids
        fetched = run_in(streams.loop, self.embedding.fetch(dict.fromkeys(self.embedding.tables, ids)), self._cancel)
        with clock.computing("record"), contextlib.ExitStack() as stack:
            for seat in work.seats:
                stack.enter_context(seat.computing())
            return work.record(Embedded(fetched, self.seats.decode.model.dtype), self._room)

    def _run(
        self, work: Work, turns: Sequence[_Turn], streams: Streams, clock: _Clock, on_block: OnBlock | None
    ) -> tuple[torch.Tensor, ...]:
        """Compute `turns` through all blocks; returns logits as `Work.finish` does."""
        groups = [group for turn in turns for group in turn.groups]
        lent = [group.blocks for group in groups if group.blocks is not None]
        layers, total = len(work.head.model.layers), len(work.head.model.blocks)
        with streams.kv.serving(lent) if streams.kv is not None and lent else contextlib.nullcontext():
            for number in range(layers):
                with clock.block():
                    for turn in turns:
                        self._take(turn, number, streams, clock)
                    self._flush(clock)
                if on_block is not None:
                    on_block(number + 1, total)
            with clock.block():
                for turn in turns:
                    if turn.seat is work.head:
                        logits = self._finish(work, groups, turn, turns, clock)
                        continue
                    with turn.lender.lend(layers):
                        pass  # every block is lent, whoever computes with it
            if on_block is not None:
                on_block(total, total)
        return logits

    def _take(self, turn: _Turn, number: int, streams: Streams, clock: _Clock) -> None:
        """Compute a seat's micro-batches through layer `number`, or give them to its device."""
        model = turn.seat.model
        layer = model.layers[number]
        with turn.seat.computing(), turn.lender.lend(number, turn.is_held) as loan, model.lend(layer, loan):
            for group in turn.groups:
                if streams.kv is None or group.blocks is None:
                    with clock.computing(loan.block):
                        self._run_layer(number, layer, group.micro_batches)
                    continue
                with streams.kv.lend(group.blocks, number):
                    with clock.computing(loan.block):
                        self._run_layer(number, layer, group.micro_batches)
                    # The memory of its pages is only lent until here.
                    self._flush(clock)

    def _run_layer(self, number: int, layer: nn.Module, micro_batches: Sequence[MicroBatch]) -> None:
        """Compute `micro_batches` through layer `number`, which borrows its weights."""
        for micro_batch in micro_batches:
            self._cancel.check()
            call = micro_batch.calls[number]
            output = layer(micro_batch.take(), *call.args, **call.kwargs)
            micro_batch.put(output[0] if isinstance(output, tuple) else output)
            if micro_batch.kv is not None:
                micro_batch.kv.check(number)

    def _flush(self, clock: _Clock) -> None:
        """Have the cache store what a device has computed for it."""
        if self._outbox is not None and not self._outbox.is_empty:
            with clock.computing("kv"):
                self._outbox.flush()

    def _finish(
        self, work: Work, groups: Sequence[Group], turn: _Turn, turns: Sequence[_Turn], clock: _Clock
    ) -> tuple[torch.Tensor, ...]:
        """Compute the head at the seat of `turn`, of what all `turns` have computed."""
        model, layers = turn.seat.model, len(turn.seat.model.layers)
        with contextlib.ExitStack() as stack:
            # What another seat's device has computed is fetched behind it, in its own stream.
            for each in turns:
                stack.enter_context(each.seat.computing())
            if self._room is not None:
                with clock.computing("hidden"):
                    for micro_batch in (each for group in groups for each in group.micro_batches):
                        micro_batch.settle()
            loan = stack.enter_context(turn.lender.lend(layers, work.head_steps(groups) > 1))
            stack.enter_context(model.lend(model.head, loan))
            with clock.computing(loan.block):
                self._cancel.check()
                return work.finish(groups)


def _lender(seat: Seat, streams: Streams) -> Streamer:
    """Who lends the blocks that `seat` computes with."""
    if seat.device is None:
        return streams.blocks
    assert streams.device_blocks is not None, f"nothing lends blocks on {seat.device.name}"
    return streams.device_blocks


def _turn(seat: Seat, lender: Streamer, groups: Sequence[Group]) -> _Turn:
    mine = [group for group in groups if group.seat is seat]
    micro_batches = [micro_batch for group in mine for micro_batch in group.micro_batches]
    scans = max((len(each.kv.states) for each in micro_batches if each.kv is not None), default=0)
    return _Turn(seat, lender, mine, len(micro_batches) > 1 or scans > 1)
