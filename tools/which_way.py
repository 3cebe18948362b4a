"""Which way is faster: the processor, weights streamed through a GPU, or prompts on the GPU and the rest on the CPU?

    python -m tools.which_way maps PICTURE [--model opt-175b]     prompt x generation per machine, who wins
    python -m tools.which_way speed PICTURE [--model opt-175b]    how fast a CPU must be to decode as a GPU does
    python -m tools.which_way table                               predictions beside published figures, as Markdown

Rows are those of `tiered plan` (`plan/strategies.py`): predictions of plans that run; those with a GPU have not been
tried on one. Machines are the files of configs/hardware; a server without a GPU is given the T4 of the FlexGen paper,
as in the discussion that asked the question. Pictures need matplotlib, and each takes about a minute of one core.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from tiered.configs_path import config_dir
from tiered.errors import ConfigError
from tiered.plan.budget import DEFAULT_SHARE
from tiered.plan.hardware import Hardware
from tiered.plan.inputs import ModelShape
from tiered.plan.machines import load_hardware
from tiered.plan.shapes import known_shapes
from tiered.plan.strategies import BOTH, CPU, GPU, Ask, Row, compare
from tools import published
from tools import which_way_plot as plot

PROMPTS: Final = (32, 64, 128, 256, 512, 1024, 1536)
GENERATED: Final = (8, 16, 32, 64, 128, 256, 512)
"""OPT's context ends at 2048 tokens, so the longest prompt is no longer."""
BATCHES: Final = (1, 8, None)
SEQUENCES: Final = 128
"""Of the job whose batch size is chosen."""
MACHINES: Final = (
    "t4-208gb",
    "cloud-96vcpu+t4",
    "epyc-7742+t4",
    "xeon-6426y-2s-256gb+t4",
    "desktop-2025",
    "h100-server",
)
COLOURS: Final = {CPU: "#3f9a63", BOTH: "#3d6fb4", GPU: "#d1495b"}
"""In the order of what they need."""
NAMES: Final = {
    CPU: "CPU only",
    GPU: "GPU, weights streamed to it",
    BOTH: "hybrid: prompts on the GPU, decoding on the CPU",
}
_SAME: Final = 1.02
"""Ways that differ by less are called equally fast."""
SLOWEST: Final = 1 / 32
FASTEST: Final = 64.0
"""Factors on the CPU's speed between which a break-even is looked for."""
_EXACT: Final = 0.05
"""Octaves to which it is found."""
CONTEXTS: Final = (64, 128, 256, 512, 1024, 2048)
RACES: Final = ("t4-208gb", "xeon-6426y-2s-256gb+t4", "desktop-2025", "h100-server")
QUANTS: Final = {"int4": "4 bits", "int8": "8 bits", "none": "16 bits"}
FACTORS: Final = tuple(2 ** (step / 2) for step in range(-6, 11))


def machine(name: str) -> Hardware:
    """A file of configs/hardware; "NAME+t4": with the T4 of the FlexGen paper in it."""
    base, _, added = name.partition("+")
    found = load_hardware(base)
    return replace(found, gpu=load_hardware("t4-208gb").gpu, name=f"{found.name}, T4 added") if added else found


def scaled(hardware: Hardware, factor: float) -> Hardware:
    """`hardware` with a CPU whose arithmetic and memory are `factor` times as fast."""
    cpu = hardware.cpu
    linear = tuple(
        replace(one, rate=replace(one.rate, seconds_per_weight=tuple(s / factor for s in one.rate.seconds_per_weight)))
        for one in cpu.linear
    )
    faster = {name: getattr(cpu, name) * factor for name in ("memory", "attention", "prefill_attention")}
    return replace(hardware, cpu=replace(cpu, linear=linear, **faster))


def ways(
    shapes: dict[str, ModelShape],
    hardware: Hardware,
    prompt: int,
    generate: int,
    batch: int | None,
    quant: str = "int4",
) -> dict[str, Row]:
    """The row of each way that fits, by name; `batch` None: each way chooses its own for a job of SEQUENCES."""
    vram = None if hardware.gpu is None else int(hardware.gpu.vram * DEFAULT_SHARE)
    ram = int(hardware.ram * DEFAULT_SHARE)
    ask = Ask(prompt, generate, batch or SEQUENCES, batch, ram, vram, "throughput")
    # The quickest of each comes first.
    rows = compare(shapes.__getitem__, (quant,), hardware, ask).rows
    return {row.strategy: row for row in reversed(rows)}


@dataclass(frozen=True)
class Cell:
    """Who wins, and by how much."""

    winner: str | None
    """None: nothing fits."""
    lead: float
    """Times as fast as the next; infinite where nothing else fits."""
    tokens_per_second: float

    @classmethod
    def of(cls, rows: dict[str, Row]) -> "Cell":
        """The quickest of `rows`, or the one that needs least, of those that are about as quick."""
        if not rows:
            return cls(None, 1.0, 0.0)
        least = min(row.prediction.seconds for row in rows.values())
        winner = next(way for way in COLOURS if way in rows and rows[way].prediction.seconds <= _SAME * least)
        won = rows[winner].prediction
        rest = [row.prediction.seconds for way, row in rows.items() if way != winner]
        return cls(winner, max(1.0, min(rest) / won.seconds) if rest else math.inf, won.tokens_per_second)


