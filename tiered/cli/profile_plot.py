"""The roofline of a profile: how fast linear layers are by their rows, and what bounds them."""

import math
from pathlib import Path
from typing import Any, Final

from tiered.plan import ComputeRate
from tiered.plan.hardware import ROWS, Hardware, bytes_per_weight

_COLOURS: Final = {"int4-g64": "#0b6e99", "int8-g64": "#c4571a", "none": "#5b8c3a"}
_TITLES: Final = {"int4-g64": "int4", "int8-g64": "int8", "none": "16 bits"}
_STYLES: Final = {"invariant": "-", "fast": ":"}


def draw(hardware: Hardware, path: Path) -> None:
    """Write the plot of `hardware` to `path`, whose folder exists."""
    from matplotlib import ticker

    figure = _figure()
    axes = figure.subplots()
    cpu, disk = hardware.cpu, hardware.disk
    fastest = max(_gflops(rows, _seconds(one.rate, rows)) for one in cpu.linear for rows in ROWS)
    for one in cpu.linear:
        if one.scheme == "none" and one.mode == "fast":
            continue  # rounds no activations where weights have 16 bits
        speeds = [_gflops(rows, _seconds(one.rate, rows)) for rows in ROWS]
        label = f"{_TITLES[one.scheme]}, {one.mode}" if one.scheme != "none" else _TITLES[one.scheme]
        axes.plot(ROWS, speeds, _STYLES[one.mode], color=_COLOURS[one.scheme], marker="o", markersize=4, label=label)
    axes.axhline(fastest, color="black", linewidth=1, linestyle="--")
    note = f"compute: the fastest measured, {fastest:.0f} GFLOP/s"
    axes.annotate(note, (ROWS[0], fastest), xytext=(0, 4), textcoords="offset points", fontsize=9)
    memory = {f"{_TITLES[one.scheme]} from memory, {cpu.memory / 1e9:.1f} GB/s": one.scheme for one in cpu.linear}
    bounds = [_bound(axes, cpu.memory, fastest, scheme, label) for label, scheme in memory.items()]
    bounds.append(_bound(axes, disk.read, fastest, "int4-g64", f"int4 from the disk, {disk.read / 1e9:.2f} GB/s"))
    _mark_free_rows(axes, hardware)
    axes.set(xscale="log", yscale="log", xlabel="rows that share a pass", ylabel="GFLOP/s of linear layers")
    axes.set_xticks(ROWS, [str(rows) for rows in ROWS])
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.margins(y=0.08)
    axes.set_title(hardware.name, fontsize=10)
    axes.grid(alpha=0.2)
    axes.legend(fontsize=9, loc="lower right")
    figure.draw_without_rendering()  # only now is it known how steep a line is
    (left, low), (right, high) = axes.transData.transform(((1, 1), (100, 100)))
    for bound in bounds:
        bound.set_rotation(math.degrees(math.atan2(high - low, right - left)))
    figure.savefig(path, dpi=130)


def _bound(axes: Any, bandwidth: float, fastest: float, scheme: str, label: str) -> Any:
    """How fast weights of `scheme` can be computed with that come at `bandwidth`, up to the `fastest` speed; returns
    the text along the line."""
    seconds = bytes_per_weight(scheme) / bandwidth
    end = min(max(fastest * 1e9 * seconds / 2, ROWS[0]), ROWS[-1])
    low, high = (_gflops(rows, seconds) for rows in (ROWS[0], end))
    axes.plot((ROWS[0], end), (low, high), color=_COLOURS[scheme], linewidth=1, alpha=0.45)
    return axes.annotate(
        label,
        ((ROWS[0] * end) ** 0.5, (low * high) ** 0.5),
        rotation_mode="anchor",
        xytext=(-3, 3),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color=_COLOURS[scheme],
    )


def _mark_free_rows(axes: Any, hardware: Hardware) -> None:
    """How many rows take no longer to compute than their weights to arrive from the disk."""
    rate = hardware.cpu.linear_rate("int4-g64", "invariant")
    arrives = bytes_per_weight("int4-g64") / hardware.disk.read
    free = max((rows for rows in range(1, ROWS[-1] + 1) if _seconds(rate, rows) <= arrives), default=None)
    if free is None:
        return
    speed = _gflops(free, _seconds(rate, free))
    axes.plot(free, speed, marker="o", markersize=11, color="black", fillstyle="none")
    axes.annotate(
        f"up to {free} rows of int4 cost\nno more than reading it",
        (free, speed),
        xytext=(0.5, 0.25),
        textcoords="axes fraction",
        fontsize=9,
        arrowprops={"arrowstyle": "->", "linewidth": 0.8},
    )


def _seconds(rate: ComputeRate, rows: int) -> float:
    return rate.seconds(rows, 10**9) / 1e9


def _gflops(rows: float, seconds_per_weight: float) -> float:
    return 2 * rows / seconds_per_weight / 1e9


def _figure() -> Any:
    """An empty figure. Without pyplot, as that looks for a screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(9, 6), layout="constrained")
