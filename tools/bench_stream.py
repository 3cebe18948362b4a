"""How close passes come to the disk and to memory: synthetic stores, generated from inside a memory limit.

    python tools/bench_stream.py                                   opt-6.7b in bf16, in 4 GiB
    python tools/bench_stream.py --shape opt-13b --quant int4 --ram 2400MiB --batch 1 4 16 64
    python tools/bench_stream.py --shape opt-13b --quant int4 --ram 14GiB --batch 1 16 --kernel-mode fast
    python tools/bench_stream.py --shape opt-1.3b --quant int4 --ram 1152MiB --batch 16 --prompt-tokens 1000 --kv disk
    python tools/bench_stream.py --shape opt-1.3b --ram 1GiB --compress none planes --read-rate 400MB

Makes the stores (kept for the next time unless --clean), then runs `tiered generate --json` under tools/limit.py, and
prints one row per run and the medians, as Markdown. All figures come from the runs' own reports, where B is the raw
bandwidth of the same run ("best look": the fastest 80 ms while it was measured) and M what the budget leaves, used or
not; peak memory comes from the kernel. Nothing is cached between runs: reads bypass the page cache (see the row
"read"). With a budget that holds the whole store nothing is read while decoding; "weights GB/s" is then to be held
against the memory's bandwidth, printed above the table.
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

COLUMNS = (
    *(
        "compress",
        "batch",
        "tok/s",
        "prefill tok/s",
        "s/pass",
        "compute s",
        "weights GB/s",
        "disk GB/s",
        "raw GB/s",
        "of raw",
    ),
    *("best look GB/s", "KV GB/pass", "bound s", "of bound", "ms/block", "peak", "bound by"),
)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-6.7b", help="a name in configs/models (default: %(default)s)")
    parser.add_argument("--quant", default="none", choices=["none", "int8", "int4"])
    parser.add_argument("--source", help="a checkpoint to convert instead of a shape; --shape is then only a name")
    parser.add_argument(
        "--compress", default=["none"], choices=["none", "planes"], nargs="+", help="run in alternation"
    )
    parser.add_argument("--read-rate", help="slow the disk down to this, such as 400MB (as root, with cgroup v1)")
    parser.add_argument("--ram", default="4GiB", help="budget; the cgroup gets 128 MiB more (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="of every batch size (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences that share a pass")
    parser.add_argument("-n", "--new-tokens", type=int, default=6, help="one pass each (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--kernels", default="auto", help="as in tiered generate (default: %(default)s)")
    parser.add_argument("--kernel-mode", default="invariant", choices=["invariant", "fast"])
    parser.add_argument("--kv", default="auto", choices=["auto", "cpu", "disk"])
    parser.add_argument("--kv-bits", default="16", choices=["16", "8", "4"])
    parser.add_argument("--distinct-blocks", type=int, help="distinct layer files, so that the store takes less room")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the store goes")
    parser.add_argument("--clean", action="store_true", help="remove the store afterwards")
    arguments = parser.parse_args()
    stores = {compress: make_store(compress, arguments) for compress in arguments.compress}
    try:
        describe(stores, arguments)
        for batch in arguments.batch:
            reports: dict[str, list[dict[str, Any]]] = {compress: [] for compress in stores}
            for _ in range(arguments.runs):
                for compress, store in stores.items():
                    reports[compress].append(run(store, batch, arguments))
            for compress, found in reports.items():
                print_rows(found, batch, compress)
    finally:
        if arguments.clean:
            for store in stores.values():
                shutil.rmtree(store)
    return 0


def make_store(compress: str, arguments: argparse.Namespace) -> Path:
    """The store, which is converted where it is not there yet."""
    end = "" if compress == "none" else f"-{compress}"
    store: Path = arguments.dir / f"bench-{arguments.shape}-{arguments.quant}{end}.tiered"
    if not (store / "manifest.json").exists():
        source = [arguments.source] if arguments.source else ["--synthetic", arguments.shape]
        command = ["convert", *source, "-o", str(store), "--quant", arguments.quant, "--compress", compress]
        if arguments.distinct_blocks:
            command += ["--distinct-blocks", str(arguments.distinct_blocks)]
        subprocess.run([sys.executable, "-m", "tiered", *command], check=True)
    return store


def describe(stores: dict[str, Path], arguments: argparse.Namespace) -> None:
    """What is measured, on what, and the head of the table."""
    sizes, budget = {name: Store.open(store).tape_nbytes for name, store in stores.items()}, parse_size(arguments.ram)
    nbytes = max(sizes.values())
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "?")
    threads = os.cpu_count() or 1
    tool = Path(__file__).with_name("machine_limits.py")
    done = subprocess.run([sys.executable, str(tool)], capture_output=True, text=True, check=True)
    memory = json.loads(done.stdout)["read_bandwidth"]
    print(
        f"synthetic {arguments.shape}, {arguments.quant}: {format_size(nbytes)} per pass, {nbytes / budget:.1f} times "
        f"--ram {arguments.ram}, in a cgroup of 128 MiB more, page cache included; "
        f"{arguments.prompt_tokens} prompt tokens per sequence"
    )
    told = ", ".join(f"{name} {format_size(size)} ({size / nbytes:.3f})" for name, size in sizes.items())
    print(f"stores: {told}; reads at most {arguments.read_rate or 'as fast as the disk'} per second")
    print(f"{threads} cores ({cpu}), Linux {platform.release()}; memory reads {format_rate(memory)}\n")
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)


def run(store: Path, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run in its own limited process; returns its report."""
    limit = parse_size(arguments.ram) + 128 * MIB
    tool = Path(__file__).with_name("limit.py")
    generate = [sys.executable, "-m", "tiered", "generate", str(store), "--json", "--ignore-eos"]
    options = ["--ram", arguments.ram, "--kernels", arguments.kernels, "--kernel-mode", arguments.kernel_mode]
    options += ["--kv", arguments.kv, "--kv-bits", arguments.kv_bits]
    tokens = ["--prompt-tokens", str(arguments.prompt_tokens), "-n", str(arguments.new_tokens)]
    slow = ["--read-rate", arguments.read_rate, "--disk-of", str(store)] if arguments.read_rate else []
    with tempfile.NamedTemporaryFile() as usage:
        limited = [sys.executable, str(tool), "--memory", str(limit), "--json", usage.name, "--or-unlimited"]
        command = [*limited, *slow, "--", *generate, *options, *tokens, "--sequences", str(batch)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr}")
        report: dict[str, Any] = json.loads(done.stdout)["report"]
        report["usage"] = json.loads(Path(usage.name).read_text())
    return report


