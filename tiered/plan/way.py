"""One way to run what is asked for: batch size, context and KV tier are given, and the plan follows for any budget.

In: the four inputs of a plan. Out: plans, or refusals that name the smallest budget that works. `make.py` compares
ways.

A mixture of experts has two kinds of plans, and a way takes the better one. Layers are read whole, experts and all,
ahead of the computation; or dense units are, and a layer's experts are read when its router has chosen them, into a
cache. Then memory goes to dense units first: one saves its bytes in every pass, an expert only in those that choose it.

Where a device computes, units that stay there are chosen first, as they save copies and reads, and the host's among the
others, each evenly spread. What the device takes depends on `--vram` alone, but for where it is too little; so the two
budgets can be named one after the other.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Final

from tiered.errors import BudgetError, ConfigError, DeviceBudgetError
from tiered.plan.at_once import AtOnce, Inputs, Passes
from tiered.plan.budget import BASELINE_VARIES_NBYTES
from tiered.plan.cost import HALFWAY, kv_block_nbytes
from tiered.plan.inputs import Budgets, ExpertShape, ModelShape, Tier
from tiered.plan.kv import Bits, CachePlan
from tiered.plan.on_device import DevicePlan, device_refusal, fit_on_device
from tiered.plan.placement import Placement
from tiered.plan.plan import ExpertCachePlan, Plan, fit_units, smallest_budget
from tiered.units import MIB, round_up

_CLEARLY_FEWER: Final = 2
"""Experts are read on demand where that reads so many times fewer bytes per pass than whole layers do. With R seconds
of reading and C of computing, a pass over whole layers takes max(R, C), as both go on at once. Experts are waited for:
R' + C at most. With R' = R / 2 that is less wherever computing takes less than half as long as reading."""


@dataclass(frozen=True)
class Asked(Inputs):
    """The four inputs, and the ways to run what they ask for."""

    def way(self, batch_size: int, on_disk: bool, context: int | None = None, on_device: bool = False) -> "Way":
        return Way(self, batch_size, context or self.workload.max_context, on_disk, on_device)

    def ways(self, batch_size: int, context: int | None = None) -> list["Way"]:
        """A way for each place where the KV cache may be, in the order in which they are tried."""
        budgets = self.budgets
        has_room = budgets.has_device and not budgets.is_hybrid
        if budgets.kv == "gpu" and not has_room:
            raise ConfigError("kv gpu: no device computes while sequences decode; use auto, cpu or disk")
        places = ("gpu", "cpu", "disk") if has_room else ("cpu", "disk")
        if budgets.kv == "host":
            places = places[-2:]
        asked = places if budgets.kv in ("auto", "host") else (budgets.kv,)
        return [self.way(batch_size, place == "disk", context, place == "gpu") for place in asked]

    @property
    def expert_choices(self) -> tuple[ExpertShape | None, ...]:
        """The experts that may be read on demand; None: layers are read whole."""
        may_choose = self.model.experts is not None and Tier.DISK in self.budgets.tiers
        return (None, self.model.experts) if may_choose else (None,)

    def with_bits(self, bits: Bits) -> "Asked":
        """The same with a KV cache of so many bits."""
        return replace(self, budgets=replace(self.budgets, kv_bits=bits, choose_kv_bits=False))


@dataclass(frozen=True)
class Way(AtOnce):
    """One way to run what is asked for, with its needs as functions of a budget."""

    asked: Asked

    def passes(self, ram: int, experts: ExpertShape | None) -> Passes:
        """How passes run with a budget of `ram`, with `experts` read on demand: as asked for if that leaves a full
        ring. If it does not on the device, hidden states wait in the host's memory, if that makes it full; they cross
        the bus once for each layer, where weights would once for each pass. If that is not enough, and if it is
        possible, a pass is one micro-batch, so that a layer's units need not be in memory together."""
        asked = self.passes_of(ram, self.tokens, experts)
        if asked.may_wait and not self._has_full_device_ring(asked):
            waiting = self.passes_of(ram, self.tokens, experts, waits=True)
            if self._has_full_rings(waiting, ram):
                return waiting
            if not self._fits_on_device(asked):
                asked = waiting
        rows = asked.rows
        if (state := self.asked.model.state) is not None and self.batch_size == 1:
            rows = state.grid.cell(rows)
        if not asked.held.layers or not self._may_take_more_passes(rows, self.cache(ram)):
            return asked
        return asked if self._has_full_rings(asked, ram) else self.passes_of(ram, rows, experts)

    def _has_full_rings(self, passes: Passes, ram: int) -> bool:
        """Whether a layer, or what of it is not resident, and the unit after it have room in every ring."""
        try:
            device, placement = self._place(passes, ram)
        except BudgetError:
            return False
        on_device = frozenset[int]() if device is None else device.resident
        if device is not None and not _is_full(passes, device):
            return False
        # Residency never takes a ring below a full one.
        if placement.resident:
            return True
        return passes.tape.full_ring(passes.host_held, on_device) <= placement.ring_nbytes

    def _has_full_device_ring(self, passes: Passes) -> bool:
        """The same of the device's ring alone."""
        try:
            device = self._place_on_device(passes)
        except DeviceBudgetError:
            return False
        return device is None or _is_full(passes, device)

    def _fits_on_device(self, passes: Passes) -> bool:
        """Whether there is any placement on the device."""
        try:
            self._place_on_device(passes)
        except DeviceBudgetError:
            return False
        return True

    def _may_take_more_passes(self, rows: int, cache: CachePlan) -> bool:
        """Whether passes of one micro-batch of `rows` can do what is asked for."""
        asked, workload = self.asked, self.asked.workload
        can_wait = workload.max_batched_tokens and not workload.one_pass and rows >= self.batch_size
        streams = Tier.DISK in asked.budgets.tiers or asked.budgets.has_device
        return bool(can_wait) and streams and self.is_one_micro_batch(rows, rows, cache)

    def plan_at(self, ram: int, why: str = "") -> Plan:
        """The plan with a budget of `ram`. A BudgetError names one for the needs at `ram`; it may need more itself."""
        plans, refusals = [], []
        for experts in self.asked.expert_choices:
            try:
                plans.append(self._plan_with(experts, ram, why))
            except BudgetError as error:
                refusals.append(error)
        if not plans:
            raise least(refusals)
        return min(plans, key=self._cost)

    def _plan_with(self, experts: ExpertShape | None, ram: int, why: str) -> Plan:
        """The plan that reads `experts` on demand; None: layers whole."""
        passes, budgets = self.passes(ram, experts), self.asked.budgets
        on_device, placement = self._place(passes, ram)
        device = None
        if on_device is not None and passes.device_needs is not None:
            device = DevicePlan(budgets.vram, passes.device_needs, on_device, passes.waiting)
        return Plan(
            budget=ram,
            needs=passes.needs,
            placement=placement,
            tape=passes.tape,
            held=passes.held,
            side_nbytes=self.asked.model.side_nbytes,
            buffers_nbytes=self.asked.model.buffers_nbytes,
            batch_size=self.batch_size,
            max_context=self.context,
            max_batched_tokens=passes.tokens,
            micro_batch_rows=passes.rows,
            gathered_rows=passes.gathered_rows,
            head_rows=passes.head_rows,
            cache=self.cache(ram),
            objective=self.asked.workload.objective,
            why=why,
            experts=self._expert_cache(passes, placement, ram),
            device=device,
            prefill_device=passes.computes[0],
            decode_device=passes.computes[1],
        )

    def _place(self, passes: Passes, ram: int, named: int = 0) -> tuple[Placement | None, Placement]:
        """Where units are: on the device, if there is one, and in the host's memory. Raises BudgetError, which names no
        less than `named`."""
        budgets, device = self.asked.budgets, self._place_on_device(passes)
        return device, fit_units(
            passes.tape,
            passes.needs,
            ram,
            budgets.tiers,
            passes.host_held,
            passes.experts_nbytes,
            frozenset() if device is None else device.resident,
            budgets.resident_cpu,
            named,
        )

    def _place_on_device(self, passes: Passes) -> Placement | None:
        """Raises DeviceBudgetError."""
        if passes.device_needs is None:
            return None
        return fit_on_device(passes.tape, passes.device_needs, self.asked.budgets, passes.device_held)

    def _expert_cache(self, passes: Passes, placement: Placement, ram: int) -> ExpertCachePlan | None:
        """The cache of experts: it gets what dense units leave."""
        experts = passes.experts
        if experts is None:
            return None
        slots = (ram - passes.needs.total - placement.nbytes) // experts.nbytes
        return ExpertCachePlan(min(slots, experts.total), experts.nbytes)

    def plan(self, why: str) -> Plan:
        """The plan within the budgets; a BudgetError names one that is enough in the next process as well, and a
        DeviceBudgetError a `--vram` that is enough. With that, a BudgetError may follow."""
        budgets = self.asked.budgets
        try:
            return self.plan_at(budgets.ram, why)
        except DeviceBudgetError:
            raise self.vram_refusal() from None
        except BudgetError as refused:
            spared = self.within(replace(budgets, baseline=budgets.baseline + BASELINE_VARIES_NBYTES))
            # With a device not from the least: few rows would hold layers in its memory, and be its refusal.
            tried = [max(budgets.ram, refused.smallest_bytes or 0) if budgets.has_device else MIB]

            def plan_at(ram: int) -> Plan:
                tried.append(ram)
                return spared.plan_at(ram)

            try:
                # A larger budget computes more rows at once, which takes more: budgets are tried until one is enough.
                enough = smallest_budget(plan_at, tried[0])
            except DeviceBudgetError:
                # So do more rows take of the device, with as much as the host needs.
                raise spared.within(replace(spared.asked.budgets, ram=tried[-1])).vram_refusal() from None
            experts = None if spared.plan_at(enough).experts is None else self.asked.model.experts
            self._place(spared.passes(enough, experts), budgets.ram, enough)
            raise

    def vram_refusal(self) -> DeviceBudgetError:
        """The refusal of a device's budget that is too little, which names one that is enough."""
        budgets = self.asked.budgets
        enough, experts = min(
            ((self.smallest_vram(experts), experts) for experts in self.asked.expert_choices), key=itemgetter(0)
        )
        # Needs at the budget that is enough: they say what its bytes are for.
        passes = self.within(replace(budgets, vram=enough)).passes(budgets.ram, experts)
        assert passes.device_needs is not None
        return device_refusal(passes.tape, passes.device_needs, budgets, passes.device_held, enough)

    def smallest_vram(self, experts: ExpertShape | None) -> int:
        """The least `--vram`, a whole number of MiB, with which only the host's memory may still be too little, with
        `experts` read on demand.

        A refusal names what is enough for the needs at the refused budget, which grow with it, as `smallest_budget`
        says; that may be more than the least, which is looked for below it.
        """
        ram = self.asked.budgets.ram

        def refusal(count: int) -> DeviceBudgetError | None:
            tried = self.within(replace(self.asked.budgets, vram=count * MIB))
            try:
                tried._place_on_device(tried.passes(ram, experts))
            except DeviceBudgetError as error:
                return error
            return None

        enough = 1
        while (error := refusal(enough)) is not None:
            assert error.smallest_bytes is not None and error.smallest_bytes > enough * MIB, error
            enough = round_up(error.smallest_bytes, MIB) // MIB
        return MIB * (1 + bisect_left(range(1, enough), True, key=lambda count: refusal(count) is None))

    def within(self, budgets: Budgets) -> "Way":
        """The same way with other budgets."""
        return replace(self, asked=replace(self.asked, budgets=budgets))

    def _cost(self, plan: Plan) -> int:
        """Bytes that sequences are expected to read (and copy to a device) from their prompts to their ends, or, where
        the workload does not know how long prompts are, in a pass in which all of them decode. It makes plans
        comparable: those on demand count `_CLEARLY_FEWER` times."""
        workload = self.asked.workload
        prompt, context = workload.mean_prompt, self.context * workload.mean_context / workload.max_context
        is_known = workload.one_pass or prompt < context
        prompts = -(-self.tokens // plan.max_batched_tokens) if is_known else 0
        decoding = round(context - prompt) - 1 if is_known else 1
        nbytes = prompts * self.moved_nbytes(plan, -(-self.tokens // max(prompts, 1)))
        if not workload.one_pass:
            nbytes += decoding * self.moved_nbytes(plan, self.batch_size, is_decode=True)
        return nbytes * (1 if plan.experts is None else _CLEARLY_FEWER)

    def read_nbytes(self, plan: Plan, tokens: int) -> int:
        """Bytes of weights that a pass of `plan` over `tokens` tokens is expected to read."""
        return plan.read_nbytes + expected_expert_nbytes(self.asked.model, plan, tokens)

    def moved_nbytes(self, plan: Plan, tokens: int, is_decode: bool = False) -> int:
        """Bytes of weights that such a pass reads, and of all that it copies to the device, if that computes it."""
        device = plan.decode_device if is_decode else plan.prefill_device
        copied = copied_nbytes(self.asked.model, plan, tokens) if device == "gpu" else 0
        return self.read_nbytes(plan, tokens) + copied

    def decode_nbytes(self, plan: Plan) -> float:
        """Bytes that a pass of `plan` in which all sequences decode moves: weights, and a KV cache that is on disk."""
        nbytes: float = self.moved_nbytes(plan, self.batch_size, is_decode=True)
        if self.on_disk:
            # A recurrent state is read and written in each pass.
            nbytes += 2 * plan.cache.states_nbytes
            nbytes += kv_block_nbytes(plan.cache, self.asked.workload.mean_context * HALFWAY, self.batch_size)
        return nbytes


def least(refusals: Sequence[BudgetError]) -> BudgetError:
    """The refusal with the least budget: of the host's memory, if that is all that one of them lacks."""
    return min(refusals, key=lambda refusal: (isinstance(refusal, DeviceBudgetError), refusal.smallest_bytes or 0))


def expected_expert_nbytes(model: ModelShape, plan: Plan, tokens: int) -> int:
    """Bytes of experts that a pass of `plan` over `tokens` tokens is expected to read on demand.

    Each micro-batch asks for experts of its own. Those that are asked for are in memory as often as any others are:
    routers that prefer some, and texts that go on choosing the same, read less.
    """
    experts = model.experts
    if plan.experts is None or experts is None:
        return 0
    missing = 1 - plan.experts.slots / experts.total
    return int(_chosen(experts, plan, tokens) * missing * experts.file_nbytes)


def expected_bus_nbytes(model: ModelShape, plan: Plan, tokens: int) -> int:
    """Bytes of experts that a pass of `plan` over `tokens` tokens is expected to copy to the device on demand: of all
    that are asked for, as none stays there."""
    experts = model.experts
    return 0 if plan.experts is None or experts is None else int(_chosen(experts, plan, tokens) * experts.nbytes)


def copied_nbytes(model: ModelShape, plan: Plan, tokens: int) -> int:
    """Bytes that a pass of `plan` over `tokens` tokens, which the device computes, is expected to copy to it: weights,
    and hidden states that have waited."""
    return plan.bus_nbytes + expected_bus_nbytes(model, plan, tokens) + plan.waiting_nbytes(tokens)


def _is_full(passes: Passes, device: Placement) -> bool:
    """Whether a device's ring of this placement is full, as it is beside any unit that stays there."""
    return bool(device.resident) or passes.tape.full_ring(passes.held, device.resident) <= device.ring_nbytes


def _chosen(experts: ExpertShape, plan: Plan, tokens: int) -> float:
    """How many experts the micro-batches of such a pass are expected to ask for."""
    rows = min(tokens, plan.micro_batch_rows)
    return experts.layers * experts.distinct(rows) * -(-tokens // rows)
