"""Pictures of a benchmark: who waited for whom in one traced run, and tokens per second beside what was possible.

In: rows, and the trace that `tiered generate --trace` wrote. Out: a file, or the bytes of a picture. Needs matplotlib,
which `check_can_draw` says before anything runs.
"""

import importlib.util
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tiered.bench.output import label
from tiered.bench.rows import Phase, Row, varied
from tiered.errors import ConfigError

SUFFIXES: Final = (".png", ".svg")
_TITLES: Final[dict[Phase, str]] = {"prefill": "reading prompts", "decode": "writing", "both": "both"}
_LANES: Final = (
    ("disk", ("reads", "#3b76af"), ("idle", "#f0b64f")),
    ("processor", ("computes", "#4f9d5d"), ("waits for the disk", "#c8524d")),
)
"""Who, and what each does with which color."""
_PASSES: Final = 3
"""That the close look shows, the last ones."""

Interval = tuple[float, float]
"""Start and end, in seconds."""


@dataclass(frozen=True)
class Timeline:
    """When which side worked, and which waited; intervals of a lane do not overlap."""

    lanes: dict[str, list[Interval]]
    """By what is done, as `_LANES` has it."""
    passes: list[float]
    """When passes began."""
    end: float

    def share(self, lane: str, start: float, end: float) -> float:
        """Of the time from `start` to `end`, how much `lane` takes."""
        inside = (min(high, end) - max(low, start) for low, high in self.lanes[lane])
        return sum(piece for piece in inside if piece > 0) / (end - start) if end > start else 0.0


