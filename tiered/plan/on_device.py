"""What is on the device that computes: its needs, the units that stay there, and the ring that all others pass through.

In: the tape, what is needed besides, the budgets. Out: a placement within `--vram`, or a refusal that names the
smallest one that works. Pure functions of numbers; `way.py` calls them before it places what the host holds.
"""

from dataclasses import dataclass
from typing import Final

from tiered.errors import DeviceBudgetError
from tiered.plan.inputs import Budgets, Tier
from tiered.plan.placement import Held, Placement, Tape, place, wished
from tiered.units import GIB, format_budget, format_size, round_up

CONTEXT_NBYTES: Final = GIB // 2
"""What a CUDA device's driver and libraries take, where nobody has measured it: an assumption."""
EXPERT_SLOTS: Final = 2
"""Where experts are read when they are chosen, so many are on the device: one computes while the next is copied."""
WAITING_SLOTS: Final = 3
"""Where hidden states wait in the host's memory, those of so many micro-batches are on the device: one computes, one
comes and one goes."""
_SLOT_ALIGNMENT: Final = 256
_ONLY: Final = (Tier.GPU,)


@dataclass(frozen=True)
class DeviceNeeds:
    """Bytes of a device's memory that are taken whatever is resident there, by what takes them."""

    context: int
    """The driver's context, libraries and compiled kernels."""
    outer: int
    """Position tables, norms, biases."""
    kv: int
    workspace: int
    """Activations, logits, what kernels take, and slots for chosen experts."""
    state: int = 0
    """What recurrent layers keep of all sequences at once, if the cache is here; else of those of a micro-batch, in the
    layer that computes."""

    @property
    def total(self) -> int:
        return self.context + self.outer + self.kv + self.workspace + self.state


@dataclass(frozen=True)
class WaitingPlan:
    """Hidden states of a device's micro-batches wait in the host's memory, and cross the bus for each layer."""

    tokens: int
    """Tokens of a pass, at most."""
    rows: int
    """Tokens of a micro-batch, at most."""
    token_nbytes: int
    """Bytes of a token's hidden states."""

    @property
    def host_nbytes(self) -> int:
        """Bytes of the host's memory for those of a whole pass."""
        return self.tokens * self.token_nbytes

    @property
    def device_nbytes(self) -> int:
        """Bytes of the device's memory for those of the micro-batches that come, compute and go."""
        return WAITING_SLOTS * round_up(self.rows * self.token_nbytes, _SLOT_ALIGNMENT)

    def layer_nbytes(self, tokens: int) -> int:
        """Bytes that go to the device, and as many that come from it, in a layer of a pass of `tokens` tokens there; 0
        where all have room on the device."""
        return tokens * self.token_nbytes if tokens > WAITING_SLOTS * self.rows else 0


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
    waiting: WaitingPlan | None = None
    """None: hidden states of a whole pass are on the device."""

    @property
    def nbytes(self) -> int:
        """Bytes of the budget that are taken."""
        return self.needs.total + self.placement.nbytes


def fit_on_device(tape: Tape, needs: DeviceNeeds, budgets: Budgets, held: Held) -> Placement:
    """Place the tape in what `budgets.vram` leaves after `needs`: as many units as fit stay, or those that are wished
    for, or none where the device computes prompts only. Raises DeviceBudgetError, as `device_refusal` says."""
    available, most = budgets.vram - needs.total, _most(budgets)
    if most is None or not tape.nbytes:
        placement = place(tape, available, held)
    else:
        placement = wished(tape, available, held, most)
    if placement is None or (budgets.tiers == _ONLY and placement.ring_nbytes):
        raise device_refusal(tape, needs, budgets, held)
    return placement


def device_refusal(
    tape: Tape, needs: DeviceNeeds, budgets: Budgets, held: Held, smallest: int = 0
) -> DeviceBudgetError:
    """What says that `budgets.vram` is too little, with what takes the bytes and the smallest budget that would do:
    `smallest`, where that is known; else what is enough for these needs, which grow with it."""
    least, what = _least(tape, held, budgets.tiers, _most(budgets))
    smallest = smallest or needs.total + least
    state = f"{format_size(needs.state)} for recurrent states, " if needs.state else ""
    return DeviceBudgetError(
        f"{format_size(budgets.vram)} of GPU memory are too little. Needed: {format_size(needs.context)} for driver "
        f"and libraries, {format_size(needs.outer)} for tables, {format_size(needs.kv)} for the KV cache, "
        f"{state}{format_size(needs.workspace)} for activations, {format_size(least)} for {what}. "
        f"The smallest budget that works is --vram {format_budget(smallest)}"
        + ("; or use --tiers disk,cpu,gpu" if budgets.tiers == _ONLY else ""),
        smallest_bytes=smallest,
    )


def _most(budgets: Budgets) -> int | None:
    """Bytes of units that are to stay on the device; None: as many as there is room for."""
    return 0 if budgets.is_hybrid else budgets.resident_gpu


def _least(tape: Tape, held: Held, tiers: tuple[Tier, ...], most: int | None) -> tuple[int, str]:
    """The least bytes that a placement takes, and what for."""
    if tiers == _ONLY:
        return tape.total, "all weights, which --tiers gpu loads"
    asked = None if most is None else wished(tape, 2 * tape.total, held, most)
    if asked is not None and asked.resident:
        return asked.nbytes, f"--resident-gpu {format_budget(most or 0)} and a ring for the others"
    # A pass may have more than one micro-batch, which then use a whole layer one after the other.
    return tape.smallest_ring(held), "the largest layer" if held.layers else "the largest part of a layer"
