"""The plan of a run: every decision about memory, batch size and where things are, as one frozen object.

Made by `make.py`. Commands, the Python API and the runtime read the same one; `to_json` writes it down and `from_json`
reads it back as it was.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

from tiered.errors import BudgetError
from tiered.plan.inputs import Objective, Tier
from tiered.plan.kv import CachePlan, KVShape, LayerGroup
from tiered.plan.placement import UNHELD, Held, Placement, Tape, full_ring, place, smallest_ring
from tiered.units import MIB, format_budget, format_size, round_up


@dataclass(frozen=True)
class Needs:
    """Bytes that are taken whatever is resident, by what takes them."""

    baseline: int
    """The process before any weight: interpreter, torch, transformers, tokenizer, skeleton."""
    outer: int
    """Position tables, norms, biases, embedding scales: always resident; and what embedding rows and compressed chunks
    are read through."""
    kv: int
    workspace: int

    @property
    def total(self) -> int:
        return self.baseline + self.outer + self.kv + self.workspace


@dataclass(frozen=True)
class ExpertCachePlan:
    """Experts are read when they are chosen, and the most used ones stay in memory."""

    slots: int
    """Experts that are in memory at most."""
    slot_nbytes: int

    @property
    def nbytes(self) -> int:
        return self.slots * self.slot_nbytes


@dataclass(frozen=True)
class DeviceNeeds:
    """Bytes of a device's memory that are taken whatever is resident there, by what takes them."""

    context: int
    """The driver's context, libraries and compiled kernels."""
    outer: int
    """Position tables, norms, biases."""
    kv: int
    workspace: int

    @property
    def total(self) -> int:
        return self.context + self.outer + self.kv + self.workspace


@dataclass(frozen=True)
class DevicePlan:
    """What is on the device that computes."""

    vram: int
    """The budget of its memory."""
    needs: DeviceNeeds
    placement: Placement
    """Units that stay on the device, by their number on the plan's tape, and the ring of slots through which all others
    pass, from RAM, in every pass. Units that stay are read once, before the first pass, and are in the host's memory
    neither resident nor streamed."""

    @property
    def nbytes(self) -> int:
        """Bytes of the budget that are taken."""
        return self.needs.total + self.placement.nbytes


@dataclass(frozen=True)
class Plan:
    """Every decision for one run."""

    budget: int
    needs: Needs
    placement: Placement
    tape: Tape
    """The units that a pass uses, in order; `placement` says by number which of them are resident."""
    held: Held
    """What is in memory as a whole while it computes."""
    side_nbytes: int
    """Bytes of the embedding's scales and zeros, which are part of `needs.outer`."""
    buffers_nbytes: int
    """Bytes of the buffers for chunks of compressed units, which are part of `needs.outer`."""
    batch_size: int
    """Sequences at once, at most."""
    max_context: int
    """Tokens of a sequence, at most."""
    max_batched_tokens: int
    """Tokens of a pass, at most."""
    micro_batch_rows: int
    """Tokens that are computed together: more of them pass through each block in several micro-batches, for which
    `held` must allow."""
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
    experts: ExpertCachePlan | None = None
    """None: layers are read whole, experts and all. Else `tape` is without experts."""
    device: DevicePlan | None = None
    """None: the processor computes. `placement` is then the host's: units resident in RAM, and the ring that units from
    disk pass through, on their way to the device."""

    @property
    def nbytes(self) -> int:
        """Bytes of the budget that the plan takes."""
        return self.needs.total + self.placement.nbytes + self._experts_nbytes

    @property
    def _experts_nbytes(self) -> int:
        return self.experts.nbytes if self.experts is not None else 0

    @property
    def streamed_nbytes(self) -> int:
        """Bytes that pass through the ring in a pass."""
        return self.tape.total - self.placement.resident_nbytes

    @property
    def read_nbytes(self) -> int:
        """Bytes of the tape read per pass once its resident units are in memory."""
        resident = self.placement.resident
        return sum(nbytes for unit, nbytes in enumerate(self.tape.file_nbytes) if unit not in resident)

    @property
    def resident_blocks(self) -> int:
        """Blocks all of whose units on the tape are resident."""
        return sum(self.placement.resident.issuperset(block) for block in self.tape.blocks)

    @property
    def missing_overlap_nbytes(self) -> int:
        """Bytes that the ring lacks to be full: if there are any, reading and computing take turns."""
        return max(0, full_ring(self.tape.streamed(self.held, self.placement.resident)) - self.placement.ring_nbytes)

    @property
    def bound_resident_nbytes(self) -> int:
        """M of the bound: all bytes that the budget leaves after needs, the cache of experts and two units, used or
        not, but at most S.

        Never less than what is resident: if a large unit is resident, a ring for the others may be smaller than the
        largest two neighbours.
        """
        total = self.tape.total
        free = self.budget - self.needs.total - self._experts_nbytes
        if total <= free:
            return total
        return max(self.placement.resident_nbytes, min(total, free - full_ring(self.tape.streamed(UNHELD))))

    @property
    def returned_logits_nbytes(self) -> int:
        """Bytes that logits handed to a caller may take: what the budget leaves, and half of the workspace, as the
        other half is needed to compute them."""
        return self.needs.workspace // 2 + self.budget - self.nbytes

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        fields = asdict(self)
        fields["placement"]["resident"] = sorted(self.placement.resident)
        if self.device is not None:
            fields["device"]["placement"]["resident"] = sorted(self.device.placement.resident)
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """The plan that `to_json` has written."""
        placement, cache, tape = fields["placement"], fields["cache"], fields["tape"]
        groups = tuple(LayerGroup(tuple(group["layers"]), group["window"]) for group in cache["groups"])
        return cls(
            **{
                **fields,
                "needs": Needs(**fields["needs"]),
                "placement": Placement(**{**placement, "resident": frozenset(placement["resident"])}),
                "tape": Tape(**{name: tuple(values) for name, values in tape.items()}),
                "held": Held(**fields["held"]),
                "cache": CachePlan(**{**cache, "shape": KVShape(**cache["shape"]), "groups": groups}),
                "experts": ExpertCachePlan(**fields["experts"]) if fields["experts"] else None,
                "device": _device_from_json(fields["device"]) if fields.get("device") else None,
            }
        )


