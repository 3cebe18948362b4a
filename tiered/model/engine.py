"""One pass over the tape: while a block is lent, all micro-batches of the work compute with its weights.

    embeddings of all tokens -> record every micro-batch
    for each layer: for each micro-batch: hidden = layer(hidden), in which each linear layer waits for its weight
    head: replay -> logits

Within a block, one text may pass in several micro-batches, one behind the other: each finds the keys of the earlier
ones in the cache. So a long prompt costs one pass, and activations stay small. With several micro-batches a block's
weights stay until the last one has used them; with one, each goes back as soon as it has been computed with.

All of it is a plain loop in the compute thread. Reading goes on in the event loop's thread meanwhile (`stream/`).
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tiered.kernels import CancelFlag
from tiered.model.bind import BoundModel
from tiered.model.record import Recorder
from tiered.model.work import Embedded, Group, MicroBatch, Work
from tiered.stream import NO_EXPERTS, EmbeddingRows, ExpertUse, Streams, run_in
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


@dataclass
class _Clock:
    """What a pass has cost so far."""

    streams: Streams
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
        streams = self.streams
        return streams.blocks.wait_seconds + (streams.kv.wait_seconds if streams.kv is not None else 0.0)

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


class Engine:
    """Runs passes of a bound model over what streams lend. For use in the compute thread."""

    def __init__(
        self, model: BoundModel, recorder: Recorder, embedding: EmbeddingRows, cancel: CancelFlag, trace: Tracer
    ) -> None:
        self.model, self.embedding, self._recorder = model, embedding, recorder
        self.passes = 0
        """Passes begun so far."""
        self._cancel, self._trace = cancel, trace

    @torch.no_grad()
    def run_pass(self, work: Work, streams: Streams, on_block: OnBlock | None = None, is_last: bool = False) -> Pass:
        """Compute `work` through all blocks; its caches grow. Raises what reading or computing raised.

        `is_last` promises that no other pass follows. After an error the streams must be rewound.
        """
        start, clock = time.perf_counter(), _Clock(streams, self._trace)
        waited, used = clock.waited, streams.blocks.expert_use
        self.passes += 1
        streams.blocks.begin(is_last, clock.on_wait)
        groups = self._record(work, streams, clock)
        lent = [group.blocks for group in groups if group.blocks is not None]
        layers, total = len(self.model.layers), len(self.model.layers) + 1
        is_held = sum(len(group.micro_batches) for group in groups) > 1
        with streams.kv.serving(lent) if streams.kv is not None and lent else contextlib.nullcontext():
            for number, layer in enumerate(self.model.layers):
                with clock.block(), streams.blocks.lend(number, is_held) as loan, self.model.lend(layer, loan):
                    for group in groups:
                        with self._pages(streams, group, number), clock.computing(loan.block):
                            self._run_layer(number, layer, group.micro_batches)
                if on_block is not None:
                    on_block(number + 1, total)
            with (
                clock.block(),
                streams.blocks.lend(layers, work.head_steps(groups) > 1) as loan,
                self.model.lend(self.model.head, loan),
                clock.computing(loan.block),
            ):
                self._cancel.check()
                logits = work.finish(self._recorder, groups)
            if on_block is not None:
                on_block(total, total)
        work.commit()
        seconds = time.perf_counter() - start
        waits, experts = clock.waited - waited, streams.blocks.expert_use - used
        return Pass(logits, seconds, clock.compute_seconds, waits, tuple(clock.block_seconds), experts)

    def _record(self, work: Work, streams: Streams, clock: _Clock) -> list[Group]:
        """The micro-batches of `work`, ready for the first layer."""
        ids = work.ids
        packed = run_in(streams.loop, self.embedding.fetch(ids), self._cancel)
        with clock.computing("record"):
            rows = self.embedding.widen(packed, ids, self.model.dtype)
            return work.record(self._recorder, Embedded(self.model, rows, ids))

    def _pages(self, streams: Streams, group: Group, layer: int) -> contextlib.AbstractContextManager[None]:
        """Borrow the KV blocks that `group` needs in `layer`, if they are on disk."""
        if streams.kv is None or group.blocks is None:
            return contextlib.nullcontext()
        return streams.kv.lend(group.blocks, layer)

    def _run_layer(self, number: int, layer: nn.Module, micro_batches: Sequence[MicroBatch]) -> None:
        """Compute `micro_batches` through layer `number`, which borrows its weights."""
        for micro_batch in micro_batches:
            self._cancel.check()
            call = micro_batch.calls[number]
            output = layer(micro_batch.hidden, *call.args, **call.kwargs)
            micro_batch.hidden = output[0] if isinstance(output, tuple) else output
            if micro_batch.kv is not None:
                micro_batch.kv.check(number)
