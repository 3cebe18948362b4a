"""What computes a job: an open runtime, and the report of what it has done."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from tiered.bench.rates import measure_machine
from tiered.cli.batch_options import BatchOptions
from tiered.cli.batch_screen import JobScreen
from tiered.cli.measuring import measured
from tiered.generate import Generation, Objective, Report, Sequence, generate, make_report
from tiered.plan import MAX_BATCHED_TOKENS, Workload
from tiered.runtime import Runtime
from tiered.store import Store


@dataclass(frozen=True)
class Demand:
    """What a job asks for."""

    sequences: int
    longest: int
    """Tokens of the longest one, prompt and completion."""
    tokens: int
    """Of all sequences together."""


class Engine:
    """Runs sequences on one runtime, and reports on it: a `tiered.jobs.Generate`."""

    def __init__(self, runtime: Runtime, objective: Objective, screen: JobScreen, measure: bool) -> None:
        self._runtime, self._objective = runtime, objective
        self._screen, self._measure = screen, measure
        self.report: Report | None = None
        """Of the generation that has ended."""

    def __call__(
        self,
        sequences: Iterable[Sequence],
        *,
        on_pass: Callable[[], None],
        on_finished: Callable[[Sequence], None],
    ) -> Generation:
        with measured(self._runtime, self._screen.status, self._measure) as around:
            generation = generate(
                self._runtime,
                sequences,
                self._runtime.plan.batch_size,
                on_pass=on_pass,
                on_finished=on_finished,
                on_block=self._screen.on_block,
                objective=self._objective,
            )
        surroundings = around.surroundings(self._runtime, generation.decode.disk_idle_seconds)
        self.report = make_report(generation, surroundings)
        return generation


@contextmanager
def open_engine(request: BatchOptions, store: Store, demand: Demand, screen: JobScreen) -> Iterator[Engine]:
    """The engine for what a job asks for; raises BudgetError where not even one sequence fits."""
    workload = Workload(
        demand.sequences,
        demand.longest,
        demand.longest,
        tokens=demand.tokens,
        max_batched_tokens=MAX_BATCHED_TOKENS,
        batch_size=request.batch,
        choose_batch_size=True,
    )
    measure = partial(measure_machine, say=screen.status.say)
    with Runtime(store, workload, request.options(), measure) as runtime:
        if request.batch is None and not request.as_json:
            screen.say(f"batch     {runtime.plan.why}")
        yield Engine(runtime, Objective(request.objective), screen, request.measure)
