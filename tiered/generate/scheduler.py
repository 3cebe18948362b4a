"""The scheduler: which sequences run, and which of their tokens each pass computes.

    add(item) -> ticket        it runs as soon as there is room: at most `batch_size` at once, and room in the cache for
                               all its tokens, so that nothing that has begun is ever thrown out
    cancel(ticket)
    step() -> events           one pass; an event for every item that got logits or ended

A pass takes one token of each sequence that decodes, and prompts: `plan.max_batched_tokens` in all at most. A prompt
that does not fit a pass goes on in the next. Where latency counts and sequences decode, prompts take no more than
`plan/pace.py` allows.

An error that one item causes ends that item alone, with an event. An error that concerns all items, such as a failed
pass, is raised.
"""

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import torch

from tiered.cache import SequenceKV
from tiered.errors import BudgetError, ConfigError, TieredError, contained
from tiered.generate.costs import Generation, PassCost
from tiered.model import OnBlock, OnLogits, Pass, Segment, check_token_ids
from tiered.plan import Plan
from tiered.plan.pace import Pace
from tiered.plan.passes import share_pass


class PassRunner(Protocol):
    """What the scheduler needs of a runtime."""

    @property
    def plan(self) -> Plan: ...

    @property
    def pace(self) -> Pace: ...

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

    @property
    def bus_nbytes(self) -> int: ...

    @property
    def bus_seconds(self) -> float: ...

    @property
    def stalled_seconds(self) -> float: ...

    def reserve(self, tokens: int) -> SequenceKV | None: ...

    def release(self, kv: SequenceKV) -> None: ...

    def run(
        self, segments: Items[Segment], on_logits: OnLogits, on_block: OnBlock | None = None, is_last: bool = False
    ) -> Pass: ...

    @property
    def may_rest(self) -> bool: ...

    def rest_device(self) -> None: ...


class Scheduled(Protocol):
    """What can be scheduled: a sequence that is generated, or one that is scored."""

    @property
    def prompt_ids(self) -> list[int]: ...

    @property
    def token_ids(self) -> list[int]:
        """The tokens generated so far."""

    @property
    def max_new_tokens(self) -> int:
        """How many may be generated, at least 1: the last one never passes through the model."""

    @property
    def kept(self) -> int:
        """How many of the prompt's last positions need logits."""

    @property
    def finish_reason(self) -> str | None:
        """None while it runs."""

    @property
    def error(self) -> TieredError | None: ...

    def take(self, index: int, logits: torch.Tensor) -> None:
        """Take logits [rows, vocab] of the kept positions from number `index` on; later, [1, vocab] of each new token.

        Called in the compute thread. An error that it raises fails this item alone.
        """

    def fail(self, error: TieredError) -> None:
        """End here because of `error`."""


T = TypeVar("T", bound=Scheduled)


@dataclass(eq=False)
class Ticket(Generic[T]):
    """One item's place: waiting for room, or running."""

    item: T
    kv: SequenceKV | None = None
    """Its room in the KV cache while it runs, else None."""

    @property
    def is_decoding(self) -> bool:
        """Whether its whole prompt has been computed."""
        return self.kv is not None and self.kv.length >= len(self.item.prompt_ids)

    def waiting_tokens(self) -> list[int]:
        """Its tokens that the cache does not hold yet: one when it decodes, before that the rest of its prompt."""
        assert self.kv is not None
        done = self.kv.length - len(self.item.prompt_ids)
        return self.item.token_ids[done:] if done >= 0 else self.item.prompt_ids[self.kv.length :]


class EventKind(Enum):
    """What happened to an item in a step."""

    TOKEN = "token"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class Event(Generic[T]):
    """What a step did for one item; FINISHED or FAILED is an item's last event."""

    kind: EventKind
    ticket: Ticket[T]

    @property
    def error(self) -> TieredError | None:
        """Why it failed; None if it did not."""
        return self.ticket.item.error


