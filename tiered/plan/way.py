"""One way to run what is asked for: batch size, context and KV tier are given, and the plan follows for any budget.

In: the four inputs of a plan. Out: plans, or refusals that name the smallest budget that works. `make.py` compares
ways.

A mixture of experts has two kinds of plans, and a way takes the better one. Layers are read whole, experts and all,
ahead of the computation; or dense units are, and a layer's experts are read when its router has chosen them, into a
cache. Then memory goes to dense units first: one saves its bytes in every pass, an expert only in those that choose it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from tiered.errors import BudgetError
from tiered.plan.batch_size import BatchOption, candidates
from tiered.plan.budget import BASELINE_VARIES_NBYTES
from tiered.plan.cost import kv_block_nbytes
from tiered.plan.inputs import Budgets, ExpertShape, Machine, ModelShape, Tier, Workload
from tiered.plan.kv import CachePlan, block_nbytes
from tiered.plan.placement import Held, Placement, Tape, full_ring, place
from tiered.plan.plan import ExpertCachePlan, Needs, Plan, fit_units, smallest_budget
from tiered.plan.workspace import MAX_ROWS, Workspace, workspace_for
from tiered.units import MIB, PAGE, PAGE_TOKENS

_MOST_SEQUENCES: Final = 512
"""Sequences at once that are considered at most, unless a batch size is asked for."""
_LENT_SHARE: Final = 1 / 64
"""Part of the budget for the pages of a group of micro-batches, with the cache on disk; memory for four groups is set
aside."""
HALFWAY: Final = 0.75
"""Tokens that a sequence holds on average while it runs, as a share of those that it holds at its end."""
_AHEAD_PER_ROW: Final = 4 * MIB
_MOST_AHEAD: Final = 64 * MIB
"""The ring beyond a full one, by the rows of a decode pass but one. A single row computes in a third of the time in
which its weights are read, and what the ring takes is read once more in each pass. 16 rows compute nearly as long as
the disk reads: with them 64 MiB made passes 8 % shorter (docs/benchmarks/throughput.md)."""
_CLEARLY_FEWER: Final = 2
"""Experts are read on demand where that reads so many times fewer bytes per pass than whole layers do. With R seconds
of reading and C of computing, a pass over whole layers takes max(R, C), as both go on at once. Experts are waited for:
R' + C at most. With R' = R / 2 that is less wherever computing takes less than half as long as reading."""


@dataclass(frozen=True)
class Asked:
    """The four inputs."""

    model: ModelShape
    machine: Machine
    workload: Workload
    budgets: Budgets

    def way(self, batch_size: int, on_disk: bool, context: int | None = None) -> "Way":
        return Way(self, batch_size, context or self.workload.max_context, on_disk)

    @property
    def kv_tiers(self) -> tuple[bool, ...]:
        """Whether the KV cache is on disk, in the order in which that is tried."""
        return {"cpu": (False,), "disk": (True,), "auto": (False, True)}[self.budgets.kv]

    @property
    def expert_choices(self) -> tuple[ExpertShape | None, ...]:
        """The experts that may be read on demand; None: layers are read whole."""
        may_choose = self.model.experts is not None and Tier.DISK in self.budgets.tiers
        return (None, self.model.experts) if may_choose else (None,)

    def each_way(self) -> Iterator[tuple["Way", Plan]]:
        """Every way that fits, with its plan: each batch size to compare, with the cache in memory and on disk."""
        for count in candidates(min(self.workload.sequences, _MOST_SEQUENCES)):
            for on_disk in self.kv_tiers:
                way = self.way(count, on_disk)
                try:
                    yield way, way.plan_at(self.budgets.ram)
                except BudgetError:
                    continue


@dataclass(frozen=True)
class Way:
    """One way to run what is asked for, with its needs as functions of a budget."""

    asked: Asked
    batch_size: int
    context: int
    on_disk: bool

    @property
    def tokens(self) -> int:
        """Tokens in flight at most, if prompts take as few passes as asked for."""
        return self.asked.workload.tokens_in_flight(self.batch_size, self.context)

    @property
    def _pages(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.context // PAGE_TOKENS)

    def cache(self, ram: int) -> CachePlan:
        """The KV cache's pages and memory."""
        model, workload, budgets = self.asked.model, self.asked.workload, self.asked.budgets
        lent_pages = 0
        if self.on_disk:
            # At least the pages of one sequence; more at a time make longer reads and fuller micro-batches.
            share = int(ram * _LENT_SHARE) // block_nbytes(model.kv, budgets.kv_bits)
            lent_pages = max(self._pages, min(self.batch_size * self._pages, share))
        return CachePlan(
            model.kv,
            budgets.kv_bits,
            self.on_disk,
            model.groups,
            sequences=self.batch_size,
            context=self.context,
            tokens=workload.kv_tokens(self.batch_size, self.context),
            tokens_at_once=min(budgets.micro_batch or MAX_ROWS, self.tokens),
            one_pass=workload.one_pass,
            lent_pages=lent_pages,
        )

    def passes(self, ram: int, experts: ExpertShape | None) -> "Passes":
        """How passes run with a budget of `ram`, with `experts` read on demand: as asked for if that leaves a full
        ring. If it does not, and if that is possible, a pass is one micro-batch, so that a layer's units need not be
        in memory together."""
        asked = self._passes_of(ram, self.tokens, experts)
        rows = asked.workspace.rows
        if not asked.held.layers or not self._may_take_more_passes(rows, self.cache(ram)):
            return asked
        placement = place(asked.tape, ram - asked.needs.total - asked.experts_nbytes, asked.held)
        if placement is not None:
            full = full_ring(asked.tape.streamed(asked.held, placement.resident))
            if full <= placement.ring_nbytes:
                return asked
        return self._passes_of(ram, rows, experts)

    def _passes_of(self, ram: int, tokens: int, experts: ExpertShape | None) -> "Passes":
        """Passes of at most `tokens` tokens, with `experts` read on demand."""
        asked, model, workload = self.asked, self.asked.model, self.asked.workload
        logits = min(self.batch_size * self.context, tokens) if workload.all_logits else 0
        workspace = workspace_for(
            model,
            asked.machine.scratch_nbytes,
            tokens,
            self.batch_size,
            self.context,
            ram,
            logits=logits,
            most_rows=asked.budgets.micro_batch or MAX_ROWS,
            waiting=experts.chosen if experts is not None else 0,
        )
        cache = self.cache(ram)
        needs = Needs(
            baseline=asked.budgets.baseline,
            outer=model.tables_nbytes,
            kv=cache.memory_nbytes + 2 * PAGE,
            workspace=workspace.nbytes + cache.scratch_nbytes(workspace.rows),
        )
        # Without a limit on their tokens, passes are the caller's own, who may want logits at any positions.
        is_head_held = not workload.max_batched_tokens or (logits or self.batch_size) > workspace.head_rows
        is_layer_held = not self._is_one_micro_batch(tokens, workspace.rows, cache)
        held = Held(is_layer_held, is_head_held, min((self.batch_size - 1) * _AHEAD_PER_ROW, _MOST_AHEAD))
        return Passes(tokens, workspace, needs, held, model.tape, experts)

    def _is_one_micro_batch(self, tokens: int, rows: int, cache: CachePlan) -> bool:
        """Whether a pass of `tokens` tokens never has more than one micro-batch of `rows`."""
        if tokens > rows or (self.on_disk and cache.lent_pages < self.batch_size * self._pages):
            return False
        # Dense attention takes each prompt by itself, and a page at a time where pages are quantized.
        return not self.asked.model.dense_attention or tokens == 1 or (self.batch_size == 1 and cache.bits == 16)

    def _may_take_more_passes(self, rows: int, cache: CachePlan) -> bool:
        """Whether passes of one micro-batch of `rows` can do what is asked for."""
        asked, workload = self.asked, self.asked.workload
        can_wait = workload.max_batched_tokens and not workload.one_pass and rows >= self.batch_size
        return bool(can_wait) and Tier.DISK in asked.budgets.tiers and self._is_one_micro_batch(rows, rows, cache)

    def plan_at(self, ram: int, why: str = "") -> Plan:
        """The plan with a budget of `ram`. A BudgetError names one for the needs at `ram`; it may need more itself."""
        plans, refusals = [], []
        for experts in self.asked.expert_choices:
            try:
                plans.append(self._plan_with(experts, ram, why))
            except BudgetError as error:
                refusals.append(error)
        if not plans:
            raise min(refusals, key=lambda error: error.smallest_bytes or 0)
        return min(plans, key=self._cost)

    def _plan_with(self, experts: ExpertShape | None, ram: int, why: str) -> Plan:
        """The plan that reads `experts` on demand; None: layers whole."""
        passes = self.passes(ram, experts)
        placement, cache = self._fit(passes, ram)
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
            micro_batch_rows=passes.workspace.rows,
            gathered_rows=passes.workspace.gathered_rows,
            head_rows=passes.workspace.head_rows,
            cache=self.cache(ram),
            objective=self.asked.workload.objective,
            why=why,
            experts=cache,
        )

    def _fit(self, passes: "Passes", ram: int) -> tuple[Placement, ExpertCachePlan | None]:
        """Where units are, and the cache of experts: it gets what dense units leave. Raises BudgetError."""
        least, experts = passes.experts_nbytes, passes.experts
        placement = fit_units(passes.tape, passes.needs, ram, self.asked.budgets.tiers, passes.held, least)
        if experts is None:
            return placement, None
        slots = (ram - passes.needs.total - placement.nbytes) // experts.nbytes
        return placement, ExpertCachePlan(min(slots, experts.total), experts.nbytes)

    def plan(self, why: str) -> Plan:
        """The plan within the budget; a BudgetError names one that is enough in the next process as well."""
        budgets = self.asked.budgets
        try:
            return self.plan_at(budgets.ram, why)
        except BudgetError:
            varied = replace(budgets, baseline=budgets.baseline + BASELINE_VARIES_NBYTES)
            spared = replace(self, asked=replace(self.asked, budgets=varied))
            # A larger budget computes more rows at once, which takes more: so budgets are tried until one is enough.
            enough = smallest_budget(spared.plan_at)
            experts = None if spared.plan_at(enough).experts is None else self.asked.model.experts
            self._fit(spared.passes(enough, experts), budgets.ram)
            raise

    def _cost(self, plan: Plan) -> int:
        """Bytes that sequences are expected to read from their prompts to their ends, or, where the workload does not
        know how long prompts are, in a pass in which all of them decode. It makes plans comparable: those on demand
        count `_CLEARLY_FEWER` times."""
        workload = self.asked.workload
        is_known = workload.one_pass or 0 < workload.max_prompt < self.context
        prompts = -(-self.tokens // plan.max_batched_tokens) if is_known else 0
        decoding = self.context - workload.max_prompt - 1 if is_known else 1
        nbytes = prompts * self.read_nbytes(plan, -(-self.tokens // max(prompts, 1)))
        if not workload.one_pass:
            nbytes += decoding * self.read_nbytes(plan, self.batch_size)
        return nbytes * (1 if plan.experts is None else _CLEARLY_FEWER)

    def read_nbytes(self, plan: Plan, tokens: int) -> int:
        """Bytes of weights that a pass of `plan` over `tokens` tokens is expected to read."""
        return plan.read_nbytes + expected_expert_nbytes(self.asked.model, plan, tokens)

    def option(self, plan: Plan) -> BatchOption:
        """This way, with the bytes that a pass of `plan` reads from disk."""
        kv = 0
        if self.on_disk:
            kv = int(kv_block_nbytes(plan.cache, self.batch_size * self.asked.workload.mean_context * HALFWAY))
        experts = expected_expert_nbytes(self.asked.model, plan, self.batch_size)
        return BatchOption(self.batch_size, self.on_disk, plan.read_nbytes + kv + experts, experts)


@dataclass(frozen=True)
class Passes:
    """How passes run."""

    tokens: int
    """Tokens of a pass, at most."""
    workspace: Workspace
    needs: Needs
    held: Held
    whole: Tape
    """The tape of whole layers."""
    experts: ExpertShape | None
    """Those that are read on demand."""

    @property
    def tape(self) -> Tape:
        """What is read ahead."""
        return self.whole if self.experts is None else self.experts.dense

    @property
    def experts_nbytes(self) -> int:
        """Bytes of the least cache of experts: it holds those that one token chooses."""
        return 0 if self.experts is None else self.experts.chosen * self.experts.nbytes


def expected_expert_nbytes(model: ModelShape, plan: Plan, tokens: int) -> int:
    """Bytes of experts that a pass of `plan` over `tokens` tokens is expected to read on demand.

    Each micro-batch asks for experts of its own. Those that are asked for are in memory as often as any others are:
    routers that prefer some, and texts that go on choosing the same, read less.
    """
    experts = model.experts
    if plan.experts is None or experts is None:
        return 0
    rows = min(tokens, plan.micro_batch_rows)
    asked = experts.layers * experts.distinct(rows) * -(-tokens // rows)
    return int(asked * (1 - plan.experts.slots / experts.total) * experts.file_nbytes)
