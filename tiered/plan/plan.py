"""The plan of a run: every byte accounted for before the first one is read, or a refusal that says what would do."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from tiered.errors import BudgetError, ConfigError
from tiered.plan.placement import Placement, full_ring, place, smallest_ring
from tiered.units import format_budget, format_size


class Tier(Enum):
    """A place where weights can be, slowest first."""

    DISK = "disk"
    CPU = "cpu"
    GPU = "gpu"


@dataclass(frozen=True)
class Needs:
    """Bytes that are taken whatever is resident, by what takes them."""

    baseline: int
    """The process before any weight: interpreter, torch, transformers, tokenizer, skeleton."""
    outer: int
    """Position tables, final norms, embedding scales: always resident."""
    kv: int
    workspace: int

    @property
    def total(self) -> int:
        return self.baseline + self.outer + self.kv + self.workspace


@dataclass(frozen=True)
class Plan:
    """Every decision about memory for one run."""

    budget: int
    needs: Needs
    placement: Placement
    tape_sizes: tuple[int, ...]

    @property
    def streamed_nbytes(self) -> int:
        """Bytes read per pass once the resident blocks are in memory."""
        return sum(self.tape_sizes) - self.placement.resident_nbytes

    @property
    def missing_overlap_nbytes(self) -> int:
        """What the ring lacks to hold two neighbours: without it reading waits for computing, and the reverse."""
        streamed = [nbytes for i, nbytes in enumerate(self.tape_sizes) if i not in self.placement.resident]
        return max(0, full_ring(streamed) - self.placement.ring_nbytes) if streamed else 0

    @property
    def bound_resident_nbytes(self) -> int:
        """M of the bound: all that the budget leaves after needs and two blocks, used or not, but at most S.

        Never less than what is resident: with a large block held, the two that pass may be smaller than any two.
        """
        total = sum(self.tape_sizes)
        free = self.budget - self.needs.total
        if total <= free:
            return total
        return max(self.placement.resident_nbytes, min(total, free - full_ring(self.tape_sizes)))


def parse_tiers(text: str) -> tuple[Tier, ...]:
    """The tiers named by `text`, such as "disk,cpu"; the order is from slowest to fastest.

    Raises ConfigError that explains unknown names and combinations that cannot work.
    """
    names = [name.strip().lower() for name in text.split(",")]
    known = {tier.value: tier for tier in Tier}
    for name in names:
        if name not in known:
            raise ConfigError(f"--tiers {text!r}: unknown tier {name!r}; known tiers are disk, cpu and gpu")
    tiers = tuple(known[name] for name in names)
    order = list(Tier)
    if [order.index(tier) for tier in tiers] != sorted({order.index(tier) for tier in tiers}):
        right = ",".join(tier.value for tier in order if tier in tiers)
        raise ConfigError(f"--tiers {text!r}: name each tier once, slowest first: {right}")
    if Tier.GPU in tiers:
        raise ConfigError(
            f"--tiers {text!r}: this version computes on the CPU only; use disk,cpu (stream what does not fit) "
            "or cpu (load everything)"
        )
    if Tier.CPU not in tiers:
        raise ConfigError(f"--tiers {text!r}: weights on disk need a tier that computes; use disk,cpu")
    return tiers


def make_plan(tape_sizes: Sequence[int], needs: Needs, budget: int, tiers: tuple[Tier, ...]) -> Plan:
    """Fit the tape into what `budget` leaves after `needs`.

    Raises BudgetError, naming what takes the bytes and the smallest budget that would do.
    """
    all_resident = Tier.DISK not in tiers
    least = sum(tape_sizes) if all_resident else smallest_ring(tape_sizes)
    placement = place(tape_sizes, budget - needs.total)
    if placement is None or (all_resident and placement.ring_nbytes):
        smallest = needs.total + min(least, sum(tape_sizes))
        what = "all blocks, which --tiers cpu loads" if all_resident else "the largest block"
        raise BudgetError(
            f"a budget of {format_size(budget)} is too small. Needed: {format_size(needs.baseline)} for the process "
            f"itself, {format_size(needs.outer)} for tables that stay in memory, {format_size(needs.kv)} for the "
            f"KV cache, {format_size(needs.workspace)} for activations, {format_size(least)} for {what}. "
            f"The smallest budget that works is --ram {format_budget(smallest)}"
            + ("; or use --tiers disk,cpu" if all_resident else ""),
            smallest_bytes=smallest,
        )
    return Plan(budget, needs, placement, tuple(tape_sizes))
