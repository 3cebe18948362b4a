"""From the four inputs to the plan: which batch size, context and KV tier, how many rows, what is resident.

`make_plan` is the one place where this is decided; it raises BudgetError where nothing fits, naming the smallest
budget that works. Where the machine's rates are known, ways to run are compared by predictions (`choose.py`); where
they are not, by bytes. `wants_rates` says beforehand whether they would be worth measuring.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from tiered.errors import BudgetError, ConfigError, DeviceBudgetError
from tiered.plan.batch_size import choose_windows_per_pass, evened
from tiered.plan.choose import WORTH_OF_BITS, Option, batches, best, bits_of, may_hold_less, options
from tiered.plan.hardware import GpuRates
from tiered.plan.inputs import Budgets, Machine, ModelShape, Tier, Workload, tiers_text
from tiered.plan.plan import HOLDS_LESS, Plan, smallest_budget
from tiered.plan.predict import Predictor, can_predict
from tiered.plan.way import Asked, least
from tiered.plan.workspace import HEAD_ROWS
from tiered.units import MIB, format_size

_MODEST_KV_SHARE: Final = 1 / 8
"""Part of the budget that the KV cache may take where the context is chosen by the budget."""
_MEASURING_NBYTES: Final = 96 * MIB
"""By how much measuring disk and processor may raise the process's peak, which counts."""


def make_plan(
    model: ModelShape, machine: Machine, workload: Workload, budgets: Budgets, gpu: GpuRates | None = None
) -> Plan:
    """The plan for `workload` within `budgets`; `gpu`: rates of the device, if they are known. Raises BudgetError where
    there is none."""
    if budgets.has_device != (Tier.GPU in budgets.tiers):
        raise ConfigError(
            f"--tiers {tiers_text(budgets.tiers)}, --vram {budgets.vram}: a GPU and its memory go together"
        )
    _check_state(model, workload, budgets)
    asked = Asked(model, machine, workload, budgets)
    return _plan_by_prediction(asked, gpu) or _plan_by_bytes(asked)


def _plan_by_prediction(asked: Asked, gpu: GpuRates | None) -> Plan | None:
    """The plan of the shortest job; None where rates are not known, nothing is to be chosen, or nothing fits."""
    workload, budgets = asked.workload, asked.budgets
    if not can_predict(asked.machine, gpu, budgets.has_device) or workload.least_context:
        return None
    ways = asked.ways(workload.sequences)
    if len(batches(workload)) * len(bits_of(asked.model, budgets)) * len(ways) < 2 and not may_hold_less(asked):
        return None
    found = options(asked, Predictor(asked.model, asked.machine, gpu))
    return _reasoned(asked, best(found)) if found else None


def _plan_by_bytes(asked: Asked) -> Plan:
    """The plan where nobody knows how long anything takes."""
    workload = asked.workload
    if asked.budgets.choose_kv_bits:
        return _plan_with_most_bits(asked)
    if workload.batch_size is not None:
        return _plan_for(asked, min(workload.batch_size, workload.sequences), "as asked for")
    if not workload.choose_batch_size:
        return _plan_for(asked, workload.sequences, "all there are")
    if workload.one_pass:
        return _scoring_plan(asked)
    # Somebody waits for all of them.
    counts = sorted({*batches(workload), *([workload.sequences] if workload.objective == "latency" else [])})
    most = next((count for count in reversed(counts) if _fits(asked, count)), 1)
    plan = _plan_for(asked, evened(workload.sequences, most) if workload.runs_in_waves else most, "as fit")
    return replace(plan, why=f"{plan.why}; {_place_of(plan)}")


def _check_state(model: ModelShape, workload: Workload, budgets: Budgets) -> None:
    """Raises ConfigError for what a model with recurrent layers cannot be asked for."""
    if model.state is None:
        return
    cell = model.state.grid.cell(workload.max_prompt or workload.max_context)
    if budgets.micro_batch is not None and budgets.micro_batch < cell:
        raise ConfigError(
            f"--micro-batch {budgets.micro_batch}: this model's recurrent layers compute {cell} tokens of a prompt "
            "together; ask for at least that many"
        )


def smallest_ram(model: ModelShape, machine: Machine, workload: Workload, budgets: Budgets) -> int:
    """The least budget in bytes, a whole number of MiB, in which all of `workload` runs at once with this baseline.

    Raises DeviceBudgetError where the device's memory does not suffice.
    """
    ways = Asked(model, machine, workload, budgets).ways(workload.sequences)
    refusals: list[BudgetError] = []
    for way in ways:
        try:
            return smallest_budget(way.plan_at)
        except DeviceBudgetError:
            # Where the KV cache is elsewhere the device's memory may suffice.
            refusals.append(way.vram_refusal())
    raise least(refusals)


def smallest_vram(model: ModelShape, machine: Machine, workload: Workload, budgets: Budgets) -> int:
    """The least budget of the device's memory, a whole number of MiB, in which all of `workload` runs at once, given
    enough of the host's."""
    asked = Asked(model, machine, workload, budgets)
    ways = asked.ways(workload.sequences)
    return min(way.smallest_vram(experts) for way in ways for experts in asked.expert_choices)


