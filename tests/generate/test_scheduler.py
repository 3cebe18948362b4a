"""The scheduler pushed by hand: items come, go and fail on their own, and prompts do not hold up those that decode."""

from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.generate.test_loop import END, Numbers, Runner, completion, model, prompt_of, sequence_of
from tiered.errors import BudgetError
from tiered.generate import Event, EventKind, Sampler, SamplingParams, Scheduler, Sequence
from tiered.generate.score import cut_windows, log_probabilities, score
from tiered.model import OnBlock, OnLogits, Pass, Segment
from tiered.plan.inputs import Objective
from tiered.plan.pace import LEAST, SLACK, Pace


def kinds(events: list[Event[Sequence]]) -> list[tuple[EventKind, int]]:
    return [(event.kind, len(event.ticket.item.token_ids)) for event in events]


def test_a_step_is_a_pass_and_says_what_it_did_for_whom() -> None:
    with Scheduler[Sequence](runner := Runner(2), 2) as scheduler:
        first = scheduler.add(sequence_of(prompt_of(4), 2))
        second = scheduler.add(sequence_of(prompt_of(5), 3))
        events = scheduler.step()
        assert [event.ticket for event in events] == [first, second]
        assert kinds(events) == [(EventKind.TOKEN, 1), (EventKind.TOKEN, 1)]
        assert kinds(scheduler.step()) == [(EventKind.TOKEN, 2), (EventKind.FINISHED, 2)]
        assert kinds(scheduler.step()) == [(EventKind.FINISHED, 3)]
        assert scheduler.is_idle and scheduler.step() == []
    assert runner.passes == [[4, 5], [1, 1], [1]] and runner.pool.is_empty


def test_items_may_be_added_at_any_time() -> None:
    with Scheduler[Sequence](runner := Runner(2), 2) as scheduler:
        scheduler.add(sequence_of(prompt_of(4), 3))
        scheduler.step()
        assert scheduler.has_room
        late = scheduler.add(sequence_of(prompt_of(6), 1))
        waiting = scheduler.add(sequence_of(prompt_of(7), 1))
        assert not scheduler.has_room
        assert [event.ticket for event in scheduler.step()][1:] == [late]
        scheduler.step()
    assert runner.passes == [[4], [1, 6], [1, 7]]
    assert late.item.token_ids == completion(late.item)
    assert waiting.item.token_ids == completion(waiting.item)


@pytest.mark.parametrize("moment", ["waiting", "running", "decoding"])
def test_what_is_cancelled_leaves_without_an_event_and_the_others_go_on(moment: str) -> None:
    with Scheduler[Sequence](runner := Runner(2), 2) as scheduler:
        kept = scheduler.add(sequence_of(prompt_of(4), 3))
        other = None if moment != "waiting" else scheduler.add(sequence_of(prompt_of(5), 3))
        given_up = scheduler.add(sequence_of(prompt_of(9), 3))
        if moment == "decoding":
            scheduler.step()
        scheduler.cancel(given_up)
        events: list[Event[Sequence]] = []
        while not scheduler.is_idle:
            events += scheduler.step()
        assert given_up not in [event.ticket for event in events]
        assert kept.item.token_ids == completion(kept.item)
        assert other is None or other.item.token_ids == completion(other.item)
        assert len(given_up.item.token_ids) == (moment == "decoding")
        scheduler.cancel(given_up)  # once more does nothing
    assert runner.pool.is_empty


def test_what_is_refused_or_fails_is_an_event_of_its_own() -> None:
    with Scheduler[Sequence](runner := Runner(3), 3) as scheduler:
        bad = scheduler.add(sequence_of([-1]))
        good = scheduler.add(sequence_of(prompt_of(4), 1))
        (event,) = scheduler.step()
        assert (event.kind, event.ticket) == (EventKind.FAILED, bad) and "-1" in str(event.error)
        (event,) = scheduler.step()
        assert (event.kind, event.ticket, event.error) == (EventKind.FINISHED, good, None)
    assert runner.passes == [[4]]


