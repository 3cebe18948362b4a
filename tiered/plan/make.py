"""From the four inputs to the plan: which batch size, context and KV tier, how many rows, what is resident.

`make_plan` is the one place where this is decided; it raises BudgetError where nothing fits, naming the smallest
budget that works. `rates_wanted` says beforehand what would have to be measured for the choice of a batch size.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, Literal

from tiered.errors import BudgetError, ConfigError, DeviceBudgetError
from tiered.plan.batch_size import BatchChoice, BatchOption, choose_batch_size, choose_windows_per_pass
from tiered.plan.cost import decode_attention_seconds, decode_computing
from tiered.plan.inputs import Budgets, Machine, ModelShape, Tier, Workload, tiers_text
from tiered.plan.kv import Bits, check_bits
from tiered.plan.pace import Pace
from tiered.plan.plan import Plan, smallest_budget
from tiered.plan.way import HALFWAY, Asked, Way, least
from tiered.plan.workspace import HEAD_ROWS
from tiered.units import MIB, format_rate, format_seconds, format_size

Rate = Literal["disk", "compute", "bus"]

_MODEST_KV_SHARE: Final = 1 / 8
"""Part of the budget that the KV cache may take where the context is chosen by the budget."""
_BITS: Final[tuple[Bits, ...]] = (16, 8, 4)
WORTH_OF_BITS: Final = 1.1
"""Eight bits cost 0.00 % of perplexity, four 0.12 % (docs/benchmarks/quality.md): little, but for nothing too much."""
_MEASURING_NBYTES: Final = 96 * MIB
"""By how much measuring disk and processor may raise the process's peak, which counts."""


def make_plan(model: ModelShape, machine: Machine, workload: Workload, budgets: Budgets) -> Plan:
    """The plan for `workload` within `budgets`. Raises BudgetError where there is none."""
    if budgets.has_device != (Tier.GPU in budgets.tiers):
        raise ConfigError(
            f"--tiers {tiers_text(budgets.tiers)}, --vram {budgets.vram}: a GPU and its memory go together"
        )
    _check_state(model, workload, budgets)
    if budgets.choose_kv_bits:
        return _plan_with_most_bits(Asked(model, machine, workload, budgets))
    asked = Asked(model, machine, workload, budgets)
    if workload.batch_size is not None:
        return _plan_for(asked, min(workload.batch_size, workload.sequences), "as asked for")
    if not workload.choose_batch_size:
        return _plan_for(asked, workload.sequences, "all there are")
    if workload.one_pass:
        return _scoring_plan(asked)
    return _most_throughput(asked)


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


def pace_for(model: ModelShape, machine: Machine, workload: Workload) -> Pace:
    """The pace of prompts beside decoding; until it has seen passes it goes by the machine's rates, if measured."""
    if machine.linear is None:
        return Pace()
    return Pace(partial(_compute_seconds, model, machine, workload))


def expected_pass(model: ModelShape, machine: Machine, workload: Workload, budgets: Budgets) -> BatchChoice:
    """What a decode pass of `make_plan`'s plan is expected to take, by the machine's rates, which must be known.

    Raises BudgetError where there is no plan.
    """
    plan = make_plan(model, machine, workload, budgets)
    option = _way_of(Asked(model, machine, workload, budgets), plan).option(plan)
    seconds = partial(_compute_seconds, model, machine, workload)
    choice = _chosen([option], machine, seconds)
    assert choice is not None
    return choice


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


def rates_wanted(model: ModelShape, machine: Machine, workload: Workload, budgets: Budgets) -> frozenset[Rate]:
    """What to measure before `make_plan` can compare batch sizes. Nothing if none is to be chosen, or if measuring
    would take so much memory that no plan would fit afterwards."""
    if workload.batch_size is not None or not workload.choose_batch_size or workload.one_pass:
        return frozenset()
    found = list(Asked(model, machine, workload, budgets).each_way())
    grown = replace(budgets, baseline=budgets.baseline + _MEASURING_NBYTES)
    if next(Asked(model, machine, workload, grown).each_way(), None) is None:
        return frozenset()
    options = [way.option(plan) for way, plan in found]
    wanted: set[Rate] = {"compute"}
    wanted |= {"disk"} if any(option.disk_nbytes for option in options) else set()
    wanted |= {"bus"} if any(option.bus_nbytes for option in options) else set()
    return frozenset(wanted)


def _way_of(asked: Asked, plan: Plan) -> Way:
    """The way that `plan` is a plan of."""
    asked = replace(asked, budgets=replace(asked.budgets, kv_bits=plan.cache.bits, choose_kv_bits=False))
    return asked.way(plan.batch_size, plan.cache.on_disk, plan.max_context, plan.cache.on_device)


