"""How errors are shown: a line each, and for a command that was asked for several things, those that failed."""

import contextlib
from collections.abc import Sequence
from typing import Final

import click

from tiered.errors import TieredError

_LONGEST_LINE: Final = 2000

Failure = tuple[str, TieredError]
"""What was asked for, and why it failed."""


def end_failed(failures: Sequence[Failure], total: int) -> None:
    """Unless there are none: name `failures`, of `total` things asked for, and end the command with a failing code.

    What was the only one raises its error, as if nothing had been done.
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
        # What comes last is what to do.
        line = f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
    with contextlib.suppress(OSError):
        click.echo(f"tiered: {line}", err=True)


def in_one_line(text: str) -> str:
    """`text` as it may be shown, whatever is in the names and values that it repeats from files and arguments."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.replace("\n", " "))