def test_leaving_gives_back_what_runs() -> None:
    runner = Runner(2)
    with Scheduler[Sequence](runner, 1) as scheduler:
        scheduler.add(sequence_of(prompt_of(4), 9))
        scheduler.add(sequence_of(prompt_of(4), 9))
        scheduler.step()
        assert not runner.pool.is_empty
    assert runner.pool.is_empty


def test_an_item_that_no_empty_cache_holds_is_refused() -> None:
    with Scheduler[Sequence](Runner(1, context=256, kv_tokens=64), 1) as scheduler:
        ticket = scheduler.add(sequence_of(prompt_of(200), 3))
        (event,) = scheduler.step()
        assert (event.kind, event.ticket) == (EventKind.FAILED, ticket)
        assert isinstance(event.error, BudgetError) and "no room for a sequence of 202 tokens" in str(event.error)
        # The next one finds nothing in its way.
        after = scheduler.add(sequence_of(prompt_of(4), 1))
        assert [event.ticket for event in scheduler.step()] == [after]


class Machine(Runner):
    """A runner whose passes cost what a machine's would: computing grows with the rows, the disk takes its time."""

    disk, fixed, each = 0.5, 0.1, 0.001

    def __init__(self, objective: Objective = "latency") -> None:
        super().__init__(4, context=4000)
        self.plan, self.pace = replace(self.plan, objective=objective), Clocked()
        self.seconds: list[float] = []

    def run(
        self, segments: Items[Segment], on_logits: OnLogits, on_block: OnBlock | None = None, is_last: bool = False
    ) -> Pass:
        super().run(segments, on_logits, on_block, is_last)
        compute = self.fixed + self.each * sum(self.passes[-1])
        self.seconds.append(max(self.disk, compute))
        return Pass((), self.seconds[-1], compute, self.seconds[-1] - compute, ())


class Clocked(Pace):
    """A pace that is told the disk time of the simulated machine, which no clock here measures."""

    def note(self, decoding: int, prompt_tokens: int, compute_seconds: float, *told: Any, **named: Any) -> None:
        super().note(decoding, prompt_tokens, compute_seconds, Machine.disk)


class Copying(Runner):
    """A runner whose passes copy to a device: the first one more than later ones do."""

    def __init__(self) -> None:
        super().__init__(1)
        self.pace = self.told = Told()

    def run(
        self, segments: Items[Segment], on_logits: OnLogits, on_block: OnBlock | None = None, is_last: bool = False
    ) -> Pass:
        found = super().run(segments, on_logits, on_block, is_last)
        self.bus_nbytes, self.bus_seconds = self.bus_nbytes + 600 // len(self.passes), self.bus_seconds + 0.5
        return found


class Told(Pace):
    def __init__(self) -> None:
        super().__init__()
        self.copied: list[tuple[Any, ...]] = []

    def note(self, *told: Any, **named: Any) -> None:
        self.copied.append(told[4:])


def test_the_pace_is_told_what_each_pass_has_copied() -> None:
    runner = Copying()
    with Scheduler[Sequence](runner, 1) as scheduler:
        scheduler.add(sequence_of(prompt_of(4), 3))
        while not scheduler.is_idle:
            scheduler.step()
    assert runner.told.copied == [(600, 0.5), (300, 0.5), (200, 0.5)]


def enter(objective: Objective) -> tuple[Machine, Sequence, list[int]]:
    """Two sequences decode, then a prompt of 2,000 tokens enters; the passes until its first token."""
    machine = Machine(objective)
    with Scheduler[Sequence](machine, 3) as scheduler:
        for number in range(2):
            scheduler.add(sequence_of(prompt_of(30, number), 100, number))
        for _ in range(4):
            scheduler.step()
        before = len(machine.passes)
        long = Sequence(prompt_of(2000, 9), Sampler(SamplingParams(), 9), Numbers(), 2, END)
        scheduler.add(long)
        while not long.token_ids:
            scheduler.step()
        passes = [sum(tokens) for tokens in machine.passes[before:]]
    return machine, long, passes


def test_prompts_beside_decoding_stay_within_the_bound() -> None:
    machine, long, passes = enter("latency")
    assert sum(passes) == 2000 + 2 * len(passes) and len(passes) > 3
    assert max(machine.seconds[-len(passes) :]) <= SLACK * Machine.disk
    assert min(passes[:-1]) >= LEAST + 2
    assert long.token_ids == completion(long)[:1]