def _device_from_json(fields: dict[str, Any]) -> DevicePlan:
    placement = fields["placement"]
    on_device = Placement(**{**placement, "resident": frozenset(placement["resident"])})
    return DevicePlan(fields["vram"], DeviceNeeds(**fields["needs"]), on_device)


def fit_units(
    tape: Tape,
    needs: Needs,
    budget: int,
    tiers: tuple[Tier, ...],
    held: Held = UNHELD,
    experts_nbytes: int = 0,
) -> Placement:
    """Place the tape in what `budget` leaves after `needs` and `experts_nbytes` for experts that are not on it.

    Raises BudgetError, naming what takes the bytes and the smallest budget that would do.
    """
    all_resident = Tier.DISK not in tiers
    placement = place(tape, budget - needs.total - experts_nbytes, held)
    if placement is not None and not (all_resident and placement.ring_nbytes):
        return placement
    least = tape.total if all_resident else smallest_ring(tape.streamed(held))
    smallest = needs.total + experts_nbytes + min(least, tape.total)
    experts = f"{format_size(experts_nbytes)} for the experts that one token chooses, " if experts_nbytes else ""
    raise BudgetError(
        f"a budget of {format_size(budget)} is too small. Needed: {format_size(needs.baseline)} for the process "
        f"itself, {format_size(needs.outer)} for tables that stay in memory, {format_size(needs.kv)} for the "
        f"KV cache, {format_size(needs.workspace)} for activations, {experts}{format_size(least)} for "
        f"{'all weights, which --tiers cpu loads' if all_resident else _largest_piece(tape, held)}. "
        f"The smallest budget that works is --ram {format_budget(smallest)}"
        + ("; or use --tiers disk,cpu" if all_resident else ""),
        smallest_bytes=smallest,
    )


def _largest_piece(tape: Tape, held: Held) -> str:
    """What the largest piece of the tape is, in words."""
    piece = max(tape.pieces(held), key=lambda piece: sum(tape.nbytes[unit] for unit in piece))
    if piece not in tape.blocks:
        return "the largest part of a layer"
    return "the head" if piece == tape.blocks[-1] else "the largest layer"


def smallest_budget(plan_at: Callable[[int], object]) -> int:
    """The least whole number of MiB that `plan_at` accepts.

    A refusal names the budget that is enough for the needs at the refused budget. Needs grow with the budget, so each
    named budget is tried until one is accepted.
    """
    budget = MIB
    while True:
        try:
            plan_at(budget)
        except BudgetError as error:
            assert error.smallest_bytes is not None and error.smallest_bytes > budget, error
            budget = round_up(error.smallest_bytes, MIB)
        else:
            return budget
