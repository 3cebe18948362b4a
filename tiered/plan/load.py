"""The passes of sequences that are alike, as the scheduler would choose them.

Predictions take runs of equal passes (`pass_runs`), simulations each pass (`pass_loads`); both are the same walk.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

from tiered.plan.inputs import Objective, Workload
from tiered.plan.pace import Pace
from tiered.plan.passes import share_pass
from tiered.plan.plan import Plan
from tiered.plan.state import ANYWHERE, Grid


@dataclass(frozen=True)
class Alike:
    """Sequences with prompts of one length that generate as many tokens each, and how they share passes."""

    sequences: int
    batch_size: int
    """Sequences at once, at most."""
    prompt: int
    """Tokens of a prompt."""
    context: int
    """Tokens of a sequence at its end."""
    max_batched_tokens: int
    """Tokens of a pass, at most."""
    objective: Objective
    all_logits: bool = False
    grid: Grid = ANYWHERE
    """Where prompts may be cut."""

    @classmethod
    def of(cls, plan: Plan, workload: Workload) -> Self:
        """The sequences of `workload`, each as long as the longest, as `plan` runs them."""
        longest = min(workload.max_context, plan.max_context)
        return cls._of(plan, workload, longest, min(workload.max_prompt or longest, longest))

    @classmethod
    def mean_of(cls, plan: Plan, workload: Workload) -> Self:
        """The same, each as long as they are on average."""
        share = workload.mean_context / workload.max_context
        context = max(1, round(min(workload.max_context, plan.max_context) * share))
        return cls._of(plan, workload, context, min(max(1, round(workload.mean_prompt)), context))

    @classmethod
    def _of(cls, plan: Plan, workload: Workload, context: int, prompt: int) -> Self:
        return cls(
            workload.sequences,
            plan.batch_size,
            prompt,
            prompt if workload.one_pass else context,
            plan.max_batched_tokens,
            plan.objective,
            workload.all_logits,
            plan.grid,
        )

    @property
    def stop(self) -> int:
        """Tokens of a sequence that are computed with: all but the last one generated."""
        return max(self.prompt, self.context - 1)

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of all prompts, and rows of sequences that decode, of all passes."""
        return self.sequences * self.prompt, self.sequences * (self.stop - self.prompt)

    @property
    def generated(self) -> int:
        """Tokens that a sequence generates."""
        return self.context - self.prompt


class PassRun(NamedTuple):
    """Passes one after the other, in which the same sequences take part with as many tokens in each."""

    times: int
    rows: int
    """Sequences that decode."""
    before: int
    """Tokens that they have before the first pass, together."""
    parts: tuple[range, ...]
    """Positions of the tokens of each prompt in the first pass; in each later one the next as many."""
    prompt_tokens: int
    """Of each pass."""
    logits: int
    """Positions whose logits are computed, in all passes together."""
    is_last: bool
    oldest: int
    """Tokens that the sequences of an age of 0 would have before the first pass."""
    ages: tuple[tuple[int, int], ...]
    """Of the sequences that decode, which come first: pairs of an age and how many have it."""

    @property
    def context(self) -> float:
        """Tokens that a sequence that decodes sees, itself among them, on average."""
        return self.before / max(1, self.rows) + (self.times + 1) / 2

    @property
    def decoding(self) -> Iterator[int]:
        """Tokens that each sequence that decodes has before the first pass."""
        return (self.oldest - age for age, count in self.ages for _ in range(count))


def pass_runs(alike: Alike, pace: Pace, most: int = 1) -> Iterator[PassRun]:
    """All passes. `pace` is asked before each run, so whoever lets it learn does so in between. Up to `most` passes
    that share the prompts as the pass before them did make a run; that sequences only decode in always do."""
    prompt, stop = alike.prompt, alike.stop
    # Sequences that decode, by the pass before which they began to; prompts that have begun; how many have not.
    ages, begun, waiting, clock = deque[tuple[int, int]](), list[int](), alike.sequences, 0
    rows = weighted = 0
    # Of the prompts that have not begun only so many can take part: all are alike, and later in turn.
    fit = -(-alike.max_batched_tokens // prompt) + 1
    shared = None
    while waiting or rows or begun:
        fresh = min(waiting, alike.batch_size - rows - len(begun))
        left = [prompt - done for done in begun] + [prompt] * min(fresh, fit)
        shares = share_pass(alike, pace, rows, left) if left else left
        taken = sum(shares)
        before, shared = shared, (rows, taken)
        times = stop - prompt - clock + ages[0][0] if ages else most
        if left:
            times = min(most, times) if taken and before == shared else 1
            times = max(1, min([times, *(each // share for each, share in zip(left, shares, strict=True) if share)]))
        parts, begun, ended = list[range](), list[int](), 0
        for each, share in zip(left, shares, strict=True):
            done = prompt - each
            if share:
                parts.append(range(done, done + share))
                waiting -= not done
                done += times * share
            if done >= prompt:
                ended += 1
            elif done:
                begun.append(done)
        start, seen, before_ages = prompt + clock, rows * (prompt + clock) - weighted, tuple(ages)
        logits = times * (rows + taken) if alike.all_logits else times * rows + ended
        clock, decoding = clock + times, rows
        while ages and prompt + clock - ages[0][0] >= stop:
            age, count = ages.popleft()
            rows, weighted = rows - count, weighted - age * count
        if ended and prompt < stop:
            ages.append((clock, ended))
            rows, weighted = rows + ended, weighted + clock * ended
        is_last = not (waiting or rows or begun)
        yield PassRun(times, decoding, seen, tuple(parts), taken, logits, is_last, start, before_ages)


@dataclass(frozen=True)
class PassLoad:
    """One pass."""

    segments: tuple[range, ...]
    """Positions of the tokens of each sequence that takes part."""
    decoding: int
    """How many of these decode; they come first."""
    logits: int
    """Positions whose logits are computed."""
    is_last: bool

    @property
    def tokens(self) -> int:
        return sum(map(len, self.segments))

    @property
    def prompt_tokens(self) -> int:
        return self.tokens - self.decoding


def pass_loads(plan: Plan, workload: Workload, pace: Pace) -> Iterator[PassLoad]:
    """All passes of `workload`: its sequences run as many at once as `plan` says, each with the longest prompt and as
    many tokens as its context then has room for."""
    for run in pass_runs(Alike.of(plan, workload), pace):
        for later in range(run.times):
            segments = (*(range(start + later, start + later + 1) for start in run.decoding), *run.parts)
            is_last = run.is_last and later == run.times - 1
            yield PassLoad(segments, run.rows, run.logits // run.times, is_last)
