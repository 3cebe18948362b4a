"""Options of commands that run a model: its texts, what is computed in, by what, in which memory, where the cache is.

What they mean is in `run_request.py`, which loads torch; this module does not, so that --help is there at once.
"""

import os
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import click
from click.core import ParameterSource

_GIVEN = ParameterSource.COMMANDLINE
_Command = Callable[..., Any]
_MOST_TEXT_NBYTES: Final = 512 << 20
"""Of one text: more than any corpus that is scored whole, and less than an endless pipe fills memory with."""
STANDARD_INPUT: Final = Path("-")
"""As what the path that options take for it becomes."""


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


def objective_option(default: str) -> Callable[[_Command], _Command]:
    """Adds what counts where prompts enter while other sequences decode."""
    return click.option(
        "--objective",
        default=default,
        show_default=True,
        type=click.Choice(["latency", "throughput"]),
        help="While others decode: latency reads prompts in small pieces, throughput as much as a pass takes.",
    )


def text_files_option(help: str) -> Callable[[_Command], _Command]:
    """Adds -f: paths that `read_text` reads."""
    kind = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
    return click.option("-f", "--file", "files", multiple=True, type=kind, help=f"{help}; repeatable; - is stdin.")


def read_text(path: Path) -> tuple[str, str]:
    """The name of the file at `path` in messages, and the text in it, which must be UTF-8; line ends as they are.

    Pipes and terminals are read to their end. A device that has none is refused, and so is what is too large.
    """
    name = "standard input" if path == STANDARD_INPUT else str(path)
    try:
        if path == STANDARD_INPUT:
            return name, _decoded(sys.stdin.buffer, name)
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            is_device = stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode)
            if is_device and not file.isatty() and not path.samefile(os.devnull):
                raise click.UsageError(f"{name}: a device, expected a text; pass a file or a pipe")
            return name, _decoded(file, name)
    except OSError as error:
        raise click.UsageError(f"{name}: cannot be read: {error.strerror}") from None


def _decoded(file: BinaryIO, name: str) -> str:
    content = file.read(_MOST_TEXT_NBYTES + 1)
    if len(content) > _MOST_TEXT_NBYTES:
        raise click.UsageError(f"{name}: more than {_MOST_TEXT_NBYTES >> 20} MiB; split it")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{name}: not UTF-8 ({error.reason} at byte {error.start}); convert it") from None


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