def break_even(ratio: Callable[[float], float | None]) -> float | None:
    """The factor on the CPU's speed at which `ratio`, how many times as fast as the GPU the CPU is, passes 1; bisected.

    0 where the CPU is ahead at every speed that is looked at, infinite where the GPU is; None where one does not fit.
    """
    low, high = math.log2(SLOWEST), math.log2(FASTEST)
    ends = [ratio(2**at) for at in (low, high)]
    if ends[0] is None or ends[1] is None:
        return None
    if ends[0] >= 1 or ends[1] <= 1:
        return 0.0 if ends[0] >= 1 else math.inf
    while high - low > _EXACT:
        middle = (low + high) / 2
        found = ratio(2**middle)
        if found is None:
            return None
        low, high = (middle, high) if found < 1 else (low, middle)
    return float(2 ** ((low + high) / 2))


def decode_ratio(rows: dict[str, Row]) -> float | None:
    """How many times as fast as on the GPU decoding is on the CPU; None where one of them does not fit."""
    cpu, gpu = (rows[way].prediction.decode_tokens_per_second if way in rows else None for way in (BOTH, GPU))
    return cpu / gpu if cpu and gpu else None


def shapes_of(model: str) -> dict[str, ModelShape]:
    """By quantization; raises ConfigError for a model that configs/models lacks."""
    found = known_shapes(config_dir() / "models", model)
    if found is None:
        raise ConfigError(f"--model {model!r}: expected a name of configs/models")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("maps", "speed", "table"))
    parser.add_argument("picture", type=Path, nargs="?", help="a file to draw: .png or .svg")
    parser.add_argument("--model", default="opt-175b")
    asked = parser.parse_args(arguments)
    if asked.what == "table":
        print("\n".join(table()))
        return 0
    if asked.picture is None:
        parser.error("maps and speed need the path of a picture")
    try:
        shapes = shapes_of(asked.model)
    except ConfigError as error:
        parser.error(str(error))
    if asked.what == "maps":
        plot.draw_maps(asked.picture, asked.model, list(maps(shapes)))
    else:
        plot.draw_speed(asked.picture, asked.model, list(races(shapes)), list(curves(shapes)))
    return 0


def maps(shapes: dict[str, ModelShape]) -> Iterator[plot.Map]:
    """A map for each machine and batch size."""
    for batch in BATCHES:
        for name in MACHINES:
            hardware = machine(name)
            cells = [[Cell.of(ways(shapes, hardware, p, n, batch)) for n in GENERATED] for p in PROMPTS]
            tiles = [[_tile(cell) for cell in row] for row in cells]
            title = name.replace("-2s-256gb", "").replace("+", " + ")
            yield plot.Map(title, _batch(batch), PROMPTS, GENERATED, tiles)


def _tile(cell: Cell) -> plot.Tile:
    if cell.winner is None:
        return plot.Tile("#dddddd", "")
    # As fast as the next: pale; three times as fast or more: full.
    strength = 0.35 + 0.65 * min(1.0, math.log(min(cell.lead, 3.0), 3))
    return plot.Tile(plot.blend(COLOURS[cell.winner], strength), _short(cell.tokens_per_second))


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.95 else f"{value:.2f}".lstrip("0")


def _batch(batch: int | None) -> str:
    return f"each way's best batch (of {SEQUENCES})" if batch is None else f"batch {batch}"


def races(shapes: dict[str, ModelShape]) -> Iterator[plot.Panel]:
    """For each machine, how fast its CPU must be to decode as fast as its GPU, by context and batch size."""
    for name in RACES:
        hardware = machine(name)

        def ratio(context: int, batch: int | None, factor: float, hardware: Hardware = hardware) -> float | None:
            return decode_ratio(ways(shapes, scaled(hardware, factor), context - 32, 32, batch))

        lines = [
            plot.Line(
                "best batch" if batch is None else f"batch {batch}",
                CONTEXTS,
                tuple(break_even(partial(ratio, context, batch)) for context in CONTEXTS),
            )
            for batch in (1, 8, 32, None)
        ]
        yield plot.Panel(name.replace("-2s-256gb", "").replace("+", " + "), lines)


def curves(shapes: dict[str, ModelShape]) -> Iterator[plot.Panel]:
    """On the machine of the FlexGen paper, the load of the discussion by CPU speed, for each number of weight bits."""
    hardware = machine("t4-208gb")
    for quant, title in QUANTS.items():
        found = [ways(shapes, scaled(hardware, factor), 512, 32, 8, quant) for factor in FACTORS]
        lines = [
            plot.Line(
                NAMES[way],
                FACTORS,
                tuple(rows[way].prediction.tokens_per_second if way in rows else None for rows in found),
                COLOURS[way],
            )
            for way in COLOURS
        ]
        yield plot.Panel(title, lines)


def table() -> Iterator[str]:
    """Predictions beside published figures."""
    yield "| system, prompt/generated | published | predicted | predicted / published | |"
    yield "|---|---|---|---|---|"
    paper = load_hardware("t4-208gb")
    servers = {"xeon": "xeon-6426y-2s-256gb", "epyc": "epyc-7742", "cloud": "cloud-96vcpu"}
    for row in published.rows(paper, {short: load_hardware(name) for short, name in servers.items()}):
        ratio = row.predicted / row.published
        assert 0.7 <= ratio <= 1.4 or row.why, row.system
        yield f"| {row.system} | {row.published:.3g} | {row.predicted:.3g} | {ratio:.2f} | {row.why} |"
    yield ""
    yield "| where FlexGen's time goes | published | predicted |"
    yield "|---|---|---|"
    for row in published.breakdown(paper):
        yield f"| {row.system} | {row.published:,.0f} | {row.predicted:,.0f} |"


if __name__ == "__main__":
    sys.exit(main())
