"""From the four inputs to the plan: which batch size, context and KV tier, how many rows, what is resident.

`make_plan` is the one place where this is decided; it raises BudgetError where nothing fits, naming the smallest
budget that works. `rates_wanted` says beforehand what would have to be measured for the choice of a batch size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal

from tiered.errors import BudgetError
from tiered.plan.batch_size import BatchChoice, BatchOption, candidates, choose_batch_size, choose_windows_per_pass
from tiered.plan.budget import BASELINE_VARIES_NBYTES
from tiered.plan.inputs import Budgets, Machine, ModelShape, Tier, Workload
from tiered.plan.kv import CachePlan, block_nbytes
from tiered.plan.pace import Pace
from tiered.plan.placement import Held, full_ring, place
from tiered.plan.plan import Needs, Plan, fit_units, smallest_budget
from tiered.plan.workspace import MAX_ROWS, Workspace, workspace_for
from tiered.units import MIB, PAGE, PAGE_TOKENS, format_rate, format_seconds, format_size

Rate = Literal["disk", "compute"]

_MOST_SEQUENCES: Final = 512
"""Sequences at once that are considered at most, unless a batch size is asked for."""
_LENT_SHARE: Final = 1 / 64
"""Part of the budget for the pages of one unit, with the cache on disk; memory for four units is set aside."""
_MODEST_KV_SHARE: Final = 1 / 8
"""Part of the budget that the KV cache may take where the context is chosen by the budget."""
_MEASURING_NBYTES: Final = 96 * MIB
"""By how much measuring disk and processor may raise the process's peak, which counts."""
_HALFWAY: Final = 0.75
"""Tokens that a sequence holds on average while it runs, as a share of those that it holds at its end."""


def make_plan(model: ModelShape, machine: Machine, workload: Workload, budgets: Budgets) -> Plan:
    """The plan for `workload` within `budgets`. Raises BudgetError where there is none."""
    asked = _Asked(model, machine, workload, budgets)
    if workload.batch_size is not None:
        return _plan_for(asked, min(workload.batch_size, workload.sequences), "as asked for")
    if not workload.choose_batch_size:
        return _plan_for(asked, workload.sequences, "all there are")
    if workload.one_pass:
        return _plan_for(asked, _windows_per_pass(asked), "for the fewest bytes to read")
    return _most_throughput(asked)


def pace_for(model: ModelShape, machine: Machine, workload: Workload) -> Pace:
    """The pace of prompts beside decoding; until it has seen passes it goes by the machine's rates, if measured."""
    if machine.linear is None:
        return Pace()
    return Pace(partial(_compute_seconds, model, machine, workload))


def smallest_ram(model: ModelShape, machine: Machine, workload: Workload, budgets: Budgets) -> int:
    """The least budget in bytes, a whole number of MiB, in which all of `workload` runs at once with this baseline."""
    asked = _Asked(model, machine, workload, budgets)
    way = asked.way(workload.sequences, asked.kv_tiers[0])
    return smallest_budget(way.plan_at)


def rates_wanted(model: ModelShape, machine: Machine, workload: Workload, budgets: Budgets) -> frozenset[Rate]:
    """What to measure before `make_plan` can compare batch sizes. Nothing if none is to be chosen, or if measuring
    would take so much memory that no plan would fit afterwards."""
    if workload.batch_size is not None or not workload.choose_batch_size or workload.one_pass:
        return frozenset()
    found = list(_Asked(model, machine, workload, budgets).each_way())
    grown = replace(budgets, baseline=budgets.baseline + _MEASURING_NBYTES)
    if next(_Asked(model, machine, workload, grown).each_way(), None) is None:
        return frozenset()
    reads = any(way.option(plan).disk_nbytes for way, plan in found)
    return frozenset(("disk", "compute")) if reads else frozenset(("compute",))


