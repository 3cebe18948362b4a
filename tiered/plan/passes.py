"""Which tokens a pass takes of each sequence, and how it is cut into micro-batches: pure functions of numbers.

The scheduler (`generate/scheduler.py`) and the engine (`model/segments.py`) run by them, and so does the simulator.
Tokens of a sequence are a range of its positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tiered.plan.inputs import Objective
from tiered.plan.pace import Pace
from tiered.plan.plan import Plan
from tiered.plan.state import ANYWHERE, Grid
from tiered.units import PAGE_TOKENS


class Shared(Protocol):
    """What tells how passes are shared: a plan, or what stands for one."""

    @property
    def max_batched_tokens(self) -> int: ...

    @property
    def objective(self) -> Objective: ...

    @property
    def grid(self) -> Grid: ...


def share_pass(plan: Shared, pace: Pace, decoding: int, left: Sequence[int]) -> list[int]:
    """How many tokens of each prompt the next pass takes beside `decoding` sequences that decode. `left` are tokens
    that the prompts still have, the oldest prompt's first.

    The oldest prompt gets at least half of the room, if it needs that much, so that it advances. Of the others the
    shortest come first, so that they need not wait for a long one. Prompts are cut on the grid only.
    """
    room = plan.max_batched_tokens - decoding
    least = plan.grid.cell(left[0]) if left else 0
    if decoding and plan.objective == "latency":
        room = min(room, max(pace.prompt_tokens(decoding), least))
    room, shares = max(room, 0), [0] * len(left)
    if left:
        wanted = room - min(room // 2, sum(left[1:]))
        shares[0] = plan.grid.share(wanted if wanted >= least else min(room, least), left[0])
        room -= shares[0]
    for number in sorted(range(1, len(left)), key=left.__getitem__) if room else ():
        if not room:
            break
        shares[number] = plan.grid.share(room, left[number])
        room -= shares[number]
    return shares


@dataclass(frozen=True)
class MicroBatchLimits:
    """How micro-batches are formed."""

    rows: int
    """Tokens per micro-batch."""
    gathered: bool = False
    """The family has dense attention: it needs rows of equal length."""
    gathered_rows: int = 1
    """Sequences whose keys and values may be gathered at once."""
    within_pages: bool = False
    """With `gathered`: a part may not cross a page, because all its queries read one copy of each page, and only those
    whose own page it is may read it as it was computed."""
    lent_pages: int = 0
    """Pages that a group may have in memory, where the cache is on disk; 0: no bound."""
    lent_states: int = 0
    """Sequences whose recurrent states a group may have in memory, where these are on disk; 0: no bound."""
    grid: Grid = ANYWHERE
    """Where parts of a sequence may begin."""


def limits_of(plan: Plan, gathered: bool) -> MicroBatchLimits:
    """How a pass of `plan` is cut; `gathered`: the family has dense attention."""
    return MicroBatchLimits(
        rows=plan.micro_batch_rows,
        gathered=gathered,
        gathered_rows=plan.gathered_rows,
        within_pages=plan.cache.bits != 16,
        lent_pages=plan.cache.lent_pages,
        lent_states=plan.cache.lent_states,
        grid=plan.grid,
    )


def plan_micro_batches(segments: Sequence[range], limits: MicroBatchLimits) -> list[list[dict[int, range]]]:
    """Groups of micro-batches. A micro-batch is the tokens of segments that it computes, by number of their segment.

    Every token of every segment is in one micro-batch; a segment is in one group, its tokens in order. Single tokens
    come first. A segment that is cut, as it is longer than a micro-batch or crosses the grid, is a group by itself, of
    several micro-batches.
    """
    singles = [number for number, segment in enumerate(segments) if len(segment) == 1]
    others = [number for number, segment in enumerate(segments) if len(segment) > 1]
    cuts = {number: _cut(segments[number], limits) for number in others}
    if limits.gathered:
        # Sequences of similar length together, so that little is padded.
        singles.sort(key=lambda number: segments[number].start)
        rows, long = limits.gathered_rows, others
        short = singles
    else:
        rows, long = limits.rows, [number for number in others if len(cuts[number]) > 1]
        short = [*singles, *(number for number in others if len(cuts[number]) == 1)]
    groups: list[list[dict[int, range]]] = []
    room = pages_room = 0
    for number in short:
        tokens, pages = len(segments[number]), segments[number].stop // PAGE_TOKENS
        is_full = limits.lent_states and groups and len(groups[-1][0]) >= limits.lent_states
        if tokens > room or is_full or (limits.lent_pages and pages > pages_room):
            groups.append([{}])
            room, pages_room = rows, limits.lent_pages
        groups[-1][0][number] = segments[number]
        room, pages_room = room - tokens, pages_room - pages
    return groups + [[{number: part} for part in cuts[number]] for number in long]


def _cut(segment: range, limits: MicroBatchLimits) -> list[range]:
    """A segment's tokens for micro-batches of its own."""
    parts, start = [], segment.start
    while start < segment.stop:
        stop = limits.grid.next_stop(start, segment.stop, limits.rows)
        if limits.gathered and limits.within_pages:
            stop = min(stop, start + PAGE_TOKENS - start % PAGE_TOKENS)
        parts.append(range(start, stop))
        start = stop
    return parts