def wants_rates(model: ModelShape, machine: Machine, workload: Workload, budgets: Budgets) -> bool:
    """Whether to measure the machine before `make_plan` chooses a number of sequences at once: if there is one to
    choose, and measuring would not take so much memory that no plan would fit afterwards.

    Scoring goes by bytes instead. Nor does anybody who waits for a text wait for that: where latency counts and all
    sequences have room, all run.
    """
    if len(batches(workload)) < 2 or workload.one_pass:
        return False
    if workload.objective == "latency" and _fits(Asked(model, machine, workload, budgets), workload.sequences):
        return False
    grown = replace(budgets, baseline=budgets.baseline + _MEASURING_NBYTES)
    return _fits(Asked(model, machine, workload, grown), 1)


def _fits(asked: Asked, batch_size: int) -> bool:
    """Whether so many sequences have room at once, wherever their KV cache is."""
    for way in asked.ways(batch_size):
        try:
            way.plan_at(asked.budgets.ram)
        except BudgetError:
            continue
        return True
    return False


def _plan_with_most_bits(asked: Asked) -> Plan:
    """The plan with the KV cache in as many bits as cost at most `WORTH_OF_BITS` of what the fewest cost: bytes read
    (and copied to a device) per pass and sequence, of weights that the cache leaves no memory for and of the cache
    itself."""
    found: list[tuple[float, Plan]] = []
    refusals = []
    for bits in bits_of(asked.model, asked.budgets):
        of_bits = asked.with_bits(bits)
        try:
            plan = _plan_by_bytes(of_bits)
        except BudgetError as error:
            refusals.append(error)
        else:
            way = of_bits.way(plan.batch_size, plan.cache.on_disk, plan.max_context, plan.cache.on_device)
            found.append((way.decode_nbytes(plan) / plan.batch_size, plan))
    if not found:
        raise least(refusals)
    most = min(cost for cost, _ in found) * WORTH_OF_BITS
    return next(plan for cost, plan in found if cost <= most)


def _plan_for(asked: Asked, batch_size: int, why: str) -> Plan:
    """The plan with the longest context that fits, with the KV cache in the first place where it fits: on the device,
    in memory, on disk."""
    per_token = max(1, batch_size * asked.model.kv_token_nbytes)
    why = f"{batch_size} of {asked.workload.sequences} sequences at once, {why}"
    contexts = list(asked.workload.contexts(int(asked.budgets.ram * _MODEST_KV_SHARE) // per_token))
    for context in contexts:
        refusals = []
        for way in asked.ways(batch_size, context):
            try:
                return way.plan(why)
            except BudgetError as error:
                refusals.append(error)
    # The one for the shortest context, so that the budget it names is accepted, and for the first place that is not
    # the device, because that one was refused too: more than the cache does not fit.
    refusal = _refusal(refusals)
    if len(contexts) == 1:
        raise refusal
    raise type(refusal)(f"{refusal}, for a context of {contexts[-1]} tokens", refusal.smallest_bytes)


def _refusal(refusals: Sequence[BudgetError]) -> BudgetError:
    """The one to read of those for all places of the KV cache: the first that lacks the host's memory; else the least
    that lacks the device's."""
    of_host = [refusal for refusal in refusals if not isinstance(refusal, DeviceBudgetError)]
    return of_host[0] if of_host else least(refusals)


def _scoring_plan(asked: Asked) -> Plan:
    """The plan for sequences that are only scored: so many in a pass that the fewest bytes are read.

    Where not even one fits whole, because several micro-batches of it would use a layer or the head, one takes several
    passes of as many tokens as get logits at once. Each pass reads all weights; refusing would score nothing.
    """
    try:
        return _plan_for(asked, _windows_per_pass(asked), "for the fewest bytes to read")
    except BudgetError as refusal:
        state = asked.model.state
        tokens = HEAD_ROWS if state is None else max(HEAD_ROWS, state.grid.cell(asked.workload.max_context))
        workload = replace(asked.workload, one_pass=False, max_batched_tokens=tokens)
        try:
            return _plan_for(replace(asked, workload=workload), 1, "a part of it in a pass, as all of it does not fit")
        except BudgetError as error:
            raise least((refusal, error)) from None


def _windows_per_pass(asked: Asked) -> int:
    """How many sequences that are only scored run per pass. With the KV tier "auto" only the first place is considered
    here: the disk is used only if nothing else fits, and then several sequences would share the memory that one has."""

    def read_nbytes(count: int) -> int | None:
        try:
            way = asked.ways(count)[0]
            plan = way.plan_at(asked.budgets.ram)
            return way.moved_nbytes(plan, plan.max_batched_tokens)
        except BudgetError:
            return None

    return choose_windows_per_pass(read_nbytes, asked.workload.sequences, asked.workload.max_context)


def _reasoned(asked: Asked, option: Option) -> Plan:
    """The plan of `option`, with the reason for it."""
    plan, found = option.plan, option.prediction
    phase = found.decode if found.decode.passes else found.prefill
    why = f"{plan.batch_size} of {asked.workload.sequences} sequences at once; predicted per pass: {phase.of_a_pass}"
    if plan.holds_less:
        held = format_size(plan.placement.resident_nbytes)
        why = f"{why}; {held} of weights stay in memory: {HOLDS_LESS}"
    return replace(plan, why=f"{why}; {_place_of(plan)}")


def _place_of(plan: Plan) -> str:
    place = "on disk" if plan.cache.on_disk else "on the GPU" if plan.cache.on_device else "in memory"
    return f"KV cache {format_size(plan.cache.blocks_nbytes)} {place}"
