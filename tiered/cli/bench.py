"""`tiered bench`: runs of `tiered generate`, each a process of its own, as a table, pictures or a page.

Loads no torch, as `bench/runs.py` says why. What has been measured is printed, however the command ends.
"""

import contextlib
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from tiered.bench.cgroup import CannotLimitError, limiter, throttled
from tiered.bench.facts import machine_facts, machine_name, store_facts
from tiered.bench.limit import held_signals
from tiered.bench.output import Result, as_csv, as_json, label, markdown
from tiered.bench.page import page
from tiered.bench.plot import check_can_draw, draw, picture, read_timeline
from tiered.bench.rows import rows, varied
from tiered.bench.runs import Run, StoppedError, Way, alternate, run_once, with_batch
from tiered.bench.stores import Synthetic, synthetic_stores
from tiered.bench.workload import BenchWorkload, Part, Setting, checked, load_workload
from tiered.cli.lines import say
from tiered.cli.writable import check_writable
from tiered.errors import ConfigError, InterruptedRun, TieredError

_PRINTED: Final = {"md": markdown, "json": as_json, "csv": as_csv}


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """The options of the command, as they were given."""

    target: str | None
    workload: str | None
    parts: tuple[str, ...]
    quant: str | None
    distinct_blocks: int | None
    values: Mapping[str, tuple[Any, ...]]
    """By axis of `Setting`, those that were given."""
    repeat: int
    warm: bool
    or_unlimited: bool
    read_rate: str | None
    form: str
    plot_path: Path | None
    page_path: Path | None
    folder: Path
    clean: bool


@dataclass
class _Bench:
    """What a benchmark has and has found."""

    request: BenchRequest
    stores: dict[str, Path]
    """By how they are compressed."""
    settings: list[Setting]
    trace_path: Path | None
    runs: list[Run] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run(request: BenchRequest) -> None:
    """Measure, and show what was found. Raises InterruptedRun after that if it was interrupted, what ended it early if
    anything did, and TieredError if a setting failed."""
    workload = _workload(request)
    settings = _settings(request, workload)
    _check(request, settings, _folder(request, workload))
    with contextlib.ExitStack() as stack:
        stores = stack.enter_context(_stores(request, workload, settings))
        facts = {compress: store_facts(store) for compress, store in stores.items()}
        machine = machine_facts(next(iter(stores.values())))
        if machine.is_memory_disk:
            say(f"{next(iter(stores.values()))}: lies in memory, so no disk is measured; a shape's goes into --dir")
        settings = list(dict.fromkeys(with_batch(stores[setting.compress], setting) for setting in settings))
        wants_pictures = request.plot_path is not None or request.page_path is not None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tiered-bench-")))
        bench = _Bench(request, stores, settings, folder / "trace.json" if wants_pictures else None)
        ended = _measure(bench)
        command = shlex.join(["tiered", *sys.argv[1:]])
        found = rows(bench.runs, facts)
        shown = [facts[compress] for compress in stores]
        conditions = _conditions(request, bench.runs)
        result = Result(command, machine, shown, conditions, found, bench.runs, bench.notes)
        _show(bench, result)
    if ended is not None:
        raise ended
    if bench.notes:
        raise TieredError(f"not everything was measured: {'; '.join(bench.notes)}")


def _workload(request: BenchRequest) -> BenchWorkload:
    """What runs, before options change it."""
    if request.workload is None:
        if request.parts:
            raise ConfigError("--part: names a part of a workload; add --workload NAME")
        return BenchWorkload("", (Part(),))
    found = load_workload(request.workload)
    names = [part.name for part in found.parts]
    if unknown := [name for name in request.parts if name not in names]:
        raise ConfigError(f"--part {unknown[0]}: workload {found.name} has {', '.join(names)}")
    return found


def _settings(request: BenchRequest, workload: BenchWorkload) -> list[Setting]:
    """All settings, in order; options replace the values of every part."""
    given = {axis: checked(axis, list(values), "options") for axis, values in request.values.items()}
    parts = [part for part in workload.parts if not request.parts or part.name in request.parts]
    return [setting for part in parts for setting in part.with_values(given).settings()]


def _folder(request: BenchRequest, workload: BenchWorkload) -> Path:
    """A folder on the disk that runs read: the store, or the folder that stores of a shape are made in."""
    target = request.target or workload.shape
    return Path(target) if target is not None and Path(target).is_dir() else request.folder