def test_where_throughput_counts_a_prompt_fills_the_pass() -> None:
    machine, _, passes = enter("throughput")
    assert passes == [2002]
    assert machine.seconds[-1] > 3 * Machine.disk


def test_with_nothing_decoding_prompts_fill_the_pass() -> None:
    with Scheduler[Sequence](machine := Machine(), 2) as scheduler:
        for number in range(2):
            scheduler.add(sequence_of(prompt_of(1500, number), 2, number))
        scheduler.step()
    assert machine.passes == [[1500, 1500]]


def test_short_prompts_need_not_wait_until_a_long_one_has_passed() -> None:
    with Scheduler[Sequence](machine := Machine(), 4) as scheduler:
        scheduler.add(sequence_of(prompt_of(10), 50))
        scheduler.step()
        long = scheduler.add(sequence_of(prompt_of(3000, 1), 2, 1))
        short = scheduler.add(sequence_of(prompt_of(20, 2), 2, 2))
        before = len(machine.passes)
        while not short.item.token_ids:
            scheduler.step()
        assert len(machine.passes) == before + 1 and not long.item.token_ids
        while not scheduler.is_idle:
            scheduler.step()
        for ticket, request in ((long, 1), (short, 2)):
            assert ticket.item.token_ids == completion(ticket.item, request=request)


def test_a_pass_that_fails_leaves_nothing_to_go_on_with() -> None:
    def fail(number: int) -> None:
        if number == 1:
            raise OSError(5, "input/output error")

    with Scheduler[Sequence](runner := Runner(2), 1) as scheduler:
        runner.before_pass = fail
        for _ in range(2):
            scheduler.add(sequence_of(prompt_of(4), 5))
        scheduler.step()
        with pytest.raises(OSError, match="input/output"):
            scheduler.step()
        assert scheduler.is_idle and scheduler.step() == [] and runner.pool.is_empty
        runner.before_pass = lambda number: None
        again = scheduler.add(sequence_of(prompt_of(4), 2))
        while not scheduler.is_idle:
            scheduler.step()
        assert again.item.token_ids == completion(again.item)


def test_a_device_that_cannot_be_rested_leaves_nothing_to_go_on_with() -> None:
    def fail() -> None:
        raise OSError(5, "input/output error")

    with Scheduler[Sequence](runner := Runner(2), 2) as scheduler:
        scheduler.add(sequence_of(prompt_of(4), 5))
        scheduler.step()
        runner.may_rest, runner.rest_device = True, fail  # type: ignore[method-assign]
        with pytest.raises(OSError, match="input/output"):
            scheduler.step()
        assert scheduler.is_idle and runner.pool.is_empty


def test_what_has_ended_is_told_before_what_waits_is_refused() -> None:
    with Scheduler[Sequence](Runner(2, context=256, kv_tokens=64), 2) as scheduler:
        small = scheduler.add(sequence_of(prompt_of(4), 1))
        scheduler.add(sequence_of(prompt_of(200), 3))
        assert [event.ticket for event in scheduler.step()] == [small]
        (refused,) = scheduler.step()
        assert refused.kind is EventKind.FAILED and "no room for a sequence of 202 tokens" in str(refused.error)


@pytest.mark.parametrize("max_batched_tokens", [1, 7, 13, 64])
def test_a_window_that_passes_in_several_pieces_keeps_every_position(max_batched_tokens: int) -> None:
    windows = list(cut_windows(torch.tensor(prompt_of(90)), 32, 20, [3]))
    found: dict[int, torch.Tensor] = {}
    runner = Runner(2, max_batched_tokens=max_batched_tokens)
    score(runner, windows, 2, lambda window, logprobs: found.update({window.position: logprobs}))
    for window in windows:
        text, targets = window.input_ids, window.targets
        logits = [model(text[: len(text) - len(targets) + 1 + index]) for index in range(len(targets))]
        expected = log_probabilities(torch.stack(logits), torch.tensor(targets))
        torch.testing.assert_close(found[window.position], expected)
    assert runner.announced == [False] * (len(runner.passes) - 1) + [True]
