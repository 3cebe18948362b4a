"""The plan of a run: every decision about memory, batch size and where things are, as one frozen object.

Made by `make.py`. Commands, the Python API and the runtime read the same one; `to_json` writes it down and `from_json`
reads it back as it was.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from operator import add
from typing import Any, Final, Self

from tiered.errors import BudgetError, DeviceBudgetError
from tiered.plan.inputs import Computes, ExpertShape, Objective, Tier, tiers_text
from tiered.plan.kv import CachePlan, group_from_json
from tiered.plan.on_device import DeviceNeeds, DevicePlan, WaitingPlan
from tiered.plan.placement import UNHELD, Held, Placement, Tape, place, wished
from tiered.plan.state import ANYWHERE, Grid, StateShape
from tiered.units import MIB, format_budget, format_size, round_up

HOLDS_LESS: Final = "for so few passes taking memory for more would take longer than reading it again"
"""Why less stays than has room, for people."""


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
    state: int = 0
    """What recurrent layers keep of all sequences at once."""
    waiting: int = 0
    """Hidden states of a device's micro-batches that wait."""
    objects: int = 0
    """Python's objects for the experts of a mixture."""

    @property
    def outer_text(self) -> str:
        """`outer`, and `objects` if there are any, in words."""
        objects = f", {format_size(self.objects)} for experts' objects" if self.objects else ""
        return f"{format_size(self.outer)} for tables that stay in memory{objects}"

    @property
    def total(self) -> int:
        return self.baseline + self.outer + self.kv + self.workspace + self.state + self.waiting + self.objects


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
class Plan:
    """Every decision for one run."""

    budget: int
    needs: Needs
    placement: Placement
    """Of the host: units that are resident in RAM, by their number on `tape`, and the ring for those that come from
    disk."""
    tape: Tape
    """The units that a pass uses, in order."""
    held: Held
    """What is in memory as a whole while it computes: in the device's where one computes, see also `host_held`."""
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
    """None: the processor computes. Else the units that stay on the device are neither in `placement` nor on the host's
    tape, and pass through the host's ring once, before the first pass."""
    prefill_device: Computes = "cpu"
    """What computes prompts."""
    decode_device: Computes = "cpu"
    """What computes the rest."""
    holds_less: bool = False
    """Fewer weights stay in memory than have room, because a job of few passes is quicker so."""

    def reads(self, experts: ExpertShape | None) -> bool:
        """Whether `experts`, the model's, are read when they are chosen: on demand, and without room for all."""
        return self.experts is not None and experts is not None and self.experts.slots < experts.total

    @property
    def nbytes(self) -> int:
        """Bytes of the budget that the plan takes, of the host's memory."""
        return self.needs.total + self.placement.nbytes + self._experts_nbytes

    @property
    def grid(self) -> Grid:
        """Where prompts may be cut."""
        return ANYWHERE if self.cache.state is None else self.cache.state.grid

    @property
    def _experts_nbytes(self) -> int:
        return self.experts.nbytes if self.experts is not None else 0

    @property
    def on_device(self) -> frozenset[int]:
        """Units that stay on the device."""
        return frozenset() if self.device is None else self.device.placement.resident

    @property
    def host_tape(self) -> Tape:
        """The units that the host holds or reads in a pass; see `Tape.without` for their numbers."""
        return self.tape.without(self.on_device)

    @property
    def host_held(self) -> Held:
        """What is in the host's ring as a whole; see `host_held_of`."""
        return host_held_of(self.held, (self.prefill_device, self.decode_device))

    @property
    def streamed_nbytes(self) -> int:
        """Bytes that pass through the host's ring in a pass."""
        return self.host_tape.total - self.placement.resident_nbytes

    @cached_property
    def resident_file_nbytes(self) -> int:
        """Bytes that reading the units takes that stay in the host's memory."""
        return self.tape.file_nbytes_of(self.placement.resident, self.placement.resident_nbytes)

    @cached_property
    def read_nbytes(self) -> int:
        """Bytes of the tape read per pass once its resident units are in memory."""
        left = self.tape.file_total - self.resident_file_nbytes
        if self.device is None:
            return left
        return left - self.tape.file_nbytes_of(self.on_device, self.device.placement.resident_nbytes)

    @cached_property
    def bus_nbytes(self) -> int:
        """Bytes of weights that are copied to the device in a pass in which it computes."""
        return 0 if self.device is None else self.host_tape.total

    @property
    def decode_bus_nbytes(self) -> int:
        """The same of a pass in which all sequences decode."""
        return self.bus_nbytes if self.decode_device == "gpu" else 0

    def waiting_nbytes(self, tokens: int) -> int:
        """Bytes of hidden states that are copied to the device, and as many from it, in a pass of which it computes
        `tokens` tokens."""
        if self.device is None or self.device.waiting is None:
            return 0
        return (len(self.tape.counts) - 1) * self.device.waiting.layer_nbytes(tokens)

    def fresh_nbytes(self, tokens: int) -> float:
        """Bytes that a run's first pass, of `tokens` tokens, touches for the first time while it computes: pages of its
        tokens, and its share of the workspace. A device's are its own, and what is copied to it is touched before."""
        if self.device is not None:
            return 0.0
        pages = 0.0 if self.cache.on_disk else self.needs.kv * min(1.0, tokens / (self.batch_size * self.max_context))
        return pages + self.needs.workspace * min(1.0, tokens / self.micro_batch_rows)

    @property
    def resident_blocks(self) -> int:
        """Blocks all of whose units on the tape are resident, in RAM or on the device."""
        return sum((self.placement.resident | self.on_device).issuperset(block) for block in self.tape.blocks)

    @property
    def missing_overlap_nbytes(self) -> int:
        """Bytes that the host's ring lacks to be full: if there are any, reading and computing (or copying) take
        turns."""
        full = self.tape.full_ring(self.host_held, self.placement.resident | self.on_device)
        return max(0, full - self.placement.ring_nbytes)

    @property
    def missing_copy_overlap_nbytes(self) -> int:
        """The same of the device's ring."""
        if self.device is None:
            return 0
        return max(0, self.tape.full_ring(self.held, self.on_device) - self.device.placement.ring_nbytes)

    @cached_property
    def reads_in_turns(self) -> bool:
        """Whether reading and computing (or copying) take turns, as there is no room to read ahead."""
        # There is beside any unit that stays.
        return not self.placement.resident and self.missing_overlap_nbytes > 0

    @cached_property
    def copies_in_turns(self) -> bool:
        """The same of copying to the device and computing there."""
        return self.device is not None and not self.device.placement.resident and self.missing_copy_overlap_nbytes > 0

    @property
    def bound_resident_nbytes(self) -> int:
        """M of the bound, the bytes that need not be read: all that the budgets leave after needs, the cache of experts
        and two units each, used or not, but at most S. Where somebody has wished for what is resident, that.

        Never less than what is resident: if a large unit is resident, a ring for the others may be smaller than the
        largest two neighbours.
        """
        total, free = self.tape.total, self.budget - self.needs.total - self._experts_nbytes
        on_device = self.bound_device_nbytes
        if self.placement.is_wished:
            return min(total, on_device + self.placement.resident_nbytes)
        if total - on_device <= free:
            return total
        in_ram = max(self.placement.resident_nbytes, free - self.tape.full_ring(UNHELD))
        return min(total, on_device + in_ram)

    @property
    def bound_device_nbytes(self) -> int:
        """Of these, those that need not be copied to the device either."""
        if self.device is None or self.decode_device == "cpu":
            return 0
        placement = self.device.placement
        total, free = self.tape.total, self.device.vram - self.device.needs.total
        if placement.is_wished:
            return placement.resident_nbytes
        if total <= free:
            return total
        return max(placement.resident_nbytes, min(total, free - self.tape.full_ring(UNHELD)))

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
        groups = tuple(map(group_from_json, cache["groups"]))
        state = StateShape.from_json(cache["state"]) if cache["state"] else None
        return cls(
            **{
                **fields,
                "needs": Needs(**fields["needs"]),
                "placement": Placement(**{**placement, "resident": frozenset(placement["resident"])}),
                "tape": Tape(**{name: tuple(values) for name, values in tape.items()}),
                "held": Held(**fields["held"]),
                "cache": CachePlan(**{**cache, "groups": groups, "state": state}),
                "experts": ExpertCachePlan(**fields["experts"]) if fields["experts"] else None,
                "device": _device_from_json(fields["device"]) if fields.get("device") else None,
            }
        )


