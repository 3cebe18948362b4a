"""The generation loop: passes over all running sequences until every one has ended.

    while anything runs or waits:
        newcomers enter while there is room          as many as `width` and the KV cache allow
        segments = a token of each that decodes, and prompts: together `pass_tokens` tokens at most
        one pass; each sequence that got logits takes a token
        sequences that ended leave

Prompts share passes with decoding. One that does not fit a pass goes on in the next; while others decode, prompts
take no more of a pass than keeps it near the disk's time.

Whatever goes wrong because of one sequence ends that sequence, which says so, and leaves like any that has ended; what
concerns all of them, a pass above all, is raised.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch

from tiered.cache import SequenceKV
from tiered.errors import BudgetError, ConfigError, contained
from tiered.generate.sequence import Sequence
from tiered.model import Load, OnBlock, OnLogits, Pass, Segment, check_token_ids

_RECENT_PASSES: Final = 256
"""Of a generation, kept one by one: a job may have millions."""


class PassRunner(Protocol):
    """What generation needs of a runtime."""

    @property
    def load(self) -> Load: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def bytes_read(self) -> int: ...

    @property
    def kv_bytes_read(self) -> int: ...

    @property
    def kv_bytes_written(self) -> int: ...

    @property
    def disk_idle_seconds(self) -> float: ...

    def reserve(self, tokens: int) -> SequenceKV | None: ...

    def release(self, kv: SequenceKV) -> None: ...

    def run(
        self, segments: Items[Segment], on_logits: OnLogits, on_block: OnBlock | None = None, is_last: bool = False
    ) -> Pass: ...


@dataclass(frozen=True)
class PassCost:
    """One pass of a generation: what it did and what it took."""

    pass_: Pass
    seconds: float
    """With what comes between it and the next: results handed over, newcomers."""
    prompt_tokens: int
    new_tokens: int
    """Tokens sampled."""
    bytes_read: int
    """Of weights."""
    kv_bytes: int
    """Read and written, of a KV cache on disk."""
    disk_idle_seconds: float

    @property
    def is_decode(self) -> bool:
        """Whether no prompt was in it."""
        return self.prompt_tokens == 0


@dataclass
class PassTotals:
    """Sums over passes: what a job of any length costs, in the memory of one pass."""

    passes: int = 0
    seconds: float = 0.0
    """With what comes between passes."""
    pass_seconds: float = 0.0
    """Without it."""
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    new_tokens: int = 0
    bytes_read: int = 0
    """Of weights."""
    kv_bytes: int = 0
    disk_idle_seconds: float = 0.0

    def add(self, cost: PassCost) -> None:
        """Count one more pass."""
        self.passes += 1
        self.seconds += cost.seconds
        self.pass_seconds += cost.pass_.seconds
        self.compute_seconds += cost.pass_.compute_seconds
        self.wait_seconds += cost.pass_.wait_seconds
        self.new_tokens += cost.new_tokens
        self.bytes_read += cost.bytes_read
        self.kv_bytes += cost.kv_bytes
        self.disk_idle_seconds += cost.disk_idle_seconds


@dataclass
class Generation:
    """What a generation cost."""

    prefill: PassTotals = field(default_factory=PassTotals)
    """Of the passes with prompts; other sequences may have decoded in them."""
    decode: PassTotals = field(default_factory=PassTotals)
    """Of the passes without."""
    recent: deque[PassCost] = field(default_factory=lambda: deque(maxlen=_RECENT_PASSES))
    """The last passes, for figures that sums cannot give."""
    first_token_seconds: float = 0.0
    sequences: int = 0
    """That have begun."""
    prompt_tokens: int = 0
    """Of all prompts that have begun."""

    def add(self, cost: PassCost) -> None:
        """Count one more pass."""
        (self.decode if cost.is_decode else self.prefill).add(cost)
        self.recent.append(cost)

    @property
    def passes(self) -> int:
        return self.prefill.passes + self.decode.passes

    @property
    def generated_tokens(self) -> int:
        return self.prefill.new_tokens + self.decode.new_tokens


@dataclass(eq=False)
class _Running:
    """A sequence that has its place in the cache."""

    sequence: Sequence
    kv: SequenceKV

    @property
    def waiting_tokens(self) -> list[int]:
        """Tokens of its text that the cache does not hold yet: one when it decodes, more before."""
        done = self.kv.length - len(self.sequence.prompt_ids)
        if done >= 0:
            return self.sequence.token_ids[done:]
        return self.sequence.prompt_ids[self.kv.length :]

    @property
    def is_decoding(self) -> bool:
        return self.kv.length >= len(self.sequence.prompt_ids)


def generate(
    runner: PassRunner,
    sequences: Iterable[Sequence],
    width: int,
    on_pass: Callable[[], None] = lambda: None,
    on_finished: Callable[[Sequence], None] = lambda sequence: None,
    on_block: OnBlock | None = None,
) -> Generation:
    """Run `sequences` to their ends on `runner`, at most `width` at once.

    They are taken from the iterable as there is room for them. `on_pass` is called after every pass, when each
    sequence that got logits has one token more; `on_finished` once for every sequence that has ended, after it.
    One that cannot be computed ends with an error, at the latest with the pass that shows it.

    Raises BudgetError for a sequence that not even an empty cache has room for, and whatever the source, a pass or
    a callback raises.
    """
    waiting = _Waiting(runner, iter(sequences), on_finished)
    running: list[_Running] = []
    result = Generation()
    begin = time.perf_counter()
    try:
        while True:
            start, before = time.perf_counter(), _Counters.of(runner)
            waiting.admit(running, width)
            if not running:
                return result
            pass_, prompt_tokens, new_tokens = _run(runner, running, waiting, on_block)
            if new_tokens and not result.generated_tokens:
                result.first_token_seconds = time.perf_counter() - begin
            on_pass()
            ended = [item for item in running if item.sequence.finish_reason is not None]
            running = [item for item in running if item.sequence.finish_reason is None]
            for item in ended:
                runner.release(item.kv)
            for item in ended:
                on_finished(item.sequence)
            result.sequences, result.prompt_tokens = waiting.admitted, waiting.prompt_tokens
            after = _Counters.of(runner)
            result.add(
                PassCost(
                    pass_,
                    time.perf_counter() - start,
                    prompt_tokens,
                    new_tokens,
                    after.weights - before.weights,
                    after.kv - before.kv,
                    after.disk_idle_seconds - before.disk_idle_seconds,
                )
            )
    finally:
        for item in running:
            runner.release(item.kv)


@dataclass(frozen=True)
class _Counters:
    """What a runtime has read and written so far."""

    weights: int
    kv: int
    disk_idle_seconds: float

    @classmethod
    def of(cls, runner: PassRunner) -> "_Counters":
        return cls(runner.bytes_read, runner.kv_bytes_read + runner.kv_bytes_written, runner.disk_idle_seconds)


class _Waiting:
    """Sequences that have not begun."""

    def __init__(self, runner: PassRunner, source: Iterator[Sequence], on_finished: Callable[[Sequence], None]) -> None:
        self._runner, self._source, self._on_finished = runner, source, on_finished
        self._next: Sequence | None = None
        self.admitted = 0
        self.prompt_tokens = 0
        self._is_exhausted = False

    def admit(self, running: list[_Running], width: int) -> None:
        """Add to `running` what the cache has room for, up to `width` in all."""
        while len(running) < width and (sequence := self._peek()) is not None:
            # The last token is sampled, but never passes through the model.
            tokens = max(1, len(sequence.prompt_ids) + sequence.max_new_tokens - 1)
            try:
                check_token_ids(torch.tensor([sequence.prompt_ids]), self._runner.vocab_size)
                kv = self._runner.reserve(tokens)
            except ConfigError as error:
                self._next = None
                sequence.fail(error)
                self._on_finished(sequence)
                continue
            if kv is None:
                if not running:
                    raise BudgetError(
                        f"KV cache: no room for a sequence of {tokens} tokens although nothing else runs; "
                        "plan for a longer context"
                    )
                return
            self._next = None
            self.admitted += 1
            self.prompt_tokens += len(sequence.prompt_ids)
            running.append(_Running(sequence, kv))

    def is_empty(self) -> bool:
        """Whether none waits; takes one more from the source to find out."""
        return self._peek() is None

    def _peek(self) -> Sequence | None:
        if self._next is None and not self._is_exhausted:
            self._next = next(self._source, None)
            self._is_exhausted = self._next is None
        return self._next


def _run(
    runner: PassRunner, running: Items[_Running], waiting: _Waiting, on_block: OnBlock | None
) -> tuple[Pass, int, int]:
    """One pass; returns it with the prompt tokens in it and the tokens sampled."""
    segments, members = plan_pass(running, runner.load.tokens)
    sampled: deque[int] = deque()

    def on_logits(number: int, index: int, logits: torch.Tensor) -> None:
        with contained(members[number].sequence.fail):
            members[number].sequence.advance(logits[-1])
            sampled.append(number)

    # Nothing is read ahead for another pass if this is sure to be the last one.
    left = max(item.sequence.max_new_tokens - len(item.sequence.token_ids) for item in running)
    all_sample = len(members) == len(running) and all(segment.keep for segment in segments)
    is_last = left == 1 and all_sample and waiting.is_empty()
    pass_ = runner.run(segments, on_logits, on_block, is_last)
    prompts = [len(s.input_ids) for s, item in zip(segments, members, strict=True) if _was_prompt(s, item)]
    return pass_, sum(prompts), len(sampled)


def _was_prompt(segment: Segment, item: _Running) -> bool:
    """After the pass: whether the segment's tokens were of the prompt."""
    return item.kv.length <= len(item.sequence.prompt_ids)


def plan_pass(running: Items[_Running], most_tokens: int) -> tuple[list[Segment], list[_Running]]:
    """What the next pass computes: every decoding sequence's token, then prompts in order, up to `most_tokens`."""
    segments: list[Segment] = []
    members: list[_Running] = []
    room = most_tokens
    for item in sorted(running, key=lambda item: not item.is_decoding):
        tokens = item.waiting_tokens
        piece = tokens if item.is_decoding else tokens[: max(room, 0)]
        if not piece:
            continue
        room -= len(piece)
        text_length = 0 if item.is_decoding else len(item.sequence.prompt_ids)
        segments.append(Segment(item.kv, piece, int(len(piece) == len(tokens)), text_length))
        members.append(item)
    return segments, members