def check_can_draw(option: str, path: Path | None = None) -> None:
    """Raise ConfigError where `option` cannot be met: matplotlib is not there, or `path` is no picture's name."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{option}: needs matplotlib, which is not installed; pip install matplotlib")
    if path is not None and path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{option} {path}: expected a name that ends in {' or '.join(SUFFIXES)}")


def read_timeline(path: Path) -> Timeline | None:
    """The timeline of the trace at `path`, from the first pass on; None where there is no pass."""
    events = [event for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if event["ph"] == "X"]
    found: dict[str, list[Interval]] = {"disk": [], "compute": [], "wait": []}
    passes = sorted(event["ts"] / 1e6 for event in events if event["cat"] == "compute" and event["name"] == "record")
    for event in events:
        if event["cat"] in found:
            start = event["ts"] / 1e6
            found[event["cat"]].append((start, start + event["dur"] / 1e6))
    disk, compute, waits = (union(found[lane]) for lane in ("disk", "compute", "wait"))
    if not passes:
        return None
    start, end = passes[0], max(high for lane in (compute, waits) for _, high in lane)
    # What is read before the first pass, and after the last one, nobody computes with.
    disk = clip(disk, start, end)
    names = [what for _, *parts in _LANES for what, _ in parts]
    lanes = dict(zip(names, (disk, gaps(disk, start, end), compute, waits), strict=True))
    moved = {lane: [(low - start, high - start) for low, high in pieces] for lane, pieces in lanes.items()}
    return Timeline(moved, [moment - start for moment in passes], end - start)


def union(pieces: Iterable[Interval], joined: float = 0.0) -> list[Interval]:
    """`pieces` in order, without overlaps; those less than `joined` apart become one."""
    found: list[Interval] = []
    for low, high in sorted(pieces):
        if found and low <= found[-1][1] + joined:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return found


def clip(pieces: Sequence[Interval], start: float, end: float) -> list[Interval]:
    """What of `pieces` lies between `start` and `end`."""
    inside = ((max(low, start), min(high, end)) for low, high in pieces)
    return [(low, high) for low, high in inside if low < high]


def gaps(pieces: Sequence[Interval], start: float, end: float) -> list[Interval]:
    """What lies between `pieces`, which are in order, from `start` to `end`."""
    edges = [start, *(edge for piece in pieces for edge in piece), end]
    return [(low, high) for low, high in zip(edges[::2], edges[1::2], strict=True) if low < high]


def draw(rows: Sequence[Row], timeline: Timeline | None, title: str, path: Path) -> None:
    """All pictures in one file, PNG or SVG by its suffix."""
    path.write_bytes(picture(rows, timeline, title, path.suffix.lower().removeprefix(".")))


def picture(rows: Sequence[Row], timeline: Timeline | None, title: str, form: str) -> bytes:
    """All pictures in one, "png" or "svg": bars above, the whole run and its last passes below."""
    from matplotlib.figure import Figure

    phases: list[Phase] = [phase for phase in _TITLES if any(row.phase == phase for row in rows)]
    settings = len({row.setting for row in rows})
    heights = [1.6 + 0.5 * settings] + ([2.1, 2.1] if timeline is not None else [])
    figure = Figure(figsize=(11, sum(heights) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    above, *below = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for number, (axes, phase) in enumerate(
        zip(above.subplots(1, len(phases), sharey=True, squeeze=False)[0], phases, strict=True)
    ):
        _bars(axes, [row for row in rows if row.phase == phase], number == 0)
        axes.set_title(_TITLES[phase], fontsize=10)
    known = {
        name: handle for axes in above.axes for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    above.legend(known.values(), known, loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    if timeline is not None:
        from_pass = timeline.passes[-_PASSES] if len(timeline.passes) > _PASSES else 0.0
        first = 1 + max(0, len(timeline.passes) - _PASSES)
        shown = f"its passes {first} to {len(timeline.passes)}"
        traced = label(rows[0].setting, varied(row.setting for row in rows))
        whole = f"the first run, {traced}"
        for part, start, what in zip(below, (0.0, from_pass), (whole, shown), strict=True):
            _lanes(part.subplots(), timeline, start, what)
        handles, names = below[0].axes[0].get_legend_handles_labels()
        below[0].legend(handles, names, loc="outside lower right", ncols=4, fontsize=8, frameon=False)
    bytes_ = io.BytesIO()
    figure.savefig(bytes_, format=form, dpi=150)
    return bytes_.getvalue()


def _bars(axes: Any, rows: Sequence[Row], is_first: bool) -> None:
    """Tokens per second of one phase, with the bound and the prediction of each."""
    different = varied(row.setting for row in rows)
    has_tests = len({row.test for row in rows}) > 1
    names = [", ".join([*([row.test] if has_tests else []), label(row.setting, different)]) for row in rows]
    places = range(len(rows))
    means, sds = [row.tokens_per_second for row in rows], [row.sd or 0 for row in rows]
    axes.barh(places, means, xerr=sds, height=0.6, color="#8fb4d6", capsize=3, label="measured, with sd")
    for values, mark, color, name in (
        ([row.bound for row in rows], "|", "black", "bound"),
        ([row.predicted for row in rows], "D", "#c8524d", "predicted"),
    ):
        known = [(value, place) for value, place in zip(values, places, strict=True) if value]
        if known:
            size = 17 if mark == "|" else 6
            axes.plot(*zip(*known, strict=True), mark, color=color, ms=size, mew=1.8, fillstyle="none", label=name)
    for place, mean in zip(places, means, strict=True):
        # At the bar's foot, above the line of the deviation.
        where = {"xytext": (4, 1), "textcoords": "offset points", "va": "bottom", "fontsize": 8}
        axes.annotate(f"{mean:.3g}", (0, place), **where)
    axes.set_yticks(places, names)
    axes.set_xlabel("tokens/s")
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    if is_first:  # the others share its vertical axis
        axes.set_ylim(len(rows) - 0.4, -0.6)


def _lanes(axes: Any, timeline: Timeline, start: float, what: str) -> None:
    """Both lanes from `start` to the end."""
    end = timeline.end
    names = []
    for place, (who, *parts) in enumerate(_LANES):
        told = []
        for does, color in parts:
            pieces = union(clip(timeline.lanes[does], start, end), (end - start) / 3000)
            spans = [(low, high - low) for low, high in pieces]
            axes.broken_barh(spans, (place - 0.4, 0.8), facecolors=color, rasterized=True, label=f"{who} {does}")
            told.append(f"{does} {timeline.share(does, start, end):.0%}")
        names.append("\n".join([who, *told]))
    axes.set_yticks(range(len(_LANES)), names, fontsize=9)
    axes.set_ylim(len(_LANES) - 0.45, -0.55)
    for moment in timeline.passes:
        if moment >= start:
            axes.axvline(moment, color="black", linewidth=0.7, linestyle=":")
    axes.set_xlim(start, end)
    axes.set_xlabel("seconds; dotted: a pass begins")
    axes.set_title(f"who waited for whom: {what}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