def host_held_of(held: Held, computes: tuple[Computes, Computes]) -> Held:
    """What the host's ring holds as a whole, where `held` is what is in memory while it computes, and `computes` says
    what computes prompts and what the rest.

    A unit on its way to the device leaves when it has been copied. Where processor and device compute in the same pass,
    one may be a block ahead of the other, so blocks are held.
    """
    if computes == ("gpu", "gpu"):
        return Held(ahead_nbytes=held.ahead_nbytes)
    return held if computes == ("cpu", "cpu") else replace(held, layers=True, head=True)


def _device_from_json(fields: dict[str, Any]) -> DevicePlan:
    placement = fields["placement"]
    on_device = Placement(**{**placement, "resident": frozenset(placement["resident"])})
    waiting = WaitingPlan(**fields["waiting"]) if fields.get("waiting") else None
    return DevicePlan(fields["vram"], DeviceNeeds(**fields["needs"]), on_device, waiting)


def fit_units(
    tape: Tape,
    needs: Needs,
    budget: int,
    tiers: tuple[Tier, ...],
    held: Held = UNHELD,
    experts_nbytes: int = 0,
    on_device: frozenset[int] = frozenset(),
    most: int | None = None,
    named: int = 0,
) -> Placement:
    """Place the tape in what `budget` leaves after `needs` and `experts_nbytes` for experts that are not on it.

    Units that are `on_device` stay there, and pass through the ring only once; of the others, `most` bytes are to be
    resident, or as many as there is room for. Raises BudgetError, naming what takes the bytes and the smallest budget
    that would do, or `named`, if that is more: with less, other needs would be planned, which do not fit.
    """
    all_resident, host = Tier.DISK not in tiers, tape.without(on_device)
    available = budget - needs.total - experts_nbytes
    through = max(map(tape.nbytes.__getitem__, on_device), default=0)
    if most is None:
        placement = place(host, available, held, through)
    else:
        placement = wished(host, available, held, most, through)
    if placement is not None and (placement.resident_nbytes == host.total or not all_resident):
        return _on_tape(placement, tape, on_device, available)
    least = host.total + through if all_resident else max(host.smallest_ring(held), through)
    what = _what_is_least(host, held, tiers)
    if most is not None and (asked := wished(host, 3 * tape.total, held, most, through)) and asked.resident:
        least, what = asked.nbytes, f"--resident-cpu {format_budget(most)} and a ring for the others"
    smallest = max(needs.total + experts_nbytes + least, named)
    state = f"{format_size(needs.state)} for recurrent states, " if needs.state else ""
    state += f"{format_size(needs.waiting)} for what waits for the GPU, " if needs.waiting else ""
    experts = f"{format_size(experts_nbytes)} for the experts that one token chooses, " if experts_nbytes else ""
    raise BudgetError(
        f"a budget of {format_size(budget)} is too small. Needed: {format_size(needs.baseline)} for the process "
        f"itself, {needs.outer_text}, {format_size(needs.kv)} for the "
        f"KV cache, {state}{format_size(needs.workspace)} for activations, {experts}{format_size(least)} for {what}. "
        f"The smallest budget that works is --ram {format_budget(smallest)}"
        + (f"; or use --tiers disk,{tiers_text(tiers)}" if all_resident and Tier.CPU in tiers else ""),
        smallest_bytes=smallest,
    )