def _check(request: BenchRequest, settings: Sequence[Setting], folder: Path) -> None:
    """Refuse, before anything is made or run, what could not be done in the end. Runs read from the disk of `folder`,
    whose absence is told where stores are made."""
    for option, path in (("--plot", request.plot_path), ("--report", request.page_path)):
        if path is not None:
            check_can_draw(option, path if option == "--plot" else None)
            check_writable(option, path)
    with held_signals():
        if any(setting.limit_bytes for setting in settings) and not request.or_unlimited:
            try:
                with limiter(None):
                    pass  # it can be done
            except CannotLimitError as error:
                raise TieredError(f"{error}; --or-unlimited runs without limits of memory") from None
        if folder.is_dir():
            with throttled(request.read_rate, folder):
                pass  # it can be done


def _stores(
    request: BenchRequest, workload: BenchWorkload, settings: Sequence[Setting]
) -> contextlib.AbstractContextManager[dict[str, Path]]:
    """The store of every way to compress, while the context lasts."""
    target = request.target or workload.shape
    if target is None:
        raise ConfigError("expected a store, or a shape such as opt-13b: tiered bench opt-13b --workload NAME")
    ways = list(dict.fromkeys(setting.compress for setting in settings))
    if not Path(target).is_dir():
        distinct = request.distinct_blocks or workload.distinct_blocks
        what = Synthetic(target, request.quant or workload.quant, distinct, request.folder)
        return synthetic_stores(what, ways, request.clean)
    unfit: dict[str, Any] = {"--quant": request.quant, "--distinct-blocks": request.distinct_blocks}
    unfit |= {"--clean": request.clean, "--compress": request.values.get("compress")}
    for option, value in unfit.items():
        if value:
            raise ConfigError(f"{option}: is for stores that are made of a shape, and {target} is one already; drop it")
    return contextlib.nullcontext({ways[0]: Path(target)})


def _measure(bench: _Bench) -> Exception | None:
    """Make all runs; returns what ended them early, to be raised once what there is has been shown."""
    request, total = bench.request, len(bench.settings) * bench.request.repeat
    way = Way(not request.warm, request.or_unlimited, request.read_rate, say)

    def go(setting: Setting, number: int) -> Run:
        what = label(setting, varied(bench.settings))
        tests = f"pp{setting.prompt_tokens}+tg{setting.new_tokens}"
        say(f"run {len(bench.runs) + 1} of {total}: {tests}, {what}" if number else f"warming up: {tests}, {what}")
        trace = bench.trace_path if (setting, number) == (bench.settings[0], 1) else None
        return run_once(bench.stores[setting.compress], setting, number, way, trace)

    try:
        if request.warm:
            for setting in bench.settings:
                go(setting, 0)
        for done in alternate(bench.settings, request.repeat, go):
            bench.runs.append(done)
            if done.failure is not None:
                bench.notes.append(f"{label(done.setting, varied(bench.settings))}: {done.failure}")
            if request.form == "jsonl":
                click.echo(json.dumps(done.to_json(machine_name()), ensure_ascii=False))
    except (KeyboardInterrupt, StoppedError):
        bench.notes.append(f"interrupted after {len(bench.runs)} of {total} runs")
        return InterruptedRun("interrupted")
    except (TieredError, OSError) as error:
        bench.notes.append(f"ended after {len(bench.runs)} of {total} runs: {error}")
        return error
    return None


def _conditions(request: BenchRequest, runs: Sequence[Run]) -> str:
    """What was cold, limited or slowed down, in one line."""
    modes = sorted({run.report["read_mode"] for run in runs if run.report is not None})
    parts = [f"each a process of its own, {request.repeat} of every setting in turns, other prompts in each"]
    if request.warm:
        parts.append("warm: after one run of every setting that does not count; what is in the page cache stays there")
    else:
        parts.append("cold: the store's pages are dropped from the page cache before each, and nothing is in memory")
    if modes:
        past = ", past the page cache" if modes == ["O_DIRECT"] else ""
        parts.append(f"weights are read with {', '.join(modes)}{past}")
    parts.append("what a host below a virtual machine caches is not known")
    methods = {run.usage.method.partition(" (")[0] for run in runs if run.usage.limit_bytes is not None}
    if methods:
        parts.append(f"memory limited by {', '.join(sorted(methods))}, page cache included, no swap")
    if request.read_rate is not None:
        parts.append(f"reads slowed down to {request.read_rate} per second")
    return "; ".join(parts)


def _show(bench: _Bench, result: Result) -> None:
    """Print the table, and write the pictures and the page."""
    request = bench.request
    if request.form != "jsonl":
        click.echo(_PRINTED[request.form](result), nl=False)
    if not result.rows or bench.trace_path is None:
        return
    timeline = read_timeline(bench.trace_path) if bench.trace_path.exists() else None
    title = f"{' and '.join(store.model for store in result.stores)}: {result.machine.name}"
    if request.plot_path is not None:
        draw(result.rows, timeline, title, request.plot_path)
    if request.page_path is not None:
        drawn = picture(result.rows, timeline, title, "png")
        request.page_path.write_text(page(result, drawn), encoding="utf-8")
