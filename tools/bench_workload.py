"""Runs the parts of a workload file one after the other, keeps a line of figures for each, and shows what there is.

    python -m tools.bench_workload configs/workloads/opt-175b.toml --dir DIR [--part a c]
    python -m tools.bench_workload configs/workloads/opt-175b.toml --table
    python -m tools.bench_workload configs/workloads/opt-175b.toml --plot docs/benchmarks/opt-175b.svg

`tiered bench --workload` runs the same, all of it at once; this goes on where it was interrupted. Figures are added to
docs/benchmarks/NAME.jsonl as each run ends, a line as `tiered bench -o jsonl` prints it, and what is there is not run
again. The store is made in DIR where it is not there yet. Runs say on standard error how far they are.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from tiered.bench.facts import machine_name
from tiered.bench.runs import Way, run_once, with_batch
from tiered.bench.stores import Synthetic
from tiered.bench.workload import BenchWorkload, Setting, load_workload
from tiered.errors import ConfigError, TieredError
from tiered.units import format_seconds, format_size, parse_size

COLUMNS: Final = (
    *("part", "memory", "batch", "prompt", "new", "prefill", "of bound", "s/pass", "decode tok/s", "tok/s in all"),
    *("disk GB/s", "raw GB/s", "of raw", "of bound", "bound by", "KV cache", "resident", "peak RSS", "with page cache"),
)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", help="a file of configs/workloads, or its name")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the store goes")
    parser.add_argument("--store", type=Path, help="default: the workload's shape, made in --dir")
    parser.add_argument("--part", nargs="+", help="only these (default: all)")
    parser.add_argument("--results", type=Path, help="default: docs/benchmarks/NAME.jsonl")
    parser.add_argument("--table", action="store_true", help="print what there is as Markdown, and run nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw tokens/s over the limit, and run nothing")
    arguments = parser.parse_args()
    try:
        workload = load_workload(arguments.workload)
        results = arguments.results or Path("docs/benchmarks") / f"{workload.name}.jsonl"
        if arguments.table or arguments.plot:
            rows = [json.loads(line) for line in results.read_text().splitlines()]
            if arguments.table:
                print_table(rows)
            if arguments.plot:
                draw(rows, arguments.plot)
            return 0
        store = arguments.store or make_store(workload, arguments.dir)
        for part in workload.parts:
            if part.name in (arguments.part or [part.name]):
                for setting in part.settings():
                    measure(store, setting, results)
    except TieredError as error:
        print(f"bench_workload: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def make_store(workload: BenchWorkload, folder: Path) -> Path:
    """The store of the workload's shape, which is made where it is not there yet."""
    if workload.shape is None:
        raise ConfigError(f"{workload.name}: names no shape; name a store with --store")
    return Synthetic(workload.shape, workload.quant, workload.distinct_blocks, folder).make("none")


def measure(store: Path, setting: Setting, results: Path) -> None:
    """Run `setting` if there are no figures of it, and add them to `results`."""
    if is_done(results, setting):
        return
    done = run_once(store, with_batch(store, setting), 0, Way(say=lambda text: print(text, file=sys.stderr)))
    if done.failure is not None:
        raise TieredError(f"part {setting.part} in {setting.memory}: {done.failure}; see above")
    row = done.to_json(machine_name())
    # What names folders and groups of the machine says nothing to others.
    row["usage"] = {name: value for name, value in row["usage"].items() if name not in ("command", "method")}
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print_table([row])


def is_done(results: Path, setting: Setting) -> bool:
    """Whether there are figures of `setting`. Lines of earlier versions have no setting, only part and limit."""
    lines = results.read_text().splitlines() if results.exists() else []
    for row in map(json.loads, lines):
        asked = {**setting.values, "batch": row["batch"]} if isinstance(setting.batch, str) else setting.values
        same_part = (row["part"], row["memory"]) == (setting.part, setting.memory)
        if same_part and row.get("setting", asked) == asked:
            return True
    return False


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
        *(format_size(report["peak_rss_bytes"]), format_size(usage["cgroup_peak_bytes"] or 0)),
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
