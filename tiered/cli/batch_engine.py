"""What computes a job: an open runtime, its width, and the report of what it has done."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from tiered.cli.batch_options import BatchOptions
from tiered.cli.batch_screen import JobScreen
from tiered.cli.batch_width import Demand, choose_batch
from tiered.cli.measuring import measured
from tiered.generate import Generation, Objective, Report, Sequence, generate, make_report
from tiered.runtime import Runtime
from tiered.store import Store


class Engine:
    """Runs sequences on one runtime, and reports on it: a `tiered.jobs.Generate`."""

    def __init__(self, runtime: Runtime, width: int, objective: Objective, screen: JobScreen, measure: bool) -> None:
        self._runtime, self._width, self._objective = runtime, width, objective
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
                self._width,
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
    options = request.options()
    if request.batch is not None:
        load = demand.load(min(request.batch, demand.sequences))
    else:
        choice = choose_batch(store, options, demand, screen.status.say)
        load = demand.load(1) if choice is None else choice.load
        if choice is not None:
            options = replace(options, kv=choice.kv)
            if not request.as_json:
                screen.say(f"batch     {choice.reason}")
    with Runtime(store, load, options) as runtime:
        yield Engine(runtime, load.sequences, Objective(request.objective), screen, request.measure)
