"""Runs the parts of a workload file inside memory limits, one after the other, and keeps a line of figures for each.

    python -m tools.bench_workload configs/workloads/opt-175b.toml --dir DIR [--part a c]
    python -m tools.bench_workload configs/workloads/opt-175b.toml --table
    python -m tools.bench_workload configs/workloads/opt-175b.toml --plot docs/benchmarks/opt-175b.svg

A part is one run of `tiered generate` on a synthetic store for each of its memory limits, which tools/limit.py
enforces; the run's budget is 128 MiB less. The store is made in DIR where it is not there yet. Figures are added to
docs/benchmarks/NAME.jsonl as each run ends, and what is there is not run again: so a workload can be interrupted, and
goes on with the run that was interrupted. Runs say on standard error how far they are. `batch = "disk-bound"` is the
most sequences whose decode pass is expected to take longer to read than to compute, by rates measured just before, and
whose KV cache fits.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tiered.bench.rates import measure_machine
from tiered.errors import BudgetError
from tiered.kernels import Kernels, Mode
from tiered.plan import MAX_BATCHED_TOKENS, Workload, cpu_count, expected_pass
from tiered.plan.batch_size import candidates
from tiered.runtime import Options, measure_inputs
from tiered.store import Store
from tiered.units import MIB, format_seconds, format_size, parse_size

SPARE: Final = 128 * MIB
"""What the limit leaves above the budget."""
MOST_SEQUENCES: Final = 256
DISK_BOUND: Final = "disk-bound"
COLUMNS: Final = (
    *("part", "memory", "batch", "prompt", "new", "prefill", "of bound", "s/pass", "decode tok/s", "tok/s in all"),
    *("disk GB/s", "raw GB/s", "of raw", "of bound", "bound by", "KV cache", "resident", "peak RSS", "with page cache"),
)


@dataclass(frozen=True)
class Run:
    """One run of a part."""

    part: str
    memory: str
    """The limit, as it is written."""
    batch: int | str
    prompt_tokens: int
    new_tokens: int
    options: tuple[str, ...]

    @property
    def ram(self) -> int:
        """The budget in bytes."""
        return parse_size(self.memory) - SPARE


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path, help="a file of configs/workloads")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the store goes")
    parser.add_argument("--part", nargs="+", help="only these (default: all)")
    parser.add_argument("--results", type=Path, help="default: docs/benchmarks/NAME.jsonl")
    parser.add_argument("--table", action="store_true", help="print what there is as Markdown, and run nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw tokens/s over the limit, and run nothing")
    arguments = parser.parse_args()
    workload = tomllib.loads(arguments.workload.read_text())
    results = arguments.results or Path("docs/benchmarks") / f"{arguments.workload.stem}.jsonl"
    if arguments.table or arguments.plot:
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        if arguments.table:
            print_table(rows)
        if arguments.plot:
            draw(rows, arguments.plot)
        return 0
    store = make_store(workload, arguments.dir / f"{arguments.workload.stem}.tiered")
    for run in runs(workload):
        if run.part in (arguments.part or [run.part]) and not is_done(results, run):
            row = measure(store, run)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print_table([row])
    return 0


def runs(workload: dict[str, Any]) -> Iterator[Run]:
    """All runs of the workload, in order."""
    for part in workload["part"]:
        numbers = part["batch"], part["prompt_tokens"], part["new_tokens"]
        for memory in part["memory"]:
            yield Run(part["name"], memory, *numbers, tuple(part.get("options", ())))


def make_store(workload: dict[str, Any], store: Path) -> Path:
    """The store, which is made where it is not there yet."""
    if not (store / "manifest.json").exists():
        made = ["--synthetic", workload["shape"], "--quant", workload["quant"], "-o", str(store)]
        distinct = ["--distinct-blocks", str(workload["distinct_blocks"])]
        subprocess.run([sys.executable, "-m", "tiered", "convert", *made, *distinct], check=True)
    return store


def is_done(results: Path, run: Run) -> bool:
    """Whether there are figures of `run`."""
    lines = results.read_text().splitlines() if results.exists() else []
    return any((row["part"], row["memory"]) == (run.part, run.memory) for row in map(json.loads, lines))


def measure(store: Path, run: Run) -> dict[str, Any]:
    """Run `tiered generate` within the limit; returns what was run, its report, and what the kernel says of it."""
    batch = largest_disk_bound(store, run) if run.batch == DISK_BOUND else int(run.batch)
    print(f"part {run.part}: {batch} sequences in {run.memory}", file=sys.stderr, flush=True)
    tokens = ["--prompt-tokens", str(run.prompt_tokens), "-n", str(run.new_tokens), "--sequences", str(batch)]
    shown = ["tiered", "generate", store.name, *tokens, "--ignore-eos", "--ram", f"{run.ram // MIB}MiB", *run.options]
    command = [sys.executable, "-m", "tiered", "generate", str(store), *shown[3:], "--json"]
    with tempfile.NamedTemporaryFile() as usage:
        limit = [sys.executable, str(Path(__file__).with_name("limit.py")), "--memory", run.memory]
        limited = [*limit, "--json", usage.name, "--", *command]
        done = subprocess.run(limited, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"bench_workload: part {run.part} in {run.memory}: exit status {done.returncode}")
        measured = json.loads(Path(usage.name).read_text())
    return {
        **{"part": run.part, "memory": run.memory, "batch": batch, "machine": machine()},
        **{"command": " ".join(shown), "report": json.loads(done.stdout)["report"], "usage": measured},
    }


def machine() -> str:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{len(names)} cores ({names[0] if names else '?'}), Linux {platform.release()}"


def largest_disk_bound(store: Path, run: Run) -> int:
    """The most sequences at once whose decode pass is expected to be bound by the disk, of those whose cache fits."""
    opened = Store.open(store)
    fields = dict(zip(run.options[::2], run.options[1::2], strict=True))
    mode = Mode(fields.get("--kernel-mode", "invariant"))
    options = Options(ram=run.ram, kernel_mode=mode, kv_bits="auto")
    shape, unmeasured, budgets = measure_inputs(opened, options)
    with Kernels(cpu_count(), mode=mode) as kernels:
        rates = measure_machine(opened, kernels, shape, unmeasured, ("disk", "compute"))
    workload = Workload(1, run.prompt_tokens + run.new_tokens, run.prompt_tokens, max_batched_tokens=MAX_BATCHED_TOKENS)
    best = 1
    for count in candidates(MOST_SEQUENCES):
        try:
            expected = expected_pass(shape, rates, replace(workload, sequences=count), budgets)
        except BudgetError:
            break
        disk, compute = format_seconds(expected.disk_seconds), format_seconds(expected.compute_seconds)
        print(f"  batch {count}: disk {disk}, compute {compute}", file=sys.stderr)
        if expected.bottleneck != "disk":
            break
        best = count
    return best


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows as Markdown."""
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(cells(row)) + " |", flush=True)


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    report, usage = row["report"], row["usage"]
    generated, prompts = report["generated_tokens"], report["prompt_tokens"]
    disk, raw = report["disk_bandwidth"], report["raw_disk_bandwidth"]
    cache = f"{report['kv_bits']} bits, {'disk' if report['kv_on_disk'] else 'memory'}"
    in_all = generated / (report["prefill_seconds"] + report["decode_seconds"])
    return [
        *(row["part"], row["memory"], str(row["batch"])),
        *(str(prompts // row["batch"]), str(generated // row["batch"])),
        *(format_seconds(report["prefill_seconds"]), f"{report['prefill_bound_share']:.0%}"),
        *(f"{report['seconds_per_pass']:.1f}", f"{report['tokens_per_second']:.4f}", f"{in_all:.4f}"),
        *(f"{disk / 1e9:.2f}", f"{raw / 1e9:.2f}", f"{disk / raw:.0%}", f"{report['bound_share']:.0%}"),
        *(report["bottleneck"], cache, format_size(report["resident_bytes"])),
        *(format_size(report["peak_rss_bytes"]), format_size(usage["cgroup_peak_bytes"])),
    ]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second while decoding over the memory limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == part]
        limits = [parse_size(row["memory"]) / 2**30 for row in mine]
        rates = [row["report"]["tokens_per_second"] for row in mine]
        batches = sorted({row["batch"] for row in mine})
        axes.plot(limits, rates, "o-", label=f"batch {', '.join(map(str, batches))}")
        for limit, row, rate in zip(limits, mine, rates, strict=True):
            axes.annotate(f"{rate:.3g}", (limit, rate), textcoords="offset points", xytext=(0, 7), ha="center")
            axes.plot([limit], [rate / row["report"]["bound_share"]], "_", color="black", markersize=14)
    axes.set(xscale="log", yscale="log", xlabel="memory limit, GiB", ylabel="tokens/s while decoding")
    ticks = sorted({parse_size(row["memory"]) / 2**30 for row in rows})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title("OPT-175B in int4 (89 GiB) on 2 cores; bars: the bound of each run", fontsize=10)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
