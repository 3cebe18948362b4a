"""Which of several ways to run is the best, by the seconds that the whole job is predicted to take: the one rule.

In: what is asked for, a predictor, and what is to be compared: numbers of sequences at once, bits and places of the KV
cache. Out: those that fit, each with its plan and prediction, and the best of them. `make.py` asks for a run where the
machine's rates are known, `strategies.py` for each strategy of `tiered plan`.

    cost = seconds(prompts, waves, the last wave as it is) * share

More sequences share each reading of the weights, until computing takes longer than reading. Their KV cache takes memory
that could hold weights, or is read in every pass like them. N sequences that are about equally long take ceil(N / n)
waves, the last of which may be nearly empty. Others make no waves, as each that ends makes room for the next one: there
n of them cost n / N of what as many full waves would. Where latency counts, a sequence has its result after a part of
the job, on average.

A weight that stays takes memory, which costs time when it is touched for the first time. In a job of a few passes that
may be more than reading the weight again takes, so plans with fewer weights in memory are compared, too.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Final

from tiered.errors import BudgetError, ConfigError
from tiered.plan.batch_size import ENOUGH_TOKENS, all_candidates
from tiered.plan.bound import least_seconds, least_share
from tiered.plan.hardware import GpuRates
from tiered.plan.inputs import Budgets, Machine, ModelShape, Tier, Workload
from tiered.plan.kv import Bits, check_bits
from tiered.plan.plan import Plan
from tiered.plan.predict import Prediction, Predictor
from tiered.plan.way import Asked, Way

WORTH_OF_BITS: Final = 1.1
"""Eight bits cost 0.00 % of perplexity, four 0.12 % (docs/benchmarks/quality.md): little, but for nothing too much."""
_WORTH: Final = 1.02
"""So many times quicker a larger batch must be: a smaller gain is within the error of the estimate, and each of its
sequences is finished later."""
_CHOOSABLE: Final = 1.001 * WORTH_OF_BITS * _WORTH
"""So many times the least cost what is chosen may cost: what costs more need not be looked at to its end."""
_DISPLACES: Final = 1.001 * _WORTH / WORTH_OF_BITS
"""So many times the least cost of more bits fewer may cost where they make a difference: those of more bits are chosen
beside any others, and what costs a fiftieth more is not too much for few sequences either."""
_BITS: Final[tuple[Bits, ...]] = (16, 8, 4)
_WORTH_OF_MEMORY: Final = 1.1
"""So many times quicker a job must be with fewer weights in memory than have room: what stays there does not depend on
how fast the disk is by then."""
_GAIN: Final = 1 - 1 / _WORTH_OF_MEMORY
_PARTS: Final = 8
"""By so many steps less stays in memory, from all that has room down to nothing."""
_OTHER: Final = 1.15
_DOUBLED: Final = 1.9
"""Of two numbers of sequences at once the larger is so many times the smaller; with a device twice, about."""
_MOST_SEQUENCES: Final = 512
"""Sequences at once that are considered at most, unless a batch size is asked for."""


@dataclass(frozen=True)
class Option:
    """One way to run that fits."""

    plan: Plan
    prediction: Prediction
    """Of as many full waves as there are, where sequences make none."""
    cost: float
    """Seconds of the whole job, or, where latency counts, those after which a sequence is finished, on average."""
    is_resident: bool
    """All weights stay in the memory of what computes."""


def batches(workload: Workload, has_device: bool = False) -> list[int]:
    """Numbers of sequences at once to compare, in ascending order; with a device, whose plans take longer to make, only
    each about twice the one before."""
    if workload.batch_size is not None:
        return [min(workload.batch_size, workload.sequences)]
    if not workload.choose_batch_size:
        return [workload.sequences]
    most = _MOST_SEQUENCES
    if workload.one_pass:
        most = max(1, ENOUGH_TOKENS // workload.max_context)
    return _sparse(all_candidates(workload.sequences, most), _DOUBLED if has_device else _OTHER)


def bits_of(model: ModelShape, budgets: Budgets) -> list[Bits]:
    """Bits of the KV cache to compare."""
    if not budgets.choose_kv_bits:
        return [budgets.kv_bits]
    found = []
    for bits in _BITS:
        try:
            for group in model.groups:
                check_bits(group.shape, bits)
        except ConfigError:
            continue
        found.append(bits)
    return found


def options(asked: Asked, predictor: Predictor) -> list[Option]:
    """Every way that fits, but for those that `best` could not choose beside others, of all or of those that hold all
    weights in memory. Most of these are left out before a plan is made, as what they take at least is known.

    Bits between the most and the fewest are looked at only where the fewest are worth it.
    """
    most, *others = bits_of(asked.model, asked.budgets) or [asked.budgets.kv_bits]
    least, found = _Least(), list[Option]()
    _add_options(asked.with_bits(most), predictor, least, found)
    least.bits_must_displace()
    for bits in reversed(others):
        _add_options(asked.with_bits(bits), predictor, least, found)
        if found and best(found).plan.cache.bits == most:
            break
        least.bits_may_be_chosen()
    return found


def _add_options(asked: Asked, predictor: Predictor, least: "_Least", found: list[Option]) -> None:
    """Add those of one number of bits to what was found."""
    jobs = {batch: _job(asked.workload, batch) for batch in batches(asked.workload, asked.budgets.has_device)}
    bounds = []
    for batch, (job, share) in jobs.items():
        ways = [(share * least_seconds(way, job, predictor.gpu), way) for way in asked.ways(batch)]
        bounds.append((min(bound for bound, _ in ways), batch, ways))
    # The most promising ones first.
    for _, batch, ways in sorted(bounds, key=itemgetter(0, 1)):
        job, share = jobs[batch]
        for bound, way in ways:
            if max(bound, least.of_more_bits(way, predictor.gpu)) > least.choosable(_may_be_resident(way)):
                continue
            try:
                plan = way.plan_at(asked.budgets.ram)
            except BudgetError:
                continue
            is_resident = _is_resident(plan, asked.model)
            cost = least.choosable(is_resident)
            taking = _taking_seconds(asked, plan)
            prediction = predictor.predict(plan, job, cost / share + taking)
            if prediction is not None:
                cost = prediction.seconds * share
                found.append(Option(plan, prediction, cost, is_resident))
                least.note(found[-1])
                if _most_gained(plan, prediction, taking, asked.machine) > _GAIN * prediction.seconds:
                    for option in _holding_less(way, found[-1], job, share, predictor):
                        cost = min(cost, option.cost)
                        found.append(option)
                        least.note(option)
            least.keep(way, plan, cost)
            is_all_there = not plan.read_nbytes and not plan.reads(asked.model.experts)
            if is_all_there and not (way.on_device and plan.bus_nbytes):
                break  # elsewhere the cache would leave no more room for weights, and only be slower


def may_hold_less(asked: Asked) -> bool:
    """Whether fewer weights may stay in memory than have room: nothing else will use them, nobody has asked for
    others, and what taking memory for them costs is known. Where a device computes, its copies want that memory."""
    budgets, machine = asked.budgets, asked.machine
    is_free = budgets.resident_cpu is None and Tier.DISK in budgets.tiers and not budgets.has_device
    is_known = machine.kept_bytes_per_second is not None or machine.touch_bytes_per_second is not None
    return asked.workload.is_whole and is_free and is_known


def _taking_seconds(asked: Asked, plan: Plan) -> float:
    """Seconds by which the first pass takes longer, as the units that then stay take memory; 0 where nothing is to be
    chosen."""
    rate = asked.machine.disk_bytes_per_second
    if plan.experts is not None or rate is None or not may_hold_less(asked):
        return 0.0
    nbytes = plan.resident_file_nbytes
    return nbytes / asked.machine.kept_rate(is_touched=False) - nbytes / rate


def _most_gained(plan: Plan, found: Prediction, taking: float, machine: Machine) -> float:
    """Seconds that a job of `plan`, for which `found` was predicted, could gain at most where less stays in memory, and
    taking memory for all of it costs `taking` seconds.

    As much as the disk has time for beside what takes longer is read again for nothing. Each further byte gains what
    taking memory for it costs, and is read in every pass but the first.
    """
    rate = machine.disk_bytes_per_second
    nbytes = plan.resident_file_nbytes
    assert rate is not None
    if not taking or not nbytes:
        return 0.0
    later = max(1, found.prefill.passes + found.decode.passes - 1)
    spare = sum(max(0.0, phase.seconds - phase.disk_seconds) for phase in (found.prefill, found.decode))
    free = min(nbytes, rate * spare / later)
    return taking * free / nbytes + max(0.0, taking / nbytes - later / rate) * (nbytes - free)


def _holding_less(way: Way, most: Option, job: Workload, share: float, predictor: Predictor) -> Iterator[Option]:
    """Options with fewer units in memory than `most`, as long as each takes no longer than the one before: what a pass
    takes is the longest of sums of its parts, so no later one would be the quickest. Only where all stay, and there is
    no ring, that says nothing of the first of them."""
    nbytes, cost, worth = most.plan.placement.resident_nbytes, math.inf, most.cost / _WORTH_OF_MEMORY
    for part in reversed(range(_PARTS)):
        budgets = replace(way.asked.budgets, resident_cpu=nbytes * part // _PARTS)
        try:
            plan = way.within(budgets).plan_at(budgets.ram)
        except BudgetError:
            continue  # a ring takes what is left
        if plan.experts is not None:
            continue  # they would take the memory that is to stay free
        prediction = predictor.predict(plan, job, cost / share)
        if prediction is None:
            return
        cost = prediction.seconds * share
        if cost <= worth:
            plan = replace(plan, placement=replace(plan.placement, is_wished=False), holds_less=True)
            yield Option(plan, prediction, cost, is_resident=False)


class _Least:
    """The least costs so far, of all options (False) and of those that hold all weights in memory (True)."""

    def __init__(self) -> None:
        self._costs = {False: math.inf, True: math.inf}
        self._displaced = dict(self._costs)
        """Those of options that others must displace to be chosen."""
        self._kept: dict[tuple[int, bool, bool], tuple[Plan, float]] = {}
        """Plans with the most bits, by batch size and place, and what they cost at least."""

    def note(self, option: Option) -> None:
        """Another one was found."""
        for each in (False, option.is_resident):
            self._costs[each] = min(self._costs[each], option.cost)

    def bits_must_displace(self) -> None:
        """Those that follow have fewer bits, and are chosen only instead of all so far."""
        self._displaced = dict(self._costs)

    def bits_may_be_chosen(self) -> None:
        """Those that follow have more bits than the last ones, which are worth it."""
        self._displaced = {False: math.inf, True: math.inf}

    def keep(self, way: Way, plan: Plan, cost: float) -> None:
        """`plan` of `way` costs so much at least; only that with the most bits is kept."""
        self._kept.setdefault((way.batch_size, way.on_disk, way.on_device), (plan, cost))

    def of_more_bits(self, way: Way, gpu: GpuRates | None) -> float:
        """What `way` costs at least by what it costs with more bits; 0 where that is not known."""
        kept = self._kept.get((way.batch_size, way.on_disk, way.on_device))
        if kept is None or kept[0].cache.bits <= way.asked.budgets.kv_bits:
            return 0.0
        return kept[1] * least_share(kept[0], way, gpu)

    def choosable(self, is_resident: bool) -> float:
        """What an option may cost that `best` might choose, or by which it might choose another one."""
        return min(_CHOOSABLE * self._costs[is_resident], _DISPLACES * self._displaced[is_resident])


def best(found: Sequence[Option]) -> Option:
    """That of most bits, then of fewest sequences, which costs little more than the least; of equal ones the first."""
    most = min(option.cost for option in found) * WORTH_OF_BITS
    bits = max(option.plan.cache.bits for option in found if option.cost <= most)
    same = [option for option in found if option.plan.cache.bits == bits]
    # Both together cost no more than bits alone may.
    most = min(most, min(option.cost for option in same) * _WORTH)
    return min((option for option in same if option.cost <= most), key=lambda option: option.plan.batch_size)


def _sparse(counts: Sequence[int], ratio: float) -> list[int]:
    """The last of them, and so on down to the first, without those of which the next one is hardly more."""
    kept = [counts[-1]]
    for count in reversed(counts):
        if count * ratio <= kept[-1]:
            kept.append(count)
    return sorted({counts[0], *kept})


def _job(workload: Workload, batch: int) -> tuple[Workload, float]:
    """What is predicted for so many sequences at once, and the share of its seconds that counts."""
    full = -(-workload.sequences // batch)
    waves, of_job = float(full), 1.0
    if not workload.runs_in_waves:
        waves, of_job = workload.sequences / batch, workload.sequences / (full * batch)
        each = {"tokens": workload.mean_context, "prompt_tokens": workload.mean_prompt}
        of_all = {name: round(full * batch * tokens) for name, tokens in each.items()}
        workload = replace(workload, sequences=full * batch, **of_all)  # type: ignore[arg-type]
    return workload, of_job * share_that_counts(workload, waves)


def share_that_counts(workload: Workload, waves: float) -> float:
    """Of a job's seconds: all where throughput counts, and where nothing is given out before all is done; else those
    after which a sequence is finished, on average."""
    return 1.0 if workload.objective == "throughput" or workload.one_pass else (waves + 1) / (2 * waves)


def _may_be_resident(way: Way) -> bool:
    """Whether all weights might stay in the memory of what computes."""
    budgets = way.asked.budgets
    room = budgets.vram if budgets.has_device else budgets.ram - budgets.baseline
    return way.asked.model.tape.total <= room


def _is_resident(plan: Plan, model: ModelShape) -> bool:
    if plan.experts is not None:
        return False
    if plan.device is None:
        return not plan.placement.ring_nbytes
    return plan.device.placement.resident_nbytes == model.tape.total
