"""What fits in which budget: the planner asked about a ladder of budgets. Pure functions.

In: sizes of the tape's blocks, and what a run needs besides them at a given budget. Out: one row per budget, from
the smallest that works, over doublings, to the one that holds everything.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tiered.errors import BudgetError
from tiered.plan.plan import Needs, Plan, Tier, make_plan
from tiered.units import GIB, MIB, round_up

NeedsFor = Callable[[int], Needs]
"""What a run takes besides blocks, by its budget: a larger budget computes more rows at once."""

STREAMING = (Tier.DISK, Tier.CPU)
LOADED = (Tier.CPU,)


@dataclass(frozen=True)
class Fit:
    """What one budget gives."""

    budget: int
    resident_blocks: int
    resident_nbytes: int
    """Of block files."""
    read_nbytes: int
    """Bytes read from disk per pass, once the resident blocks are in memory."""

    @property
    def resident_share(self) -> float:
        return self.resident_nbytes / (self.resident_nbytes + self.read_nbytes)

    def disk_seconds(self, bytes_per_second: float) -> float:
        """Seconds the disk takes for one pass; the pass itself takes at least that."""
        return self.read_nbytes / bytes_per_second


def smallest_budget(tape_sizes: Sequence[int], needs_for: NeedsFor, tiers: tuple[Tier, ...] = STREAMING) -> int:
    """The least whole number of MiB for which the planner makes a plan.

    A refusal names what would do with the needs at the refused budget; those grow with the budget, so the planner
    is asked until it agrees.
    """
    budget = MIB
    while True:
        try:
            make_plan(tape_sizes, needs_for(budget), budget, tiers)
        except BudgetError as error:
            assert error.smallest_bytes is not None and error.smallest_bytes > budget, error
            budget = round_up(error.smallest_bytes, MIB)
        else:
            return budget


def ladder(smallest: int, everything: int) -> tuple[int, ...]:
    """`smallest`, the powers of two GiB above it, and `everything`."""
    doublings = []
    budget = GIB
    while budget < everything:
        if budget > smallest:
            doublings.append(budget)
        budget *= 2
    return tuple(dict.fromkeys((smallest, *doublings, everything)))


def fit(plan: Plan, file_sizes: Sequence[int]) -> Fit:
    """What `plan` makes of blocks whose files have `file_sizes` bytes (less than in memory where compressed)."""
    resident = plan.placement.resident
    held = sum(nbytes for position, nbytes in enumerate(file_sizes) if position in resident)
    return Fit(plan.budget, len(resident), held, sum(file_sizes) - held)


def fits(tape_sizes: Sequence[int], file_sizes: Sequence[int], needs_for: NeedsFor) -> tuple[Fit, ...]:
    """One row per budget of the ladder."""
    smallest = smallest_budget(tape_sizes, needs_for)
    everything = max(smallest, smallest_budget(tape_sizes, needs_for, LOADED))
    return tuple(
        fit(make_plan(tape_sizes, needs_for(budget), budget, STREAMING), file_sizes)
        for budget in ladder(smallest, everything)
    )
