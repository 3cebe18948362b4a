"""From runs to the rows of a table: for every setting prefill (pp512), decode (tg32) and both, each with mean and sd.

In: runs of `runs.py`. Out: frozen rows. All figures come from the reports of the runs; the peak is the kernel's.

    t/s of pp     prompt tokens over the seconds of passes with prompts
    t/s of tg     tokens over the seconds of passes that only decode; the first token of a completion comes of prefill
    t/s of both   prompt and generated tokens over both times together
    of disk       bytes moved meanwhile over the raw bandwidth that the same run measured
    of bound      the least seconds in which this run's bytes could be read and its rows computed, over its seconds
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from tiered.bench.facts import StoreFacts
from tiered.bench.runs import Run
from tiered.bench.workload import AXES, Setting

Phase = Literal["prefill", "decode", "both"]
PHASES: Final[tuple[Phase, ...]] = ("prefill", "decode", "both")


@dataclass(frozen=True)
class Measured:
    """One phase of one run."""

    tokens: float
    seconds: float
    nbytes: float
    raw: float | None
    """Raw bandwidth of the disk; None where nothing was streamed, or nobody measured."""
    bound_seconds: float | None
    predicted: float | None
    """Tokens per second that the run's plan expected."""


@dataclass(frozen=True)
class Row:
    """One phase of all runs of a setting. Rates are per second; None: there is nothing to tell."""

    model: str
    size: int
    params: int
    backend: str
    threads: int
    setting: Setting
    phase: Phase
    runs: int
    tokens_per_second: float
    sd: float | None
    """None with a single run."""
    bytes_per_token: float
    disk_bandwidth: float
    share_of_disk: float | None
    share_of_bound: float | None
    predicted: float | None
    bottleneck: str | None
    """What bounded decoding: disk, compute or memory."""
    peak_rss_bytes: int

    @property
    def test(self) -> str:
        """What llama-bench calls it: "pp512", "tg32", "pp512+tg32"."""
        prompt, new = f"pp{self.setting.prompt_tokens}", f"tg{self.setting.new_tokens}"
        return {"prefill": prompt, "decode": new, "both": f"{prompt}+{new}"}[self.phase]

    @property
    def bound(self) -> float | None:
        """Tokens per second that were possible."""
        return None if not self.share_of_bound else self.tokens_per_second / self.share_of_bound

    def to_json(self) -> dict[str, Any]:
        """All figures; those of the setting lie beside them."""
        found = asdict(self)
        setting = found.pop("setting")
        return {"test": self.test, "part": setting.pop("part"), **setting, **found}


def rows(runs: Sequence[Run], stores: Mapping[str, StoreFacts]) -> list[Row]:
    """Three rows for each setting, in the order of their first runs; `stores` by how they are compressed."""
    found: dict[Setting, list[Run]] = {}
    for run in runs:
        if run.report is not None:
            found.setdefault(run.setting, []).append(run)
    return [
        row
        for setting, same in found.items()
        for phase in PHASES
        for row in _row(setting, phase, same, stores[setting.compress])
    ]


def _row(setting: Setting, phase: Phase, runs: Sequence[Run], store: StoreFacts) -> Iterator[Row]:
    """The row of a phase; none where no run had it, as with a single new token."""
    reports = [run.report for run in runs if run.report is not None]
    measured = [one for one in (measure(report, phase) for report in reports) if one is not None]
    if not measured:
        return
    rates = [one.tokens / one.seconds for one in measured]
    backend, threads = _kernels(reports[0]["kernels"])
    yield Row(
        model=store.model,
        size=store.nbytes,
        params=store.parameters,
        backend=backend,
        threads=threads,
        setting=setting,
        phase=phase,
        runs=len(measured),
        tokens_per_second=statistics.mean(rates),
        sd=statistics.stdev(rates) if len(rates) > 1 else None,
        bytes_per_token=statistics.mean(one.nbytes / one.tokens for one in measured),
        disk_bandwidth=statistics.mean(one.nbytes / one.seconds for one in measured),
        share_of_disk=_mean(one.nbytes / one.seconds / one.raw if one.raw else None for one in measured),
        share_of_bound=_mean(one.bound_seconds and one.bound_seconds / one.seconds for one in measured),
        predicted=_mean(one.predicted for one in measured),
        bottleneck=statistics.mode(report["bottleneck"] for report in reports) if phase != "prefill" else None,
        peak_rss_bytes=max(run.peak_bytes for run in runs),
    )