def print_rows(reports: list[dict[str, Any]], batch: int, compress: str) -> None:
    """The rows of one batch size, and their medians where there are several."""
    rows = [[("{}", compress), *figures(report, batch)] for report in reports]
    for row in rows:
        print("| " + " | ".join("-" if value is None else style.format(value) for style, value in row) + " |")
    if len(rows) > 1:
        columns = zip(*rows, strict=True)
        print("| " + " | ".join(f"**{median(column)}**" for column in columns) + " |")
    sys.stdout.flush()


def figures(report: dict[str, Any], batch: int) -> list[tuple[str, Any]]:
    """One row of the table: how to print each figure, and the figure, None where there is nothing to measure."""
    disk, raw = report["disk_bandwidth"], report["raw_disk_bandwidth"]
    streamed = raw is not None and disk is not None
    return [
        ("{:.0f}", batch),
        ("{:.2f}", report["tokens_per_second"]),
        ("{:.1f}", report["prefill_tokens_per_second"]),
        ("{:.3f}", report["seconds_per_pass"]),
        ("{:.3f}", report["compute_seconds_per_pass"]),
        ("{:.2f}", report["tape_bytes"] / report["seconds_per_pass"] / 1e9),
        ("{:.2f}", disk / 1e9 if streamed else None),
        ("{:.2f}", raw / 1e9 if streamed else None),
        ("{:.1%}", disk / raw if streamed else None),
        ("{:.2f}", report["raw_disk_best_look"] / 1e9 if streamed else None),
        ("{:.2f}", (report["kv_bytes_read"] + report["kv_bytes_written"]) / report["passes"] / 1e9),
        ("{:.3f}", report["bound_seconds_per_pass"]),
        ("{:.1%}", report["bound_share"]),
        ("{:.2f}", report["block_overhead_seconds"] * 1e3),
        ("{}", format_size(report["peak_rss_bytes"])),
        ("{}", report["bottleneck"]),
    ]


def median(column: tuple[tuple[str, Any], ...]) -> str:
    """The median of a column of numbers, or what most of its texts say."""
    style, values = column[0][0], [value for _, value in column if value is not None]
    if not values:
        return "-"
    middle = statistics.mode(values) if isinstance(values[0], str) else statistics.median(values)
    return style.format(middle)


if __name__ == "__main__":
    sys.exit(main())
