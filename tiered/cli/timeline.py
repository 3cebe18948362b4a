"""The timeline of a simulation as a picture: who was busy when, and how far reading was ahead of computing.

On the left the last pass that reads prompts, on the right the passes after it, at most two. Above one row per lane;
below, for some layers in the middle, when each unit is read and when it is computed.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tiered.files import errors_of
from tiered.plan.lanes import Event, Kind
from tiered.plan.play import SimulatedPass
from tiered.plan.simulate import Simulation
from tiered.units import format_seconds

_DECODES: Final = 2
"""Passes after the prompts' that are drawn."""
_COLOURS: Final[dict[Kind, tuple[float, float, float]]] = {
    "layer": (0.12, 0.42, 0.66),
    "resident": (0.30, 0.62, 0.38),
    "head": (0.48, 0.33, 0.65),
    "experts": (0.90, 0.52, 0.12),
    "attention": (0.80, 0.24, 0.28),
    "kv": (0.55, 0.40, 0.32),
    "hidden": (0.45, 0.60, 0.75),
    "gpu": (0.60, 0.60, 0.60),
    "memory": (0.90, 0.75, 0.20),
}
_LABELS: Final[dict[Kind, str]] = {
    "layer": "streamed layers",
    "resident": "what stays in memory",
    "head": "head",
    "experts": "experts on demand",
    "attention": "attention",
    "kv": "KV cache",
    "hidden": "hidden states that wait",
    "gpu": "what the GPU computes",
    "memory": "memory touched for the first time",
}
_LANES: Final = {
    "disk": "disk",
    "bus": "bus",
    "gpu": "GPU",
    "gpu wait": "GPU waits",
    "compute": "computing",
    "wait": "computing waits",
}
_ALWAYS: Final = ("disk", "compute", "wait")
"""Lanes that are drawn even if they are empty, unless a device is all that computes."""
_CLOSE_LAYERS: Final = 4
"""Layers that are shown unit by unit."""
_MOST_UNITS: Final = 60
"""Of these, so many units at most: more could not be told apart."""


def draw(simulation: Simulation, title: str, path: Path) -> None:
    """Write the picture to `path`."""
    panels = _panels(simulation.passes)
    figure = _figure(len(panels))
    axes = figure.subplots(2, len(panels), height_ratios=(1, 1.6), width_ratios=(1, 1.3)[-len(panels) :], squeeze=False)
    used: set[Kind] = set()
    for column, passes in enumerate(panels):
        start, stop = passes[0].start, passes[-1].start + passes[-1].seconds
        inside = (event for event in simulation.events if event.start < stop and event.start + event.seconds > start)
        # Times of a panel begin with it: those of a long simulation are numbers of many digits.
        events = [replace(event, start=event.start - start) for event in inside]
        passes = [replace(passed, start=passed.start - start) for passed in passes]
        used |= {event.kind for event in events}
        lanes, close = axes[:, column]
        _draw_lanes(lanes, events, passes)
        window = _draw_close(close, events, passes[0])
        lanes.axvspan(*window, color="black", alpha=0.12, linewidth=0)
        lanes.set_xlim(0, stop - start)
        for passed in passes[1:]:
            lanes.axvline(passed.start, color="black", linewidth=1, linestyle="--")
        lanes.set_title(_describe(passes), fontsize=10, loc="left")
        close.set_xlabel("seconds from the start of the first pass here")
    _legend(figure, axes, used)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    with errors_of(path):
        figure.savefig(path, dpi=110)


def _panels(passes: Sequence[SimulatedPass]) -> list[Sequence[SimulatedPass]]:
    """The passes of each panel."""
    prompts = [number for number, each in enumerate(passes) if each.load.prompt_tokens]
    first = prompts[-1] + 1 if prompts else 0
    found = [passes[first - 1 : first] if prompts else (), passes[first : first + _DECODES]]
    return [panel for panel in found if panel]


def _describe(passes: Sequence[SimulatedPass]) -> str:
    load = passes[0].load
    if load.prompt_tokens:
        beside = f" beside {load.decoding} that decode" if load.decoding else ""
        return f"a pass over {load.prompt_tokens} tokens of prompts{beside}: {format_seconds(passes[0].seconds)}"
    each = ", ".join(format_seconds(one.seconds) for one in passes)
    sequences = "1 sequence" if load.decoding == 1 else f"{load.decoding} sequences"
    return f"{sequences} decoding, {len(passes)} passes: {each}"


