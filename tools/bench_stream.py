"""How close streaming comes to the disk: synthetic stores, generated from inside a memory limit, several runs.

    python tools/bench_stream.py                                   opt-6.7b in bf16, in 4 GiB
    python tools/bench_stream.py --shape opt-13b --quant int4 --ram 2GiB --runs 5

Makes the store (kept for the next time unless --clean), then runs `tiered generate --json` at batch 1 under
tools/limit.py, and prints one row per run and the medians, as Markdown. All figures come from the runs' own reports,
where B is the raw bandwidth of the same run and M what the budget leaves, used or not; peak memory comes from the
kernel. Nothing is cached between runs: reads bypass the page cache (see the row "read").
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tiered.store import Store
from tiered.units import MIB, format_rate, format_size, parse_size

COLUMNS = ("GB/s", "raw GB/s", "of raw", "s/pass", "bound s", "of bound", "compute s", "ms/block", "peak", "bound by")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-6.7b", help="a name in configs/models (default: %(default)s)")
    parser.add_argument("--quant", default="none", choices=["none", "int8", "int4"])
    parser.add_argument("--ram", default="4GiB", help="budget; the cgroup gets 128 MiB more (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("-n", "--new-tokens", type=int, default=6, help="one pass each (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the store goes")
    parser.add_argument("--clean", action="store_true", help="remove the store afterwards")
    arguments = parser.parse_args()
    store = arguments.dir / f"bench-{arguments.shape}-{arguments.quant}.tiered"
    if not (store / "manifest.json").exists():
        command = ["convert", "--synthetic", arguments.shape, "-o", str(store), "--quant", arguments.quant]
        subprocess.run([sys.executable, "-m", "tiered", *command], check=True)
    try:
        describe(store, arguments)
        rows = [run(store, arguments) for _ in range(arguments.runs)]
    finally:
        if arguments.clean:
            shutil.rmtree(store)
    print_rows(rows)
    return 0


def describe(store: Path, arguments: argparse.Namespace) -> None:
    """What was measured, on what."""
    nbytes, budget = Store.open(store).tape_nbytes, parse_size(arguments.ram)
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "?"
    )
    print(
        f"synthetic {arguments.shape}, {arguments.quant}: {format_size(nbytes)} per pass, {nbytes / budget:.1f} times"
    )
    print(f"--ram {arguments.ram}, in a cgroup of 128 MiB more, page cache included; batch 1")
    print(f"{os.cpu_count()} cores ({cpu}), Linux {platform.release()}\n")


def run(store: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run in its own limited process; returns its report."""
    limit = parse_size(arguments.ram) + 128 * MIB
    tool = Path(__file__).with_name("limit.py")
    generate = [
        sys.executable,
        "-m",
        "tiered",
        "generate",
        str(store),
        "--json",
        "--ignore-eos",
        "--ram",
        arguments.ram,
    ]
    tokens = ["--prompt-tokens", str(arguments.prompt_tokens), "-n", str(arguments.new_tokens)]
    with tempfile.NamedTemporaryFile() as usage:
        limited = [sys.executable, str(tool), "--memory", str(limit), "--json", usage.name, "--or-unlimited", "--"]
        done = subprocess.run([*limited, *generate, *tokens], stdout=subprocess.PIPE, check=True)
        report: dict[str, Any] = json.loads(done.stdout)["report"]
        report["usage"] = json.loads(Path(usage.name).read_text())
    return report


def print_rows(reports: list[dict[str, Any]]) -> None:
    """A Markdown table: runs, then medians of the numeric columns."""
    rows = [figures(report) for report in reports]
    print("| run | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for number, row in enumerate(rows, 1):
        print(f"| {number} | " + " | ".join(row) + " |")
    keys = ("disk_bandwidth", "raw_disk_bandwidth", "seconds_per_pass", "bound_seconds_per_pass", "bound_share")
    median = {key: statistics.median(report[key] for report in reports) for key in keys}
    share = statistics.median(r["disk_bandwidth"] / r["raw_disk_bandwidth"] for r in reports)
    print(
        f"\nmedian: {format_rate(median['disk_bandwidth'])}, {share:.1%} of raw bandwidth; "
        f"{median['seconds_per_pass']:.3f} s per pass where {median['bound_seconds_per_pass']:.3f} s are possible, "
        f"{median['bound_share']:.1%} of the bound"
    )
    print(f"read: {reports[0]['read_mode']}; {format_size(reports[0]['resident_bytes'])} resident")


def figures(report: dict[str, Any]) -> list[str]:
    """One row of the table."""
    return [
        f"{report['disk_bandwidth'] / 1e9:.2f}",
        f"{report['raw_disk_bandwidth'] / 1e9:.2f}",
        f"{report['disk_bandwidth'] / report['raw_disk_bandwidth']:.1%}",
        f"{report['seconds_per_pass']:.3f}",
        f"{report['bound_seconds_per_pass']:.3f}",
        f"{report['bound_share']:.1%}",
        f"{report['compute_seconds_per_pass']:.3f}",
        f"{report['block_overhead_seconds'] * 1e3:.2f}",
        format_size(report["peak_rss_bytes"]),
        report["bottleneck"],
    ]


if __name__ == "__main__":
    sys.exit(main())
