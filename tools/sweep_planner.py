"""Holds what the planner chooses against sweeps: batch size, place and bits of the KV cache, what stays in memory.

    python -m tools.sweep_planner --dir DIR [--minutes 8] [--rounds 2]        measures, and goes on where it was
    python -m tools.sweep_planner --dir DIR --table

A job is so many sequences of one length in one budget. It is run as the planner chooses (for `tiered plan` and for runs
alike), with a quarter to four times that many sequences at once, with the KV cache elsewhere or in other bits (at the
batch size that is predicted to be best there), and with half and none of the weights in memory that could stay there.
Each run is one `tiered generate` on a synthetic store, which is made in DIR where it is not there yet; its line in
DIR/planner.jsonl is written when it ends.

The planner is asked with the profile DIR/profile.toml, which is measured once, and the rate of the disk as it was when
the job's first run began. Plans are pure, so the table asks again: a change of the planner asks for new runs only where
it chooses what has not been run.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

from tiered.bench.facts import machine_name
from tiered.bench.runs import TIERED
from tiered.bench.stores import Synthetic
from tiered.errors import BudgetError, TieredError
from tiered.plan.choose import batches
from tiered.plan.hardware import Hardware
from tiered.plan.inputs import Budgets, ModelShape
from tiered.plan.kv import Bits
from tiered.plan.machines import load_hardware
from tiered.plan.plan import Plan
from tiered.plan.predict import predict
from tiered.plan.shapes import read_store_shape
from tiered.plan.strategies import BASELINE_NBYTES, Ask, compare, machine_for
from tiered.plan.way import Asked
from tiered.units import format_size, parse_size

QUANT: Final = "int4"
PLACES: Final[tuple[tuple[str, Bits], ...]] = (("cpu", 16), ("cpu", 4), ("disk", 16), ("disk", 4))
CLOSE: Final = 0.9
"""Of the best: what a choice is to reach."""
_NO_BUDGET: Final = 3


@dataclass(frozen=True)
class Job:
    """What is run, and in what."""

    shape: str
    ram: str
    sequences: int
    prompt: int
    new: int

    @property
    def ask(self) -> Ask:
        """As `tiered plan` asks."""
        return Ask(self.prompt, self.new, self.sequences, None, parse_size(self.ram), None, "throughput")


@dataclass(frozen=True)
class Way:
    """How it is run."""

    batch: int
    kv: str
    bits: int
    resident: int | None = None
    """Bytes of weights that stay in memory; None: as many as have room."""

    @classmethod
    def of(cls, plan: Plan) -> "Way":
        resident = plan.placement.resident_nbytes if plan.holds_less else None
        return cls(plan.batch_size, "disk" if plan.cache.on_disk else "cpu", plan.cache.bits, resident)

    def __str__(self) -> str:
        held = "" if self.resident is None else f", {format_size(self.resident)} of weights"
        return f"{self.batch}, {self.kv} {self.bits}{held}"


JOBS: Final = [
    Job("opt-1.3b", "760MiB", 8, 64, 64),
    Job("opt-1.3b", "900MiB", 16, 64, 64),
    Job("opt-1.3b", "1000MiB", 32, 32, 32),
    Job("opt-6.7b", "2000MiB", 8, 64, 16),
    Job("opt-1.3b", "760MiB", 8, 64, 16),
    Job("opt-1.3b", "750MiB", 12, 4, 24),
    Job("opt-6.7b", "3500MiB", 4, 4, 4),
    Job("opt-1.3b", "1200MiB", 12, 4, 24),
    Job("opt-6.7b", "2500MiB", 4, 4, 8),
    Job("opt-1.3b", "900MiB", 4, 32, 16),
    Job("opt-1.3b", "750MiB", 24, 4, 24),
]
"""Runs of seconds to a minute on two cores: first of long contexts, whose caches take much of the memory; then of
passes bound by the disk and by computing, and one of so few passes that memory takes most of its time."""
NEAR: Final = 7
"""Ways of each job that are run, in all rounds, before others of any: an interrupted sweep is one of most jobs."""


class Planner:
    """What is chosen for a job, and predicted of it; pure."""

    def __init__(self, model: ModelShape, hardware: Hardware, job: Job) -> None:
        self._model, self._hardware, self._job = model, hardware, job
        self._machine = machine_for(model, hardware)

    @cached_property
    def choice(self) -> Way | None:
        """None where no plan is found."""
        best = compare({QUANT: self._model}.__getitem__, (QUANT,), self._hardware, self._job.ask).best
        return None if best is None else Way.of(best.plan)

    def plan(self, way: Way) -> Plan | None:
        """The plan of `way`; None where it does not fit."""
        bits: Any = way.bits
        budgets = Budgets(parse_size(self._job.ram), BASELINE_NBYTES, kv_bits=bits, resident_cpu=way.resident)
        asked = Asked(self._model, self._machine, self._job.ask.workload, budgets)
        try:
            return asked.way(way.batch, way.kv == "disk").plan_at(budgets.ram)
        except BudgetError:
            return None

    def tokens_per_second(self, way: Way) -> float:
        """As predicted; 0 where it does not fit."""
        plan, workload = self.plan(way), self._job.ask.workload
        if plan is None:
            return 0.0
        return predict(plan, self._model, self._machine, workload).tokens_per_second

    def sweep(self) -> list[Way]:
        """The choice, and what else is run, without what does not fit; those of most interest come first."""
        chosen = self.choice
        if chosen is None:
            return []
        found = [chosen, *(replace(chosen, batch=chosen.batch * 2**power // 4) for power in (1, 3))]
        for place, bits in PLACES:
            ways = [Way(batch, place, bits) for batch in batches(self._job.ask.workload)]
            found.append(max(ways, key=self.tokens_per_second))
        plan = self.plan(replace(chosen, resident=None))
        if plan is not None and (most := plan.placement.resident_nbytes):
            found += [replace(chosen, resident=resident) for resident in (most // 2, 0, None)]
        found += [replace(chosen, batch=chosen.batch * 2**power // 4) for power in (0, 4)]
        right = (way for way in dict.fromkeys(found) if 1 <= way.batch <= self._job.sequences)
        return [way for way in right if self.plan(way) is not None]


class Results:
    """Lines of runs that have ended, and of the disk's rate when a job began."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        made = [json.loads(line) for line in lines]
        # An earlier version's ways had other fields.
        known = {field.name for field in fields(Way)}
        self._lines = [line for line in made if line["way"] is None or line["way"].keys() <= known]

    def disk(self, job: Job) -> float | None:
        """Bytes per second."""
        return next((line["disk"] for line in self._of(job) if line["way"] is None), None)

    def seconds(self, job: Job, way: Way) -> list[float]:
        """Of the runs that have ended; infinite where it failed."""
        return [line["seconds"] or float("inf") for line in self._of(job) if line["way"] == asdict(way)]

    def ways(self, job: Job) -> list[Way]:
        """Those that have been run, in the order in which they were."""
        return list(dict.fromkeys(Way(**line["way"]) for line in self._of(job) if line["way"] is not None))

    def add(self, job: Job, way: Way | None, **values: Any) -> None:
        line = {"job": asdict(job), "way": None if way is None else asdict(way), **values}
        self._lines.append(line)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _of(self, job: Job) -> Iterator[Mapping[str, Any]]:
        return (line for line in self._lines if line["job"] == asdict(job))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where stores and results go")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each way (default: 1)")
    parser.add_argument("--table", action="store_true", help="print what there is as Markdown, and run nothing")
    options = parser.parse_args(arguments)
    try:
        results = Results(options.dir / "planner.jsonl")
        if options.table:
            print_table(options.dir, results)
        else:
            measure(options.dir, results, options.rounds, time.monotonic() + 60 * options.minutes)
    except TieredError as error:
        print(f"sweep_planner: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def measure(folder: Path, results: Results, rounds: int, until: float) -> None:
    """Run what has not been run, round by round, those of most interest first, until it is time to end. A store is made
    when it is first wanted."""
    store_of = cache(lambda shape: Synthetic(shape, QUANT, 4, folder).make("none"))
    profile = folder / "profile.toml"
    if not profile.exists():
        call("profile", str(store_of(JOBS[-1].shape)), "-o", str(profile))
    for most, round_, job in itertools.product((NEAR, None), range(1, rounds + 1), JOBS):
        if time.monotonic() > until:
            return
        if results.disk(job) is None:
            results.add(job, None, disk=disk_rate(store_of(job.shape)))
        ways = planner(folder, store_of(job.shape), results, job).sweep()[:most]
        left = [way for way in ways if len(results.seconds(job, way)) < round_]
        # The first one finds what the disk's host has not read lately, so it is made once more.
        for number, way in enumerate([*left[:1], *left]):
            if time.monotonic() > until:
                return
            found = run(store_of(job.shape), job, way)
            if number:
                results.add(job, way, **found)


def disk_rate(store: Path) -> float:
    """Bytes per second of plain reads."""
    # Loads torch, which the table does without.
    from tiered.bench.rates import measure_disk
    from tiered.store import Store

    return measure_disk(Store.open(store))


def planner(folder: Path, store: Path, results: Results, job: Job) -> Planner:
    """That of a job, with the profile's rate of the disk as long as it has not begun."""
    hardware, model, disk = load_hardware(str(folder / "profile.toml")), read_store_shape(store), results.disk(job)
    if model is None:  # of an earlier version
        # Loads torch, which the table does without otherwise.
        from tiered.shapes import store_shape

        model = store_shape(store)
    return Planner(model, replace(hardware, disk=replace(hardware.disk, read=disk or hardware.disk.read)), job)


def run(store: Path, job: Job, way: Way) -> dict[str, Any]:
    """Seconds of the whole job, all passes together, and what its report says of memory; seconds are None where it
    does not fit."""
    words = ["generate", str(store), "--json", "--ignore-eos", "--no-measure", "--objective", "throughput"]
    words += ["--ram", job.ram, "--sequences", str(job.sequences), "--prompt-tokens", str(job.prompt)]
    words += [] if way.resident is None else ["--resident-cpu", str(way.resident)]
    words += ["-n", str(job.new), "--batch", str(way.batch), "--kv", way.kv, "--kv-bits", str(way.bits)]
    print(f"sweep_planner: {job.shape} in {job.ram}, {job.prompt} + {job.new}: {way}", file=sys.stderr)
    said = call(*words, or_code=_NO_BUDGET)
    if said is None:
        return {"seconds": None}
    report = json.loads(said)["report"]
    seconds = report["prefill_seconds"] + report["decode_seconds"]
    print(f"sweep_planner: {seconds:.2f} s", file=sys.stderr)
    names = ("prefill_seconds", "decode_seconds", "seconds_per_pass", "resident_bytes", "peak_rss_bytes")
    return {"seconds": seconds, **{name: report[name] for name in names}}


def call(*words: str, or_code: int = 0) -> str | None:
    """What the command prints on standard output; None where it ends with `or_code` instead of 0."""
    done = subprocess.run([*TIERED, *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode and done.returncode != or_code:
        raise TieredError(f"tiered {' '.join(words)}: exit status {done.returncode}; see above")
    return None if done.returncode else done.stdout


def print_table(folder: Path, results: Results) -> None:
    """A row for each job: what was chosen, what was best, and all that was run. A choice that was not run counts as one
    that is behind."""
    print(f"{machine_name()}; tokens/s are generated tokens over all seconds of a job; medians\n")
    print("| job | chosen | tokens/s, predicted | of the best | best | all that was run |\n|" + "---|" * 6)
    shares = []
    for job in JOBS:
        asked = planner(folder, Synthetic(job.shape, QUANT, 4, folder).path("none"), results, job)
        chosen = asked.choice
        if chosen is None:
            continue
        speeds = {way: tokens_per_second(job, results.seconds(job, way)) for way in results.ways(job)}
        best = max(speeds, key=speeds.__getitem__, default=None)
        name = f"{job.shape}, {job.ram}, {job.sequences} x ({job.prompt} + {job.new})"
        others = ", ".join(f"{speed:.3g} ({way})" for way, speed in speeds.items())
        predicted, fastest = asked.tokens_per_second(chosen), "-" if best is None else f"{speeds[best]:.3g} ({best})"
        share = 0.0
        if best is None or chosen not in speeds:
            cells = [f"not run, {predicted:.3g}", "not run"]
        else:
            # Where all failed, so did the best.
            share = speeds[chosen] / speeds[best] if speeds[best] else 0.0
            cells = [f"{speeds[chosen]:.3g}, {predicted:.3g}"]
            cells += [f"{share:.0%}" + ("" if share >= CLOSE else " **behind**")]
        shares.append(share)
        print("| " + " | ".join([name, str(chosen), *cells, fastest, others or "-"]) + " |")
    print(f"\n{sum(share >= CLOSE for share in shares)} of {len(shares)} choices reach {CLOSE:.0%} of the best")


def tokens_per_second(job: Job, seconds: Sequence[float]) -> float:
    """By the median run; 0 where it failed."""
    return job.sequences * job.new / statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