class Scheduler(Generic[T]):
    """Runs items on `runner`; used by one thread. A context manager: leaving it releases all room in the cache.

    `may_grow` is called before a pass that may be the last one; it tells whether items will be added after that pass.
    """

    def __init__(
        self,
        runner: PassRunner,
        batch_size: int,
        may_grow: Callable[[], bool] = lambda: True,
    ) -> None:
        self._runner, self._batch_size, self._may_grow = runner, batch_size, may_grow
        self._waiting: deque[Ticket[T]] = deque()
        self._running: list[Ticket[T]] = []
        self._ended: list[Event[T]] = []
        """Events since the last step, of items that were refused."""
        self.costs = Generation()
        self._began = self._last = time.perf_counter()
        self._counted = _Counters.of(runner)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._drop_all()

    @property
    def has_room(self) -> bool:
        """Whether an added item may run in the next pass: fewer than `batch_size` run, none waits, no event is due."""
        return not (self._waiting or self._ended) and len(self._running) < self._batch_size

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return not (self._running or self._waiting or self._ended)

    def add(self, item: T) -> Ticket[T]:
        """Queue `item`. If it can never run, the next step tells so."""
        ticket = Ticket(item)
        self._waiting.append(ticket)
        self._admit()
        return ticket

    def cancel(self, ticket: Ticket[T]) -> None:
        """Give the item up, whether it waits, runs or has ended; it gets no more events."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        elif ticket in self._running:
            self._running.remove(ticket)
            self._release(ticket)
        self._ended = [event for event in self._ended if event.ticket is not ticket]

    def step(self, on_block: OnBlock | None = None) -> list[Event[T]]:
        """Run one pass; returns its events.

        If items have been refused since the last step, or nothing runs, there is no pass: only those items have events.

        Raises what a pass raises. A failed pass drops all items, running and waiting, without events: what it left in
        the cache cannot be relied on.
        """
        self._admit()
        events, self._ended = self._ended, []
        if events or not self._running:
            return events
        segments, members = self._plan_pass()
        firsts = [_first_kept(ticket) for ticket in members]
        sampled: list[Ticket[T]] = []

        def on_logits(number: int, index: int, logits: torch.Tensor) -> None:
            item = members[number].item
            if item.error is not None:
                return
            with contained(item.fail):
                item.take(firsts[number] + index, logits)
                sampled.append(members[number])

        decoding = sum(ticket.is_decoding for ticket in members)
        prompt_tokens = sum(len(s.input_ids) for s, t in zip(segments, members, strict=True) if not t.is_decoding)
        try:
            if not prompt_tokens and self._runner.may_rest and not self._has_prompts():
                self._runner.rest_device()
            pass_ = self._runner.run(segments, on_logits, on_block, self._is_last(segments, members))
        except BaseException:
            self._drop_all()
            raise
        got = dict.fromkeys(sampled)
        self._count(pass_, decoding, prompt_tokens, len(got))
        events += [Event(EventKind.TOKEN, ticket) for ticket in got if ticket.item.finish_reason is None]
        for ticket in [t for t in self._running if t.item.finish_reason is not None]:
            self._running.remove(ticket)
            self._release(ticket)
            events.append(_ended(ticket))
        self._admit()
        return events

    def _admit(self) -> None:
        """Start waiting items, in order, while there is room."""
        while self._waiting and len(self._running) < self._batch_size:
            ticket = self._waiting[0]
            ids = ticket.item.prompt_ids
            tokens = max(1, len(ids) + ticket.item.max_new_tokens - 1)
            try:
                check_token_ids(torch.tensor([ids]), self._runner.vocab_size)
                ticket.kv = self._runner.reserve(tokens)
                if ticket.kv is None and not self._running:
                    raise BudgetError(
                        f"KV cache: no room for a sequence of {tokens} tokens although nothing else runs; "
                        "plan for a longer context"
                    )
            except (BudgetError, ConfigError) as error:
                ticket.item.fail(error)
                self._ended.append(_ended(self._waiting.popleft()))
                continue
            if ticket.kv is None:
                return
            self._running.append(self._waiting.popleft())
            self.costs.sequences += 1
            self.costs.prompt_tokens += len(ids)

    def _plan_pass(self) -> tuple[list[Segment], list[Ticket[T]]]:
        """The next pass: a token of every decoding sequence, then prompts in order, as segments with their tickets."""
        decoding = [ticket for ticket in self._running if ticket.is_decoding]
        prompts = [ticket for ticket in self._running if not ticket.is_decoding]
        left = [len(ticket.waiting_tokens()) for ticket in prompts]
        counts = share_pass(self._runner.plan, self._runner.pace, len(decoding), left)
        shares = dict(zip(prompts, counts, strict=True))
        members = decoding + [ticket for ticket in prompts if shares.get(ticket)]
        return [_segment(ticket, shares.get(ticket, 1)) for ticket in members], members

    def _has_prompts(self) -> bool:
        """Whether prompts are left, or may be added as soon as there is room for them."""
        if self._waiting or not all(ticket.is_decoding for ticket in self._running):
            return True
        return len(self._running) >= self._batch_size and self._may_grow()

    def _is_last(self, segments: Items[Segment], members: Items[Ticket[T]]) -> bool:
        """Whether this is certainly the last pass, so that nothing is read ahead for another one."""
        left = max(ticket.item.max_new_tokens - len(ticket.item.token_ids) for ticket in self._running)
        whole = [segment.stop >= len(t.item.prompt_ids) for segment, t in zip(segments, members, strict=True)]
        all_end = left == 1 and len(members) == len(self._running) and all(whole)
        return all_end and not self._waiting and not self._may_grow()

    def _count(self, pass_: Pass, decoding: int, prompt_tokens: int, new_tokens: int) -> None:
        """Add up what a pass has cost, including the time since the pass before."""
        now, counted, costs = time.perf_counter(), _Counters.of(self._runner), self.costs
        if new_tokens and not costs.generated_tokens:
            costs.first_token_seconds = now - self._began
        idle = counted.disk_idle_seconds - self._counted.disk_idle_seconds
        cost = PassCost(
            pass_,
            now - self._last,
            prompt_tokens,
            new_tokens,
            counted.weights - self._counted.weights,
            counted.kv - self._counted.kv,
            idle,
            counted.bus - self._counted.bus,
            counted.stalled_seconds - self._counted.stalled_seconds,
        )
        bus_seconds, reading = counted.bus_seconds - self._counted.bus_seconds, max(cost.seconds - idle, 0.0)
        pace = self._runner.pace
        pace.note(decoding, prompt_tokens, pass_.compute_seconds, reading, cost.bus_bytes, bus_seconds)
        costs.add(cost)
        self._last, self._counted = now, counted

    def _drop_all(self) -> None:
        for ticket in self._running:
            self._release(ticket)
        self._running, self._waiting, self._ended = [], deque(), []

    def _release(self, ticket: Ticket[T]) -> None:
        assert ticket.kv is not None
        self._runner.release(ticket.kv)
        ticket.kv = None


def _ended(ticket: Ticket[T]) -> Event[T]:
    return Event(EventKind.FINISHED if ticket.item.error is None else EventKind.FAILED, ticket)


def _first_kept(ticket: Ticket[T]) -> int:
    """Number of the first kept position in the item's next segment."""
    assert ticket.kv is not None
    return 0 if ticket.is_decoding else max(0, ticket.kv.length - len(ticket.item.prompt_ids) + ticket.item.kept)


def _segment(ticket: Ticket[T], count: int) -> Segment:
    """The next `count` tokens of an item, with logits where it needs them."""
    assert ticket.kv is not None
    tokens = ticket.waiting_tokens()[:count]
    if ticket.is_decoding:
        return Segment(ticket.kv, tokens, 1)
    length = len(ticket.item.prompt_ids)
    left = length - ticket.kv.length - len(tokens)
    return Segment(ticket.kv, tokens, max(0, min(len(tokens), ticket.item.kept - left)), length)


@dataclass(frozen=True)
class _Counters:
    """What a runtime has counted so far: bytes of weights read, bytes of KV cache moved, seconds of an idle disk, bytes
    of weights copied to a device, seconds in which they were, seconds in which that stood still for copies."""

    weights: int
    kv: int
    disk_idle_seconds: float
    bus: int
    bus_seconds: float
    stalled_seconds: float

    @classmethod
    def of(cls, runner: PassRunner) -> "_Counters":
        kv = runner.kv_bytes_read + runner.kv_bytes_written
        bus = runner.bus_nbytes, runner.bus_seconds
        return cls(runner.bytes_read, kv, runner.disk_idle_seconds, *bus, runner.stalled_seconds)
