"""Options of commands that run a model: what is computed in, by what, in which memory, and where the cache is.

What they mean is in `run_request.py`, which loads torch; this module does not, so that --help is there at once.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

_GIVEN = ParameterSource.COMMANDLINE
_Command = Callable[..., Any]


def run_options(invariant: str) -> Callable[[_Command], _Command]:
    """Adds them to a command, in this order; `invariant` says what the kernels' invariant mode gives it."""
    options = (
        click.option(
            "--dtype", default="auto", show_default=True, help="auto, bfloat16 or float32: what is computed in."
        ),
        click.option("--verify", default="first", show_default=True, type=click.Choice(["first", "always", "never"])),
        click.option("--tiers", default="disk,cpu", show_default=True, help="Where weights may be, slowest first."),
        click.option("--ram", help="Budget for the whole process, such as 2GiB. [default: 90% of what is free]"),
        click.option("--threads", type=click.IntRange(min=1), help="Compute threads. [default: all processors]"),
        click.option(
            "--kernels",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "torch", "scalar", "avx2", "avx512", "amx"]),
            help="What multiplies; auto is the best that this machine has.",
        ),
        click.option(
            "--kernel-mode",
            default="invariant",
            show_default=True,
            type=click.Choice(["invariant", "fast"]),
            help=f"invariant: {invariant}. fast: activations may be rounded to 8 bits.",
        ),
    )
    return _adding(options)


def kv_options(command: _Command) -> _Command:
    """Adds where the KV cache is, and in how many bits."""
    tier = click.option(
        "--kv",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "cpu", "disk"]),
        help="Where the KV cache is; auto: in memory if it fits.",
    )
    folder = click.option(
        "--kv-dir",
        type=click.Path(path_type=Path, file_okay=False, exists=True),
        help="Where a KV cache on disk goes. [default: beside the store]",
    )
    return _adding([tier, kv_bits_option, folder])(command)


kv_bits_option = click.option(
    "--kv-bits", default="16", show_default=True, type=click.Choice(["16", "8", "4"]), help="Precision of the KV cache."
)


def stated_options() -> frozenset[str]:
    """Names of the options that the running command was given, as opposed to their defaults."""
    context = click.get_current_context()
    return frozenset(name for name in context.params if context.get_parameter_source(name) is _GIVEN)


def _adding(options: Sequence[Callable[[_Command], _Command]]) -> Callable[[_Command], _Command]:
    def add(command: _Command) -> _Command:
        # As decorators stand above a function: the last is applied first.
        for option in reversed(options):
            command = option(command)
        return command

    return add
