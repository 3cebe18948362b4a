"""The plan of a run: every decision about memory, batch size and where things are, as one frozen object.

Made by `make.py`. Commands, the Python API and the runtime read the same one; `to_json` writes it down and `from_json`
reads it back as it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from tiered.errors import BudgetError
from tiered.plan.inputs import Objective, Tier
from tiered.plan.kv import CachePlan, KVShape, LayerGroup
from tiered.plan.placement import Placement, full_ring, place, smallest_ring
from tiered.units import MIB, format_budget, format_size, round_up


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
    """Every decision for one run."""

    budget: int
    needs: Needs
    placement: Placement
    tape_sizes: tuple[int, ...]
    """Bytes of each block of the tape, in memory."""
    side_nbytes: int
    """Bytes of the embedding's scales and zeros, which are part of `needs.outer`."""
    batch_size: int
    """Sequences at once, at most."""
    max_context: int
    """Tokens of a sequence, at most."""
    max_batched_tokens: int
    """Tokens of a pass, at most."""
    micro_batch_rows: int
    """Tokens that are computed together: more of them pass through each block in several micro-batches."""
    gathered_rows: int
    """Sequences whose keys and values are gathered at once, by families that want them in one piece."""
    head_rows: int
    """Positions whose logits are computed at once."""
    cache: CachePlan
    """The KV cache: its tier, bits and pages."""
    objective: Objective
    """While sequences decode: "latency" lets prompts into a pass in small pieces, "throughput" as much as fits."""
    why: str
    """The reason for the batch size, for people."""

    @property
    def nbytes(self) -> int:
        """Bytes of the budget that the plan takes."""
        return self.needs.total + self.placement.nbytes

    @property
    def streamed_nbytes(self) -> int:
        """Bytes read per pass once the resident blocks are in memory."""
        return sum(self.tape_sizes) - self.placement.resident_nbytes

    @property
    def missing_overlap_nbytes(self) -> int:
        """Bytes that the ring lacks to hold any two neighbours: if there are any, reading and computing take turns."""
        streamed = [nbytes for i, nbytes in enumerate(self.tape_sizes) if i not in self.placement.resident]
        return max(0, full_ring(streamed) - self.placement.ring_nbytes) if streamed else 0

    @property
    def bound_resident_nbytes(self) -> int:
        """M of the bound: all bytes that the budget leaves after needs and two blocks, used or not, but at most S.

        Never less than what is resident: if a large block is resident, a ring for the others may be smaller than the
        largest two neighbours.
        """
        total = sum(self.tape_sizes)
        free = self.budget - self.needs.total
        if total <= free:
            return total
        return max(self.placement.resident_nbytes, min(total, free - full_ring(self.tape_sizes)))

    @property
    def returned_logits_nbytes(self) -> int:
        """Bytes that logits handed to a caller may take: what the budget leaves, and half of the workspace, as the
        other half is needed to compute them."""
        return self.needs.workspace // 2 + self.budget - self.nbytes

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        fields = asdict(self)
        fields["placement"]["resident"] = sorted(self.placement.resident)
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """The plan that `to_json` has written."""
        placement, cache = fields["placement"], fields["cache"]
        groups = tuple(LayerGroup(tuple(group["layers"]), group["window"]) for group in cache["groups"])
        return cls(
            **{
                **fields,
                "needs": Needs(**fields["needs"]),
                "placement": Placement(**{**placement, "resident": frozenset(placement["resident"])}),
                "tape_sizes": tuple(fields["tape_sizes"]),
                "cache": CachePlan(**{**cache, "shape": KVShape(**cache["shape"]), "groups": groups}),
            }
        )


def fit_blocks(tape_sizes: Sequence[int], needs: Needs, budget: int, tiers: tuple[Tier, ...]) -> Placement:
    """Place the tape in what `budget` leaves after `needs`.

    Raises BudgetError, naming what takes the bytes and the smallest budget that would do.
    """
    all_resident = Tier.DISK not in tiers
    placement = place(tape_sizes, budget - needs.total)
    if placement is not None and not (all_resident and placement.ring_nbytes):
        return placement
    least = sum(tape_sizes) if all_resident else smallest_ring(tape_sizes)
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


def smallest_budget(tape_sizes: Sequence[int], needs_for: Callable[[int], Needs], tiers: tuple[Tier, ...]) -> int:
    """The least whole number of MiB for which the planner makes a plan.

    A refusal names the budget that is enough for the needs at the refused budget. Needs grow with the budget, so each
    named budget is tried until one is accepted.
    """
    budget = MIB
    while True:
        try:
            fit_blocks(tape_sizes, needs_for(budget), budget, tiers)
        except BudgetError as error:
            assert error.smallest_bytes is not None and error.smallest_bytes > budget, error
            budget = round_up(error.smallest_bytes, MIB)
        else:
            return budget