@dataclass(frozen=True)
class _Asked:
    """The four inputs."""

    model: ModelShape
    machine: Machine
    workload: Workload
    budgets: Budgets

    def way(self, batch_size: int, on_disk: bool, context: int | None = None) -> "_Way":
        return _Way(self, batch_size, context or self.workload.max_context, on_disk)

    @property
    def kv_tiers(self) -> tuple[bool, ...]:
        """Whether the KV cache is on disk, in the order in which that is tried."""
        return {"cpu": (False,), "disk": (True,), "auto": (False, True)}[self.budgets.kv]

    def each_way(self) -> Iterator[tuple["_Way", Plan]]:
        """Every way that fits, with its plan: each batch size to compare, with the cache in memory and on disk."""
        for count in candidates(min(self.workload.sequences, _MOST_SEQUENCES)):
            for on_disk in self.kv_tiers:
                way = self.way(count, on_disk)
                try:
                    yield way, way.plan_at(self.budgets.ram)
                except BudgetError:
                    continue


@dataclass(frozen=True)
class _Way:
    """One way to run what is asked for, with its needs as functions of a budget."""

    asked: _Asked
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

    def passes(self, ram: int) -> "_Passes":
        """How passes run with a budget of `ram`: as asked for if that leaves a full ring. If it does not, and if that
        is possible, a pass is one micro-batch, so that a layer's units need not be in memory together."""
        asked = self._passes_of(ram, self.tokens)
        rows = asked.workspace.rows
        if not asked.held.layers or not self._may_take_more_passes(rows, self.cache(ram)):
            return asked
        tape = self.asked.model.tape
        placement = place(tape, ram - asked.needs.total, asked.held)
        if placement is not None:
            full = full_ring(tape.streamed(asked.held, placement.resident))
            if full <= placement.ring_nbytes:
                return asked
        return self._passes_of(ram, rows)

    def _passes_of(self, ram: int, tokens: int) -> "_Passes":
        """Passes of at most `tokens` tokens."""
        asked, model, workload = self.asked, self.asked.model, self.asked.workload
        logits = self.batch_size * self.context if workload.all_logits else 0
        workspace = workspace_for(
            model,
            asked.machine.scratch_nbytes,
            tokens,
            self.batch_size,
            self.context,
            ram,
            logits=logits,
            most_rows=asked.budgets.micro_batch or MAX_ROWS,
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
        is_layer_held = model.whole_layers or not self._is_one_micro_batch(tokens, workspace.rows, cache)
        return _Passes(tokens, workspace, needs, Held(is_layer_held, is_head_held))

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
        is_useful = Tier.DISK in asked.budgets.tiers and not asked.model.whole_layers
        return bool(can_wait) and is_useful and self._is_one_micro_batch(rows, rows, cache)

    def plan_at(self, ram: int, why: str = "") -> Plan:
        """The plan with a budget of `ram`. A BudgetError names one for the needs at `ram`; it may need more itself."""
        model, passes = self.asked.model, self.passes(ram)
        return Plan(
            budget=ram,
            needs=passes.needs,
            placement=fit_units(model.tape, passes.needs, ram, self.asked.budgets.tiers, passes.held),
            tape=model.tape,
            held=passes.held,
            side_nbytes=model.side_nbytes,
            batch_size=self.batch_size,
            max_context=self.context,
            max_batched_tokens=passes.tokens,
            micro_batch_rows=passes.workspace.rows,
            gathered_rows=passes.workspace.gathered_rows,
            head_rows=passes.workspace.head_rows,
            cache=self.cache(ram),
            objective=self.asked.workload.objective,
            why=why,
        )

    def plan(self, why: str) -> Plan:
        """The plan within the budget; a BudgetError names one that is enough in the next process as well."""
        budgets = self.asked.budgets
        try:
            return self.plan_at(budgets.ram, why)
        except BudgetError:
            varied = replace(budgets, baseline=budgets.baseline + BASELINE_VARIES_NBYTES)
            spared = replace(self, asked=replace(self.asked, budgets=varied))
            # A larger budget computes more rows at once, which takes more: so budgets are tried until one is enough.
            passes = spared.passes(smallest_budget(spared.plan_at))
            fit_units(self.asked.model.tape, passes.needs, budgets.ram, budgets.tiers, passes.held)
            raise

    def option(self, plan: Plan) -> BatchOption:
        """This way, with the bytes that a pass of `plan` reads from disk."""
        kv = 0
        if self.on_disk:
            pages = self.batch_size * self.asked.workload.mean_context / PAGE_TOKENS
            kv = int(pages * plan.cache.block_nbytes * self.asked.model.kv.layers * _HALFWAY)
        return BatchOption(self.batch_size, self.on_disk, plan.read_nbytes + kv)


@dataclass(frozen=True)
class _Passes:
    """How passes run."""

    tokens: int
    """Tokens of a pass, at most."""
    workspace: Workspace
    needs: Needs
    held: Held


def _plan_for(asked: _Asked, batch_size: int, why: str) -> Plan:
    """The plan with the longest context that fits, with the KV cache in the first tier where it fits."""
    per_token = asked.model.kv.nbytes(batch_size, 1)
    why = f"{batch_size} of {asked.workload.sequences} sequences at once, {why}"
    contexts = list(asked.workload.contexts(int(asked.budgets.ram * _MODEST_KV_SHARE) // per_token))
    for context in contexts:
        refusals = []
        for on_disk in asked.kv_tiers:
            try:
                return asked.way(batch_size, on_disk, context).plan(why)
            except BudgetError as error:
                refusals.append(error)
    # The one for the shortest context, so that the budget it names is accepted, and for the first tier, because the
    # other one was refused too: more than the cache does not fit.
    refusal = refusals[0]
    if len(contexts) == 1:
        raise refusal
    raise BudgetError(f"{refusal}, for a context of {contexts[-1]} tokens", refusal.smallest_bytes)


def _windows_per_pass(asked: _Asked) -> int:
    """How many sequences that are only scored run per pass. With the KV tier "auto" only memory is considered here: the
    disk is used only if nothing else fits, and then several sequences would share the memory that one has."""
    on_disk = asked.budgets.kv == "disk"

    def read_nbytes(count: int) -> int | None:
        try:
            return asked.way(count, on_disk).plan_at(asked.budgets.ram).streamed_nbytes
        except BudgetError:
            return None

    return choose_windows_per_pass(read_nbytes, asked.workload.sequences, asked.workload.max_context)


def _most_throughput(asked: _Asked) -> Plan:
    """The batch size and KV tier with most tokens per second, by the machine's rates; without rates the largest."""
    found = {way.option(plan): plan for way, plan in asked.each_way()}
    if not found:
        return _plan_for(asked, 1, "as nothing fits")
    machine = asked.machine
    if machine.linear is None:
        option = max(found, key=lambda option: (option.sequences, not option.kv_on_disk))
        return _reasoned(asked, found[option], "as fit")
    seconds = partial(_compute_seconds, asked.model, machine, asked.workload)
    choice = choose_batch_size(found, machine.disk_bytes_per_second, seconds)
    assert choice is not None
    return _reasoned(asked, found[choice.option], _expected(choice, machine.disk_bytes_per_second))


def _compute_seconds(model: ModelShape, machine: Machine, workload: Workload, count: int) -> float:
    """Seconds that a pass over `count` decoding sequences computes."""
    assert machine.linear is not None
    context = workload.mean_context * _HALFWAY
    attention = (machine.attention_seconds or 0.0) * model.kv.layers * context
    return machine.linear.seconds(count, model.weights) + attention * count


def _reasoned(asked: _Asked, plan: Plan, why: str) -> Plan:
    """`plan` with the reason for its batch size."""
    separator = ", " if why == "as fit" else "; "
    place = "on disk" if plan.cache.on_disk else "in memory"
    chosen = f"{plan.batch_size} of {asked.workload.sequences} sequences at once{separator}{why}"
    return replace(plan, why=f"{chosen}; KV cache {format_size(plan.cache.blocks_nbytes)} {place}")


def _expected(choice: BatchChoice, bytes_per_second: float | None) -> str:
    """What a pass is expected to take."""
    disk = ""
    if choice.option.disk_nbytes and bytes_per_second:
        disk = f"disk {format_seconds(choice.disk_seconds)} at {format_rate(bytes_per_second)}, "
    return f"expected per pass: {disk}compute {format_seconds(choice.compute_seconds)}"
