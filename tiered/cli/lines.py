"""What commands print, in lines: aligned columns, JSON, an error in one line, and which of several things failed.

The same on a terminal, in a pipe and in a log.
"""

import contextlib
import json
from collections.abc import Sequence
from typing import Any, Final

import click

from tiered.errors import TieredError

_GAP: Final = "  "
_LONGEST_LINE: Final = 2000

Failure = tuple[str, TieredError]
"""What was asked for, and why it failed."""


def columns(rows: Sequence[Sequence[str]], align: str, indent: str = "") -> list[str]:
    """One line per row. `align` has one letter per column: "<" or ">"."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if side == ">" else cell.ljust(width)
            for cell, width, side in zip(row, widths, align, strict=True)
        )
        lines.append((indent + _GAP.join(cells)).rstrip())
    return lines


def print_json(result: dict[str, Any]) -> None:
    """What a command that was asked for --json prints on standard output."""
    click.echo(json.dumps(result, indent=2, ensure_ascii=False))


def end_failed(failures: Sequence[Failure], total: int) -> None:
    """If there are `failures` among the `total` things asked for, name them and end the command with exit code 1.

    If only one thing was asked for, its error is raised instead.
    """
    if not failures:
        return
    if total == 1:
        raise failures[0][1]
    for name, error in failures:
        say(f"{name}: {error}")
    raise click.exceptions.Exit(1)


def say(text: str) -> None:
    """One line on standard error."""
    line = in_one_line(text)
    if len(line) > _LONGEST_LINE:
        # The end is kept, as it says what to do.
        line = f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
    with contextlib.suppress(OSError):
        click.echo(f"tiered: {line}", err=True)


def in_one_line(text: str) -> str:
    """`text` in one printable line: names and values that it repeats from files and arguments may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.replace("\n", " "))
