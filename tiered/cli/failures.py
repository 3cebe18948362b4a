"""What became of some of several things that a command was asked for, while it did the others."""

from collections.abc import Sequence

import click

from tiered.errors import TieredError

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
        click.echo(f"tiered: {name}: {error}", err=True)
    raise click.exceptions.Exit(1)
