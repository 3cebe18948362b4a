"""Pictures of `which_way.py`: maps of who wins, and lines over context and over the CPU's speed. Needs matplotlib.

In: numbers and colours. Out: a file. Without pyplot, as that looks for a screen.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_LEGEND: Final = {
    "#3f9a63": "CPU only",
    "#3d6fb4": "hybrid: prompts on the GPU, decoding on the CPU",
    "#d1495b": "GPU, weights streamed to it",
}
_BATCH_COLOURS: Final = ("#c9b458", "#d98c3f", "#b0413e", "#5b2a63")
_LEAST, _MOST = 1 / 32, 64.0
"""Of the axis of CPU speeds; what lies beyond is drawn at its ends."""


@dataclass(frozen=True)
class Tile:
    """One cell of a map."""

    colour: str
    text: str


@dataclass(frozen=True)
class Map:
    """Tiles by prompt (rows) and generation (columns)."""

    title: str
    row_title: str
    prompts: Sequence[int]
    generated: Sequence[int]
    tiles: Sequence[Sequence[Tile]]


@dataclass(frozen=True)
class Line:
    """Values over x; None: nothing fits there."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: str | None = None


@dataclass(frozen=True)
class Panel:
    """Lines in one set of axes."""

    title: str
    lines: Sequence[Line]


def blend(colour: str, strength: float) -> str:
    """`colour` on white: 0 is white, 1 the colour itself."""
    parts = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(255 - strength * (255 - part)):02x}" for part in parts)


def draw_maps(path: Path, model: str, maps: Sequence[Map]) -> None:
    """All maps, one row of axes for each batch size."""
    from matplotlib.patches import Patch

    rows = list(dict.fromkeys(one.row_title for one in maps))
    columns = len(maps) // len(rows)
    figure = _figure(2.35 * columns + 0.4, 2.35 * len(rows) + 0.9)
    grid = figure.subplots(len(rows), columns, sharex=True, sharey=True, squeeze=False)
    for axes, one in zip(grid.flat, maps, strict=True):
        _draw_map(axes, one)
    for at, title in enumerate(rows):
        grid[at][0].set_ylabel(f"{title}\nprompt tokens", fontsize=9)
    for at, axes in enumerate(grid[0]):
        axes.set_title(maps[at].title, fontsize=10, fontweight="bold")
    for axes in grid[-1]:
        axes.set_xlabel("generated tokens", fontsize=9)
    figure.suptitle(
        f"{model}, weights in 4 bits: the fastest way, and its generated tokens/s (prompts included). "
        "Pale: hardly faster than the next; full: 3x or more. Predictions; not tried on a GPU.",
        fontsize=10,
    )
    handles = [Patch(color=colour, label=name) for colour, name in _LEGEND.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    _save(figure, path)


def _draw_map(axes: Any, one: Map) -> None:
    from matplotlib.patches import Rectangle

    for row, tiles in enumerate(one.tiles):
        for column, tile in enumerate(tiles):
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=tile.colour, edgecolor="white"))
            axes.text(column, row, tile.text, ha="center", va="center", fontsize=6.5)
    axes.set_xlim(-0.5, len(one.generated) - 0.5)
    axes.set_ylim(-0.5, len(one.prompts) - 0.5)
    axes.set_aspect("equal")
    axes.set_xticks(range(len(one.generated)), one.generated, fontsize=7)
    axes.set_yticks(range(len(one.prompts)), one.prompts, fontsize=7)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_speed(path: Path, model: str, races: Sequence[Panel], curves: Sequence[Panel]) -> None:
    """Break-even speeds by context above, tokens/s by CPU speed below."""
    figure = _figure(13, 7.6)
    above, below = figure.subfigures(2, 1)
    above.suptitle(
        f"{model}, 4 bits: how many times as fast as it is must the CPU be, to decode as fast as the GPU?", fontsize=11
    )
    grid = above.subplots(1, len(races), sharey=True)
    for axes, panel in zip(grid, races, strict=True):
        _draw_race(axes, panel)
    grid[0].set_ylabel("break-even CPU speed")
    handles, labels = grid[0].get_legend_handles_labels()
    above.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    below.suptitle("The T4 machine, 512 + 32 tokens, batch 8: tokens/s over the speed of its CPU", fontsize=11)
    grid = below.subplots(1, len(curves), sharey=True)
    for axes, panel in zip(grid, curves, strict=True):
        _draw_curves(axes, panel)
    grid[0].set_ylabel("generated tokens/s")
    handles, labels = grid[0].get_legend_handles_labels()
    below.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    _save(figure, path)


def _draw_race(axes: Any, panel: Panel) -> None:
    axes.axhspan(_LEAST / 4, 1, color="#3f9a63", alpha=0.12)
    axes.axhspan(1, _MOST * 4, color="#d1495b", alpha=0.10)
    for line, colour in zip(panel.lines, _BATCH_COLOURS, strict=True):
        points = [(x, min(max(y, _LEAST), _MOST)) for x, y in zip(line.x, line.y, strict=True) if y is not None]
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, color=colour, label=line.name) if points else None
    axes.axhline(1, color="black", lw=0.8)
    axes.text(0.03, 0.02, "CPU decodes faster", transform=axes.transAxes, fontsize=8, color="#2d6e47")
    axes.text(0.03, 0.945, "GPU decodes faster", transform=axes.transAxes, fontsize=8, color="#a23342")
    _log_axis(axes.xaxis, axes.set_xscale, panel.lines[0].x)
    _log_axis(axes.yaxis, axes.set_yscale, [2.0**at for at in range(-5, 7)])
    axes.set_ylim(_LEAST / 2, _MOST * 2.2)
    axes.set_title(panel.title, fontsize=10, fontweight="bold")
    axes.set_xlabel("tokens of context")


def _draw_curves(axes: Any, panel: Panel) -> None:
    for line in panel.lines:
        points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=line.colour, lw=2, label=line.name)
    axes.axvline(1, color="black", lw=0.8, ls=":")
    axes.set_yscale("log")
    _log_axis(axes.xaxis, axes.set_xscale, [2.0**at for at in range(-3, 6)])
    axes.grid(alpha=0.25)
    axes.set_title(panel.title, fontsize=10, fontweight="bold")
    axes.set_xlabel("CPU speed, times that of the machine")


def _log_axis(axis: Any, set_scale: Any, ticks: Sequence[float]) -> None:
    set_scale("log", base=2)
    labels = [f"1/{round(1 / tick)}" if tick < 1 else f"{tick:g}" for tick in ticks]
    axis.set_ticks(ticks, labels, fontsize=8)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    if path.suffix != ".png":
        figure.savefig(path)
        return
    from PIL import Image  # matplotlib brings it

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    # A palette is a third of the bytes, in a repository that keeps them for good.
    Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
