"""What fits in which budget: plans for a ladder of budgets. Pure functions.

In: what a plan is made from. Out: one row per budget, from the smallest that works, over doublings, to the one that
holds everything. `tiered inspect` shows them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from tiered.plan.inputs import Budgets, Machine, ModelShape, Tier, Workload
from tiered.plan.make import make_plan, smallest_ram
from tiered.plan.plan import Plan
from tiered.plan.way import expected_bus_nbytes, expected_expert_nbytes
from tiered.units import GIB, MIB, round_up


@dataclass(frozen=True)
class Fit:
    """The plan that one budget gives."""

    plan: Plan
    total_nbytes: int
    """Bytes of all units on disk, those of experts among them, which are fewer than in memory where compressed."""
    resident_nbytes: int
    """Of these, those of resident units, in memory or on the device, and of as many experts as the cache holds."""
    read_nbytes: int
    """Bytes read from disk per pass, once memory is full; where experts are read when they are chosen, an estimate."""
    device_nbytes: int = 0
    """Of the resident bytes, those of units that stay on the device."""
    bus_nbytes: int = 0
    """Bytes copied to the device per pass in which it computes; with experts that are chosen, an estimate."""

    @property
    def resident_share(self) -> float:
        return self.resident_nbytes / self.total_nbytes

    def disk_seconds(self, bytes_per_second: float) -> float:
        """Seconds the disk takes for one pass; the pass itself takes at least that."""
        return self.read_nbytes / bytes_per_second

    def bus_seconds(self, bytes_per_second: float) -> float:
        """Seconds that copies to the device take for one pass; the same holds."""
        return self.bus_nbytes / bytes_per_second


def ladder(smallest: int, everything: int) -> tuple[int, ...]:
    """`smallest`, the powers of two GiB above it, and `everything`."""
    doublings = []
    budget = GIB
    while budget < everything:
        if budget > smallest:
            doublings.append(budget)
        budget *= 2
    return tuple(dict.fromkeys((smallest, *doublings, everything)))


def _holding_all(ram: int, reads_at: Callable[[int], bool], farthest: int) -> int:
    """The least budget in whole MiB, from `ram` to about `farthest`, with which nothing is read; `ram` if there is
    none. Where weights may come from disk, passes may be larger than where all must be in memory, and take more."""
    least, most = ram - MIB, ram
    while reads_at(most):
        least, most = most, most + 2 * (most - least)
        if most > farthest:
            return ram
    while most - least > MIB:
        middle = least + round_up((most - least) // 2, MIB)
        least, most = (middle, most) if reads_at(middle) else (least, middle)
    return most


def fits(model: ModelShape, machine: Machine, workload: Workload, budgets: Budgets) -> tuple[Fit, ...]:
    """One row per budget of the ladder; the budget in `budgets` does not matter, but the device's does.

    Raises DeviceBudgetError where that is too little.
    """
    smallest = smallest_ram(model, machine, workload, budgets)
    total = model.tape.file_total
    loaded = tuple(tier for tier in budgets.tiers if tier is not Tier.DISK)
    everything = max(
        smallest, smallest_ram(model, machine, workload, replace(budgets, tiers=loaded, resident_cpu=None))
    )

    def plan_at(ram: int) -> Plan:
        return make_plan(model, machine, workload, replace(budgets, ram=ram))

    def reads_at(ram: int) -> bool:
        plan = plan_at(ram)
        return plan.read_nbytes > 0 or plan.reads(model.experts)

    if budgets.resident_cpu is None:
        everything = _holding_all(everything, reads_at, everything + 4 * model.tape.total + GIB)
    rows = []
    for ram in ladder(smallest, everything):
        plan = plan_at(ram)
        resident = plan.tape.file_total - plan.read_nbytes
        if plan.experts is not None and model.experts is not None:
            resident += plan.experts.slots * model.experts.file_nbytes
        read = plan.read_nbytes + expected_expert_nbytes(model, plan, plan.batch_size)
        on_device = sum(plan.tape.file_nbytes[unit] for unit in plan.on_device)
        bus = plan.bus_nbytes + (expected_bus_nbytes(model, plan, plan.batch_size) if plan.device else 0)
        rows.append(Fit(plan, total, resident, read, on_device, bus))
    return tuple(rows)
