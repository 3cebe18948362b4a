"""What computes prompts and what the rest, where nobody has said and rates are known: the quickest by prediction.

In: budgets for each way to share the work between processor and GPU, and what a plan is made from. Out: the choice, and
why. Pure: same numbers, same choice. Commands ask for it before they open anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tiered.errors import BudgetError
from tiered.plan.choose import share_that_counts
from tiered.plan.hardware import GpuRates
from tiered.plan.inputs import Budgets, Computes, Machine, ModelShape, Workload
from tiered.plan.make import make_plan
from tiered.plan.predict import predict
from tiered.units import format_seconds

Phases = tuple[Computes, Computes]
"""What computes prompts, and what computes the rest."""

PHASES: Final[Mapping[Phases, str]] = {
    ("gpu", "gpu"): "all on the GPU",
    ("gpu", "cpu"): "prompts on the GPU, the rest on the processor",
    ("cpu", "cpu"): "all on the processor",
}
"""The ways to share the work, in words; of two that take as long the first is chosen."""
_WORTH: Final = 1.02
"""So many times quicker a later one must be: predictions are no closer."""


@dataclass(frozen=True)
class PhaseChoice:
    """Who computes what."""

    computes: Phases
    why: str
    """With what it is expected to take, and what the others would."""


def choose_phases(
    budgets: Mapping[Phases, Budgets], model: ModelShape, machine: Machine, workload: Workload, gpu: GpuRates
) -> PhaseChoice | None:
    """The quickest of the phases in `budgets`, by the plans that runs would make within them; None where none fits.

    Rates of `machine` must be known: raises ConfigError where one is not.
    """
    # Where sequences end in the pass in which they begin, nothing decodes.
    asked = [each for each in PHASES if each in budgets and not (workload.one_pass and each == ("gpu", "cpu"))]
    found: dict[Phases, float] = {}
    costs: dict[Phases, float] = {}
    for phases in asked:
        try:
            plan = make_plan(model, machine, workload, budgets[phases], gpu)
        except BudgetError:
            continue
        found[phases] = predict(plan, model, machine, workload, gpu).seconds
        # As the plan itself was chosen.
        costs[phases] = found[phases] * share_that_counts(workload, -(-workload.sequences // plan.batch_size))
    if not found:
        return None
    most = min(costs.values()) * _WORTH
    chosen = next(phases for phases, cost in costs.items() if cost <= most)
    said = [f"{PHASES[chosen]}, which is expected to take {format_seconds(found[chosen])}"]
    for phases in asked:
        if phases != chosen:
            took = format_seconds(found[phases]) if phases in found else "does not fit"
            said.append(f"{PHASES[phases]} {took}")
    return PhaseChoice(chosen, "; ".join(said))