def _plan_with_most_bits(asked: Asked) -> Plan:
    """The plan with the KV cache in as many bits as cost at most `WORTH_OF_BITS` of what the fewest cost: bytes read
    (and copied to a device) per pass and sequence, of weights that the cache leaves no memory for and of the cache
    itself."""
    found: list[tuple[float, Plan]] = []
    refusals = []
    for bits in _BITS:
        budgets = replace(asked.budgets, kv_bits=bits, choose_kv_bits=False)
        try:
            for group in asked.model.groups:
                check_bits(group.shape, bits)
            plan = make_plan(asked.model, asked.machine, asked.workload, budgets)
        except BudgetError as error:
            refusals.append(error)
        except ConfigError:
            continue
        else:
            option = _way_of(asked, plan).option(plan)
            found.append(((option.disk_nbytes + option.bus_nbytes) / plan.batch_size, plan))
    if not found:
        raise least(refusals)
    most = min(cost for cost, _ in found) * WORTH_OF_BITS
    return next(plan for cost, plan in found if cost <= most)


def _plan_for(asked: Asked, batch_size: int, why: str) -> Plan:
    """The plan with the longest context that fits, with the KV cache in the first place where it fits: in memory rather
    than on disk, and on the device unless a pass is expected to be quicker without."""
    per_token = max(1, batch_size * asked.model.kv_token_nbytes)
    why = f"{batch_size} of {asked.workload.sequences} sequences at once, {why}"
    contexts = list(asked.workload.contexts(int(asked.budgets.ram * _MODEST_KV_SHARE) // per_token))
    for context in contexts:
        refusals = []
        found = []
        for way in asked.ways(batch_size, context):
            try:
                found.append((way, way.plan(why)))
            except BudgetError as error:
                refusals.append(error)
            if found and not (found[0][0].on_device and _is_comparable(asked)):
                return found[0][1]
        if found:
            return min(found, key=_pass_seconds)[1]
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


def _is_comparable(asked: Asked) -> bool:
    """Whether the machine's rates tell how long passes take with the KV cache on the device and elsewhere."""
    machine = asked.machine
    return machine.bus_bytes_per_second is not None and machine.attention_seconds is not None


def _pass_seconds(way_and_plan: tuple[Way, Plan]) -> float:
    """What a decode pass takes at least: weights that the KV cache pushes out of the device's memory are copied, and
    read if there is no room in the host's either; attention over a cache that is not on the device is the
    processor's."""
    way, plan = way_and_plan
    asked, option = way.asked, way.option(plan)
    machine, context = asked.machine, asked.workload.mean_context * HALFWAY
    attention = decode_attention_seconds(asked.model, machine, way.batch_size, context)
    disk, bus = machine.disk_bytes_per_second, machine.bus_bytes_per_second
    return max(
        option.disk_nbytes / disk if disk else 0.0,
        option.bus_nbytes / bus if bus else 0.0,
        0.0 if way.on_device else attention,
    )


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


def _most_throughput(asked: Asked) -> Plan:
    """The batch size and KV tier with most tokens per second, by the machine's rates; without rates the largest."""
    found = {way.option(plan): plan for way, plan in asked.each_way()}
    if not found:
        return _plan_for(asked, 1, "as nothing fits")
    machine = asked.machine
    if machine.linear is None:
        option = max(found, key=lambda option: (option.sequences, not option.kv_on_disk, option.kv_on_device))
        return _reasoned(asked, found[option], "as fit")
    seconds = partial(_compute_seconds, asked.model, machine, asked.workload)
    waves_of = asked.workload.sequences if asked.workload.runs_in_waves else None
    choice = _chosen(found, machine, seconds, waves_of)
    assert choice is not None
    return _reasoned(asked, found[choice.option], _expected(choice, machine))


def _chosen(
    options: Iterable[BatchOption],
    machine: Machine,
    compute_seconds: Callable[[int], float],
    sequences: int | None = None,
) -> BatchChoice | None:
    """The option with most tokens per second by the machine's rates, for so many sequences in all, if they make
    waves."""
    disk, bus = machine.disk_bytes_per_second, machine.bus_bytes_per_second
    return choose_batch_size(options, disk, compute_seconds, bus, machine.reading_seconds, sequences)


def _compute_seconds(model: ModelShape, machine: Machine, workload: Workload, count: int) -> float:
    """Seconds that a pass over `count` decoding sequences computes."""
    return decode_computing(model, machine, count, workload.mean_context * HALFWAY, count).seconds


def _reasoned(asked: Asked, plan: Plan, why: str) -> Plan:
    """`plan` with the reason for its batch size."""
    separator = ", " if why == "as fit" else "; "
    place = "on disk" if plan.cache.on_disk else "on the GPU" if plan.cache.on_device else "in memory"
    chosen = f"{plan.batch_size} of {asked.workload.sequences} sequences at once{separator}{why}"
    return replace(plan, why=f"{chosen}; KV cache {format_size(plan.cache.blocks_nbytes)} {place}")


def _expected(choice: BatchChoice, machine: Machine) -> str:
    """What a pass is expected to take."""
    parts = []
    for name, nbytes, seconds, rate in (
        ("disk", choice.option.disk_nbytes, choice.disk_seconds, machine.disk_bytes_per_second),
        ("bus", choice.option.bus_nbytes, choice.bus_seconds, machine.bus_bytes_per_second),
    ):
        if nbytes and rate:
            parts.append(f"{name} {format_seconds(seconds)} at {format_rate(rate)}")
    return f"expected per pass: {', '.join([*parts, f'compute {format_seconds(choice.compute_seconds)}'])}"