def _on_tape(placement: Placement, tape: Tape, on_device: frozenset[int], available: int) -> Placement:
    """`placement` of the units that are not `on_device`, by their numbers on `tape`."""
    if not on_device:
        return placement
    numbers = tape.numbers_without(on_device)
    # What is left lets one unit be read while another is copied, when those that stay on the device pass through.
    ring = max(placement.ring_nbytes, min(_passing_ring(tape, on_device), available - placement.resident_nbytes))
    resident = frozenset(map(numbers.__getitem__, placement.resident))
    return replace(placement, resident=resident, ring_nbytes=ring)


@lru_cache(maxsize=64)
def _passing_ring(tape: Tape, on_device: frozenset[int]) -> int:
    """Bytes of a full ring through which units pass that are `on_device`, which many plans leave the same."""
    sizes = list(map(tape.nbytes.__getitem__, sorted(on_device)))
    # As `full_ring` of as many pieces of one unit each.
    return max(map(add, sizes, sizes[1:] + sizes[:1]), default=0)


def _what_is_least(host: Tape, held: Held, tiers: tuple[Tier, ...]) -> str:
    """What a host's least memory for weights is for, in words."""
    if not host.nbytes:
        return "weights on their way to the GPU"
    if Tier.DISK in tiers:
        return _largest_piece(host, held)
    where = " that are not on the GPU" if Tier.GPU in tiers else ""
    return f"all weights{where}, which --tiers {tiers_text(tiers)} loads"


def _largest_piece(tape: Tape, held: Held) -> str:
    """What the largest piece of the tape is, in words."""
    piece = max(tape.pieces(held), key=lambda piece: sum(tape.nbytes[unit] for unit in piece))
    if piece not in tape.blocks:
        return "the largest part of a layer"
    return "the head" if piece == tape.blocks[-1] else "the largest layer"


def smallest_budget(plan_at: Callable[[int], object], start: int = MIB) -> int:
    """The least budget that `plan_at` accepts: a whole number of MiB, or `start`, which is tried first.

    A refusal names the budget that is enough for the needs at the refused budget. Needs grow with the budget, so each
    named budget is tried until one is accepted. Raises DeviceBudgetError where the device's memory does not suffice.
    """
    budget = start
    while True:
        try:
            plan_at(budget)
        except DeviceBudgetError:
            raise  # no budget of the host's memory helps
        except BudgetError as error:
            assert error.smallest_bytes is not None and error.smallest_bytes > budget, error
            budget = round_up(error.smallest_bytes, MIB)
        else:
            return budget
