"""Our linear kernels beside torch's operators and the machine's limits: one run, one process, as Markdown.

    tools/bench-kernels                                    the layers of OPT-13B, OPT-175B and Llama-70B; some minutes
    tools/bench-kernels --quick                            one shape, fewer rows
    tools/bench-kernels --kernels auto,avx2 --json figures.json --plot roofline.svg
    tools/bench-kernels --quick --also mxfp4-g32,nf4-g64   the first kernel with other weights, in the same turns

For each shape and number of rows (M) it times, in turns: our kernels (`--kernels`, each in `--modes`), torch's
`_weight_int4pack_mm_for_cpu`, bf16 `linear` and `_int_mm` (the raw int8 product, to which quantizing the activations
would be added), and reads memory with the same threads. GB/s are bytes of packed weights, 35 per 64 of them; "of RAM"
is their share of the best read bandwidth of the whole run. Ratios are torch's time divided by ours.

torch's workers spin for a while after each call, which would take a processor from the threads of ours. So the program
starts itself again with OMP_WAIT_POLICY=passive, where that is not set, and gives both the same number of threads.
The plot needs matplotlib.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch

from tiered.kernels import Kernels, Mode, load_library
from tiered.plan import system
from tiered.quant import Scheme
from tiered.units import MIB, format_size
from tools import kernel_race as race
from tools.kernel_race import TORCH_BF16, TORCH_INT4, TORCH_INT8, Inputs, LayerShape
from tools.machine_limits import Limits

ROWS: Final = (1, 2, 4, 8, 16, 32, 48, 64, 128, 256, 512, 1024)
QUICK_ROWS: Final = (1, 4, 8, 16, 48, 64, 256, 1024)
SHAPES: Final = tuple(
    LayerShape(model, out, in_)
    for model, hidden, wide in (("OPT-13B", 5120, 20480), ("OPT-175B", 12288, 49152), ("Llama-70B", 8192, 28672))
    for out, in_ in ((hidden, hidden), (wide, hidden), (hidden, wide))
)
CHECKED: Final = (12288, 12288)
MOST_ERROR: Final = {Mode.INVARIANT: 3e-3, Mode.FAST: 2e-2}
TORCH: Final = (TORCH_INT4, TORCH_BF16, TORCH_INT8)
# What must hold for the first of our kernels: at how many rows, and at least how much.
OF_RAM: Final = {1: 0.50, 2: 0.50, 4: 0.50, 8: 0.50, 16: 0.45}
OF_TORCH: Final = ((64, TORCH_INT4, 9.0), (64, TORCH_BF16, 2.3), (256, TORCH_BF16, 1.4), (1024, TORCH_BF16, 1.1))


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    shape: LayerShape
    rows: int
    seconds: Mapping[str, float]
    """Per call, by contestant or scheme of `--also`; one that would have taken too long is missing."""
    read_bandwidth: float

    def packed_rate(self, name: str) -> float:
        return self.shape.packed_nbytes / self.seconds[name]

    def flops(self, name: str) -> float:
        return 2 * self.rows * self.shape.out * self.shape.in_ / self.seconds[name]

    def ratio(self, name: str, other: str) -> float | None:
        """How many times faster `name` is than `other`."""
        return self.seconds[other] / self.seconds[name] if {name, other} <= set(self.seconds) else None


@dataclass(frozen=True)
class Check:
    """Something that must hold, and whether it did."""

    text: str
    found: float
    bound: float
    at_least: bool = True

    @property
    def passed(self) -> bool:
        return self.found >= self.bound if self.at_least else self.found <= self.bound

    def __str__(self) -> str:
        sign = "at least" if self.at_least else "at most"
        return f"{'PASS' if self.passed else 'FAIL'}  {self.text}: {self.found:.3g}, {sign} {self.bound:.3g}"


def main() -> int:
    """Command line."""
    arguments = parse()
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read when torch's threads are made, which is before anything here can run.
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "OMP_WAIT_POLICY": "passive"})
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows: list[Row] = []
    checks: list[Check] = []
    peaks: list[float] = []
    with contextlib.ExitStack() as stack:
        limits = stack.enter_context(Limits(arguments.threads, arguments.read_size * MIB))
        opened = open_kernels(arguments, stack)
        for shape in arguments.shapes:
            rows += measure_shape(shape, opened, limits, arguments)
            peaks += [peak] if (peak := limits.peak()) is not None else []
            if (shape.out, shape.in_) == CHECKED or len(arguments.shapes) == 1:
                checks += list(accuracy_checks(opened, shape))
    bandwidth = max(row.read_bandwidth for row in rows)
    peak = max(peaks, default=None)
    checks = [*speed_checks(rows, next(iter(opened)), bandwidth), *checks]
    print_all(rows, list(opened), bandwidth, peak, checks, arguments.threads, arguments.also)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(to_json(rows, bandwidth, peak, checks, arguments.threads), indent=1))
    if arguments.plot is not None:
        plot(rows, list(opened), bandwidth, peak, arguments.plot)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=words, default=["auto"], metavar="NAME,...", help="auto, amx, avx512, ...")
    parser.add_argument("--modes", type=words, default=["invariant", "fast"], metavar="MODE,...")
    parser.add_argument("--also", type=words, default=[], metavar="SCHEME,...", help="weights beside int4-g64")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="only 12288 x 12288, fewer rows")
    parser.add_argument("--shapes", type=parse_shapes, default=list(SHAPES), metavar="OUTxIN,...")
    parser.add_argument("--rows", type=lambda text: [int(word) for word in words(text)], metavar="M,...")
    parser.add_argument("--seconds", type=float, default=3, help="per line of a table, about (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=4, help="leave out calls that take longer (%(default)s seconds)")
    parser.add_argument("--read-size", type=int, default=1024, metavar="MIB", help="memory to read (%(default)s)")
    cache = race.last_level_cache_nbytes() // MIB
    parser.add_argument("--cache", type=int, default=cache, metavar="MIB", help="weights exceed it (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the roofline (.svg, .png)")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shapes = [shape for shape in SHAPES if (shape.out, shape.in_) == CHECKED]
    arguments.rows = arguments.rows or (QUICK_ROWS if arguments.quick else ROWS)
    return arguments


def words(text: str) -> list[str]:
    return text.split(",")


def parse_shapes(text: str) -> list[LayerShape]:
    found = (map(int, word.split("x")) for word in words(text))
    return [LayerShape("custom", out, in_) for out, in_ in found]


def open_kernels(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> dict[str, Kernels]:
    """Our kernels by their names in tables, each once: two of `--kernels`, or two modes, may mean the same ones."""
    found: dict[str, Kernels] = {}
    for name in arguments.kernels:
        for mode in map(Mode, arguments.modes):
            kernels = stack.enter_context(Kernels(arguments.threads, mode=mode, name=name))
            level = "torch reference" if kernels.level is None else f"{kernels.level.name.lower()} {mode.value}"
            found.setdefault(level, kernels)
    return found


def measure_shape(
    shape: LayerShape, opened: Mapping[str, Kernels], limits: Limits, arguments: argparse.Namespace
) -> Iterator[Row]:
    """One row for each number of rows."""
    cache = arguments.cache * MIB
    weight = race.random_weight(shape.out, shape.in_)
    contestants = race.our_contestants(opened, weight, cache) + race.torch_contestants(weight, cache)
    kernels = next(iter(opened.values()))
    for name in arguments.also:
        other = race.random_weight(shape.out, shape.in_, Scheme.parse(name))
        contestants += race.our_contestants({name: kernels}, other, cache)
    per_row = {contestant.name: 0.0 for contestant in contestants}
    for rows in arguments.rows:
        print(f"{shape.out} x {shape.in_}, M={rows}", file=sys.stderr, flush=True)
        able = [contestant for contestant in contestants if per_row[contestant.name] * rows <= arguments.limit]
        seconds = race.measure(able, Inputs(rows, shape.in_), arguments.seconds)
        per_row |= {name: found / rows for name, found in seconds.items()}
        yield Row(shape, rows, seconds, limits.read_bandwidth())


def speed_checks(rows: Sequence[Row], ours: str, bandwidth: float) -> Iterator[Check]:
    """What must hold at 12288 x 12288, as far as it was measured."""
    found = {row.rows: row for row in rows if (row.shape.out, row.shape.in_) == CHECKED and ours in row.seconds}
    for count, share in OF_RAM.items():
        if count in found:
            text = f"{ours}, M={count}: packed bytes, of RAM read bandwidth"
            yield Check(text, found[count].packed_rate(ours) / bandwidth, share)
    for count, other, bound in OF_TORCH:
        if count in found and (ratio := found[count].ratio(ours, other)) is not None:
            yield Check(f"{ours}, M={count}: times faster than {other}", ratio, bound)


def accuracy_checks(opened: Mapping[str, Kernels], shape: LayerShape) -> Iterator[Check]:
    """Errors against float64, and rows that must have the same bits alone, in a batch, and with another thread."""
    weight = race.random_weight(min(shape.out, 512), shape.in_)
    x = torch.randn(64, shape.in_)
    outliers = x.clone()
    outliers[:, torch.randperm(shape.in_)[:6]] *= 60
    for name, kernels in opened.items():
        bound = MOST_ERROR[kernels.mode]
        for what, values in (("normal activations", x), ("6 channels times 60", outliers)):
            error = race.relative_error(kernels, weight, values.to(torch.bfloat16))
            yield Check(f"{name}, {what}: relative error against float64", error, bound, at_least=False)
        if kernels.level is not None and kernels.mode is Mode.INVARIANT:
            batch = x.to(torch.bfloat16)
            together = kernels.linear(batch, weight)
            with Kernels(kernels.threads + 1, mode=kernels.mode, name=kernels.level.name.lower()) as others:
                alone = torch.cat([others.linear(batch[i : i + 1], weight) for i in range(len(batch))])
            different = float((together != alone).any(1).sum())
            yield Check(f"{name}: rows with other bits alone, with one thread more", different, 0, at_least=False)


def print_all(
    rows: Sequence[Row],
    ours: Sequence[str],
    bandwidth: float,
    peak: float | None,
    checks: Sequence[Check],
    threads: int,
    also: Sequence[str],
) -> None:
    """Print everything as Markdown."""
    cpu = system.cpu()
    print(
        f"{cpu.model}, {threads} of {cpu.present} processors, Linux {platform.release()}, torch {torch.__version__}\n"
    )
    library = load_library()
    if isinstance(library, str):
        print(f"native kernels: {library}\n")
    print(f"RAM read bandwidth: {bandwidth / 1e9:.1f} GB/s (best of the run)  ")
    if peak is not None:
        print(f"compute peak: {peak / 1e12:.2f} TFLOP/s (registers only, the best level's instructions)")
    for shape in dict.fromkeys(row.shape for row in rows):
        print(f"\n### {shape.model}: {shape.out} x {shape.in_}, {format_size(shape.packed_nbytes)} packed")
        for name in ours:
            print(f"\n{name}\n")
            print("| M | ms | GB/s | of RAM | TFLOP/s | " + " | ".join(f"{x} ms | ratio" for x in TORCH) + " |")
            print("|---" * (5 + 2 * len(TORCH)) + "|")
            for row in rows:
                if row.shape == shape and name in row.seconds:
                    print("| " + " | ".join(cells(row, name, bandwidth)) + " |")
        if also:
            print(f"\n{ours[0]}, ms by scheme\n\n| M | int4-g64 | {' | '.join(also)} |")
            print("|---" * (2 + len(also)) + "|")
            for row in rows:
                if row.shape == shape:
                    found = (row.seconds.get(name, math.nan) * 1e3 for name in (ours[0], *also))
                    print(f"| {row.rows} | {' | '.join(f'{milliseconds:.2f}' for milliseconds in found)} |")
    if checks:
        print("\n### Must hold\n\n```")
        print("\n".join(map(str, checks)))
        print("```")


def cells(row: Row, name: str, bandwidth: float) -> Iterator[str]:
    """One line of a table."""
    rate = row.packed_rate(name)
    yield from (str(row.rows), f"{row.seconds[name] * 1e3:.2f}", f"{rate / 1e9:.2f}", f"{rate / bandwidth:.0%}")
    yield f"{row.flops(name) / 1e12:.2f}"
    for other in TORCH:
        ratio = row.ratio(name, other)
        yield from ("-", "-") if ratio is None else (f"{row.seconds[other] * 1e3:.2f}", f"{ratio:.2f}")


def to_json(
    rows: Sequence[Row], bandwidth: float, peak: float | None, checks: Sequence[Check], threads: int
) -> dict[str, object]:
    """All figures, in bytes, seconds and operations."""
    return {
        "cpu": system.cpu().model,
        "threads": threads,
        "read_bandwidth": bandwidth,
        "peak_flops": peak,
        "rows": [
            asdict(row) | {"flops": {x: row.flops(x) for x in row.seconds}, "packed_nbytes": row.shape.packed_nbytes}
            for row in rows
        ],
        "checks": [asdict(check) | {"passed": check.passed} for check in checks],
    }


def plot(rows: Sequence[Row], ours: Sequence[str], bandwidth: float, peak: float | None, file: Path) -> None:
    """TFLOP/s over M of the last shape that must hold, under what memory and arithmetic allow."""
    try:
        import matplotlib
    except ImportError:
        print("bench-kernels: no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shape = next((row.shape for row in rows if (row.shape.out, row.shape.in_) == CHECKED), rows[0].shape)
    shown = [row for row in rows if row.shape == shape]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    counts = [row.rows for row in shown]
    roof = [2 * count * shape.out * shape.in_ / shape.packed_nbytes * bandwidth / 1e12 for count in counts]
    if peak is not None:
        roof = [min(value, peak / 1e12) for value in roof]
    axes.plot(counts, roof, "k--", label=f"limit: {bandwidth / 1e9:.0f} GB/s of packed weights, arithmetic peak")
    for name in (*ours, *TORCH):
        points = [(row.rows, row.flops(name) / 1e12) for row in shown if name in row.seconds]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="rows of activations (M)", ylabel="TFLOP/s")
    axes.set(title=f"{shape.out} x {shape.in_}, int4 in groups of 64")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    sys.exit(main())
