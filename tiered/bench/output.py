"""The rows of a benchmark as Markdown, CSV or JSON, always with the machine, the disk and the command.

In: a `Result`. Out: text. `page.py` makes a web page of the same.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from tiered.bench.facts import Machine, StoreFacts, format_count
from tiered.bench.rows import Row, common, varied
from tiered.bench.runs import Run
from tiered.bench.workload import Setting
from tiered.units import format_rate, format_size

LEGEND: Final = (
    "pp: reading prompts; tg: writing, of which the first token of a completion counts as reading; pp+tg: both, all "
    "tokens over the whole time. ± is the standard deviation of the runs. GB are what was read and written meanwhile; "
    "of disk: share of the raw bandwidth that the same run measured; of bound: of what this disk and these kernels "
    "allow, max((S - M) / B, C). Peak RSS by the kernel."
)


@dataclass(frozen=True)
class Result:
    """Everything that is known when the last run has ended, or the benchmark was interrupted."""

    command: str
    machine: Machine
    stores: Sequence[StoreFacts]
    conditions: str
    """What was cold, limited or slowed down."""
    rows: Sequence[Row]
    runs: Sequence[Run]
    notes: Sequence[str] = field(default=())
    """What failed, or that it was interrupted."""

    def facts(self) -> dict[str, str]:
        """What stands above the table, by what it is about."""
        found = {"command": self.command, **self.machine.lines()}
        found |= {f"store {number}": store.line() for number, store in enumerate(self.stores, 1)}
        if len(self.stores) == 1:
            found["store"] = found.pop("store 1")
        shared = common(row.setting for row in self.rows)
        if shared:
            found["settings"] = ", ".join(f"{axis.replace('_', ' ')} {value}" for axis, value in shared.items())
        raw = [run.report["raw_disk_bandwidth"] for run in self.runs if run.report is not None]
        if known := [one for one in raw if one is not None]:
            found["raw disk"] = f"{format_rate(min(known))} to {format_rate(max(known))}, measured after each run"
        return {**found, "runs": self.conditions}


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells. What no run has a figure for, and settings that are the same everywhere, have no column."""
    # Kernels, mode and threads are there already, as what they came to.
    axes = [axis for axis in varied(row.setting for row in rows) if axis not in ("kernels", "kernel_mode", "threads")]
    titles = ["model", "size", "params", "backend", "threads", *(axis.replace("_", " ") for axis in axes), "batch"]
    titles += ["test", "t/s"]
    cells = [[row.model, format_size(row.size), format_count(row.params), row.backend] for row in rows]
    for line, row in zip(cells, rows, strict=True):
        line += [str(row.threads), *(str(getattr(row.setting, axis) or "-") for axis in axes), str(row.setting.batch)]
        line += [row.test, rate(row.tokens_per_second, row.sd)]
    for title, of in (
        ("predicted t/s", [None if row.predicted is None else f"{row.predicted:.3g}" for row in rows]),
        ("GB/token", [f"{row.bytes_per_token / 1e9:.3g}" for row in rows]),
        ("GB/s", [f"{row.disk_bandwidth / 1e9:.2f}" for row in rows]),
        ("of disk", [percent(row.share_of_disk) for row in rows]),
        ("of bound", [percent(row.share_of_bound) for row in rows]),
        ("bound by", [row.bottleneck for row in rows]),
        ("peak RSS", [format_size(row.peak_rss_bytes) for row in rows]),
    ):
        if any(of):
            titles.append(title)
            for line, cell in zip(cells, of, strict=True):
                line.append(cell or "-")
    return titles, cells


def rate(mean: float, sd: float | None) -> str:
    """ "12.3 ± 0.4", with as many decimals as tell something."""
    decimals = 0 if mean >= 100 else 1 if mean >= 10 else 2 if mean >= 1 else 4
    return f"{mean:.{decimals}f}" + ("" if sd is None else f" ± {sd:.{decimals}f}")


def percent(share: float | None) -> str | None:
    """ "87 %"."""
    return None if share is None else f"{share:.0%}".replace("%", " %")


def markdown(result: Result) -> str:
    """Facts, table and legend, as an issue or a document takes them."""
    lines = [f"- {title}: {f'`{text}`' if title == 'command' else text}" for title, text in result.facts().items()]
    lines += [f"- **{note}**" for note in result.notes]
    if result.rows:
        titles, cells = table(result.rows)
        align = ["---" if title in ("model", "backend", "test", "bound by") else "---:" for title in titles]
        lines += ["", *(f"| {' | '.join(row)} |" for row in (titles, align, *cells)), "", LEGEND]
    return "\n".join(lines) + "\n"


def as_json(result: Result) -> str:
    """One object: facts, rows, and every run with its whole report."""
    machine = asdict(result.machine)
    value: dict[str, Any] = {
        **{"command": result.command, "machine": machine, "conditions": result.conditions},
        **{"stores": [asdict(store) for store in result.stores], "notes": list(result.notes)},
        **{"rows": [row.to_json() for row in result.rows]},
        **{"runs": [run.to_json(result.machine.name) for run in result.runs]},
    }
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def as_csv(result: Result) -> str:
    """A line per row, with machine and command in each, so that files can be put together."""
    text = io.StringIO()
    about = {"command": result.command, "machine": result.machine.name, "disk": result.machine.disk}
    lines = [{**row.to_json(), **about} for row in result.rows]
    names = list(lines[0]) if lines else list(about)
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def label(setting: Setting, axes: Sequence[str]) -> str:
    """What tells `setting` from others, for a picture: batch size, test, and the values of `axes`."""
    more = [f"{axis.replace('_', ' ')} {getattr(setting, axis) or '-'}" for axis in axes]
    return ", ".join([f"batch {setting.batch}", *more])