def _draw_lanes(axes: Any, events: Sequence[Event], passes: Sequence[SimulatedPass]) -> None:
    """One row per lane; neighbouring layers differ in shade."""
    stop = passes[-1].start + passes[-1].seconds
    used = {event.lane for event in events}
    lanes = [lane for lane in _LANES if lane in used or (lane in _ALWAYS and "gpu" not in used)]
    labels = []
    for row, lane in enumerate(reversed(lanes)):
        mine = [event for event in events if event.lane == lane]
        spans = [(event.start, event.seconds) for event in mine]
        colours = [_shaded(event) for event in mine]
        axes.broken_barh(spans, (row + 0.1, 0.8), facecolors=colours, linewidth=0)
        inside = ((max(e.start, 0.0), min(e.start + e.seconds, stop)) for e in mine)
        labels.append(f"{_LANES[lane]} {_union(inside) / stop:.0%}")
    axes.set_yticks([row + 0.5 for row in range(len(lanes))], labels, fontsize=9)
    axes.set_ylim(0, len(lanes))
    axes.tick_params(axis="y", length=0)


def _draw_close(axes: Any, events: Sequence[Event], passed: SimulatedPass) -> tuple[float, float]:
    """Each unit of some layers in the middle: its read above, its computing below. Returns the time that is shown."""
    blocks = sorted({block for event in events if (block := _block(event)) is not None and event.kind != "kv"})
    middle = len(blocks) // 2
    chosen = set(blocks[max(0, middle - _CLOSE_LAYERS // 2) :][:_CLOSE_LAYERS])
    stop = passed.start + passed.seconds
    mine = [event for event in events if _block(event) in chosen and event.kind != "kv" and event.start < stop]
    names = list(dict.fromkeys(event.name for event in sorted(mine, key=_place)))[:_MOST_UNITS]
    row_of = {name: row for row, name in enumerate(names)}
    mine = [event for event in mine if event.name in row_of]
    computed = [event for event in mine if event.lane in ("compute", "gpu") and event.kind != "gpu"]
    left, right = computed[0].start, max(event.start + event.seconds for event in computed)
    # Its read may lie a pass before; what comes shortly before is shown.
    left -= (right - left) / 8
    for lane, above in (("disk", 0.06), ("gpu wait", 0.5), ("wait", 0.5), ("gpu", 0.5), ("compute", 0.5)):
        bars = [event for event in mine if event.lane == lane]
        colours = [(0.86, 0.86, 0.86) if lane.endswith("wait") else _COLOURS[event.kind] for event in bars]
        rows, seconds = [row_of[event.name] + above for event in bars], [event.seconds for event in bars]
        starts = [event.start for event in bars]
        axes.barh(rows, seconds, 0.44 if lane == "disk" else 0.4, starts, align="edge", color=colours, linewidth=0)
    axes.set_xlim(left, right)
    axes.set_ylim(len(names), 0)
    firsts = [row for row, name in enumerate(names) if not row or _block_name(name) != _block_name(names[row - 1])]
    axes.set_yticks(firsts, [_block_name(names[row]) for row in firsts], fontsize=9, va="top")
    axes.grid(axis="y", alpha=0.5)
    axes.set_title("the grey part, unit by unit: read above, computed below", fontsize=9, loc="left")
    return left, right


def _place(event: Event) -> tuple[int, int]:
    """Where the event's unit is on the tape; experts on demand come last in their layer."""
    number = event.name.partition("/")[2]
    return _block(event) or 0, int(number) if number.isdecimal() else 1 << 30


def _block_name(name: str) -> str:
    return name.partition("/")[0]


def _legend(figure: Any, axes: Any, used: set[Kind]) -> None:
    from matplotlib.patches import Patch

    kinds = [Patch(color=_COLOURS[kind], label=_LABELS[kind]) for kind in _COLOURS if kind in used]
    figure.legend(handles=kinds, loc="outside upper right", ncols=len(kinds), fontsize=8, frameon=False)
    waits = [Patch(color=(0.86, 0.86, 0.86), label="waited for")]
    axes[1][-1].legend(handles=waits, loc="lower left", fontsize=8)


def _union(spans: Any) -> float:
    """Seconds that any of `spans` (start, stop) covers."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _block(event: Event) -> int | None:
    """The number of an event's layer; None: the head."""
    name = event.name.partition("/")[0]
    return None if name == "head" else int(name.rpartition("-" if name.startswith("layer-") else " ")[2])


def _shaded(event: Event) -> tuple[float, float, float]:
    """The colour of its kind, lighter in every second layer."""
    red, green, blue = _COLOURS[event.kind]
    light = 0.35 if (_block(event) or 0) % 2 else 0.0
    return red + (1 - red) * light, green + (1 - green) * light, blue + (1 - blue) * light


def _figure(panels: int) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(8 * panels, 8), layout="constrained")