def measure(report: Mapping[str, Any], phase: Phase) -> Measured | None:
    """The figures of a phase of the run that `report` tells of; None where it did not happen."""
    prefill, decode = _prefill(report), _decode(report)
    if phase == "prefill":
        return prefill
    if phase == "decode" or decode is None or prefill is None:
        return decode if phase == "decode" else None
    bounds = (prefill.bound_seconds, decode.bound_seconds)
    bound = None if bounds[0] is None or bounds[1] is None else bounds[0] + bounds[1]
    # The first token of each completion is of the prefill's time.
    tokens = report["prompt_tokens"] + report["generated_tokens"]
    expected = None
    if prefill.predicted and decode.predicted:
        expected = tokens / (prefill.tokens / prefill.predicted + decode.tokens / decode.predicted)
    seconds, nbytes = prefill.seconds + decode.seconds, prefill.nbytes + decode.nbytes
    return Measured(tokens, seconds, nbytes, prefill.raw, bound, expected)


def _decode(report: Mapping[str, Any]) -> Measured | None:
    seconds = report["decode_seconds"]
    if not seconds or not report["tokens_per_second"]:
        return None
    passes, tokens = seconds / report["seconds_per_pass"], report["tokens_per_second"] * seconds
    bound, raw = report["bound_seconds_per_pass"], report["raw_disk_bandwidth"]
    expected = _predicted(report, "predicted_seconds_per_pass", tokens / passes)
    return Measured(tokens, seconds, (report["disk_bandwidth"] or 0) * seconds, raw, bound and bound * passes, expected)


def _prefill(report: Mapping[str, Any]) -> Measured | None:
    seconds, decoding = report["prefill_seconds"], (report["disk_bandwidth"] or 0) * report["decode_seconds"]
    if not seconds:
        return None
    # The report counts bytes of the whole run: what was not read while decoding was read before.
    moved = report["bytes_read"] + report["kv_bytes_read"] + report["kv_bytes_written"] - decoding
    tokens, bound = report["prompt_tokens"], report["prefill_bound_seconds"]
    expected = _predicted(report, "predicted_prefill_seconds", tokens)
    return Measured(tokens, seconds, max(moved, 0), report["raw_disk_bandwidth"], bound, expected)


def _predicted(report: Mapping[str, Any], key: str, tokens: float) -> float | None:
    """Tokens per second, from the seconds that were expected for so many; None where nothing was."""
    return tokens / report[key] if report.get(key) else None


def _kernels(description: str) -> tuple[str, int]:
    """Backend and threads of "avx512, invariant, 2 threads"."""
    *backend, threads = description.split(", ")
    return " ".join(backend), int(threads.split()[0])


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def varied(settings: Iterable[Setting]) -> list[str]:
    """The axes in which `settings` differ, without those that a test's name has."""
    known = list(settings)
    axes = [axis for axis in AXES if axis not in ("prompt_tokens", "new_tokens", "batch")]
    return [axis for axis in axes if len({getattr(setting, axis) for setting in known}) > 1]


def common(settings: Iterable[Setting]) -> dict[str, str]:
    """What all `settings` share and is not usual, by axis; without what a test's name has."""
    known, usual = list(settings), Setting()
    axes = [axis for axis in AXES if axis not in ("prompt_tokens", "new_tokens", "batch")]
    shared = {axis: {getattr(setting, axis) for setting in known} for axis in axes}
    return {
        axis: str(*values) for axis, values in shared.items() if len(values) == 1 and {getattr(usual, axis)} != values
    }
