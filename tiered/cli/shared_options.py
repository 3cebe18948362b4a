"""Options that several commands have, and how their values are read. Imports nothing but click, as `commands.py`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from tiered.errors import ConfigError
from tiered.units import parse_size

POSITIVE: Final = click.IntRange(min=1)
ANY_PATH: Final = click.Path(path_type=Path)
FILE: Final = click.Path(path_type=Path, dir_okay=False)

Command = Callable[..., Any]


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator that adds `options`, in this order."""

    def add(command: Command) -> Command:
        # As decorators stand above a function: the last is applied first.
        for option in reversed(options):
            command = option(command)
        return command

    return add


STORE: Final = click.argument("store", type=ANY_PATH)

KV_BITS: Final = ("16", "8", "4")
KERNELS: Final = click.Choice(["auto", "torch", "scalar", "avx2", "avx512", "amx"])
KERNEL_MODES: Final = click.Choice(["invariant", "fast"])
KV: Final = click.Choice(["auto", "cpu", "disk"])
_KV_PLACES: Final = click.Choice(["auto", "gpu", "cpu", "disk"])
_PHASES: Final = click.Choice(["auto", "cpu", "gpu"])


def kv_bits(choices: Sequence[str] = KV_BITS, more: str = "") -> Callable[[Command], Command]:
    kind = click.Choice(choices)
    return click.option(
        "--kv-bits", default="16", show_default=True, type=kind, help=f"Precision of the KV cache{more}."
    )


KV_PLACE: Final = together(
    click.option(
        "--kv",
        default="auto",
        show_default=True,
        type=_KV_PLACES,
        help="Where the KV cache is; auto: on the GPU if there is one and it gains, in memory or on disk as a run is "
        "expected to be quicker.",
    ),
    click.option(
        "--kv-dir",
        type=click.Path(path_type=Path, file_okay=False, exists=True),
        help="Where a KV cache on disk goes. [default: beside the store]",
    ),
)

DEVICE: Final = together(
    click.option(
        "--tiers",
        default="disk,cpu",
        show_default=True,
        help="Where weights may be, slowest first: disk,cpu, cpu, disk,cpu,gpu, cpu,gpu or gpu.",
    ),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cuda|cuda:N|emulated",
        help="Of the gpu tier; emulated: played by this process.",
    ),
    click.option("--vram", help="Budget of the GPU's memory, such as 14GiB. [default: 90% of what is free there]"),
    click.option("--resident-gpu", metavar="SIZE", help="Weights that stay on the GPU. [default: as many as fit]"),
    click.option(
        "--resident-cpu",
        metavar="SIZE",
        help="Weights that stay in memory besides. [default: as many as fit, fewer where a short job is quicker so]",
    ),
    click.option(
        "--prefill-device",
        default="auto",
        show_default=True,
        type=_PHASES,
        help="What computes prompts; auto: the quickest by this machine's profile, else the GPU.",
    ),
    click.option(
        "--decode-device",
        default="auto",
        show_default=True,
        type=_PHASES,
        help="What computes the tokens after them; auto as above.",
    ),
)


MEASURE: Final = click.option(
    "--measure/--no-measure", default=True, help="Measure the raw disk bandwidth after the run."
)


def json_output(instead: str = "instead of text") -> Callable[[Command], Command]:
    return click.option("--json", "as_json", is_flag=True, help=f"Print one JSON object {instead}.")


def texts(what: str) -> Callable[[Command], Command]:
    kind = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
    return click.option("-f", "--file", "files", multiple=True, type=kind, help=f"{what}; repeatable; - is stdin.")


def id_files(what: str) -> Callable[[Command], Command]:
    kind = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
    return click.option("--ids-file", "id_files", multiple=True, type=kind, help=f"{what} as token ids; like -f.")


MICRO_BATCH = click.option(
    "--micro-batch", type=POSITIVE, help="Tokens computed together. [default: as many as memory allows and help]"
)


def objective(default: str) -> Callable[[Command], Command]:
    """The option for what counts where prompts enter while other sequences decode."""
    return click.option(
        "--objective",
        default=default,
        show_default=True,
        type=click.Choice(["latency", "throughput"]),
        help="While others decode: latency reads prompts in small pieces, throughput as much as a pass takes.",
    )


def run_options(invariant: str) -> Callable[[Command], Command]:
    """The options for precision, memory, threads and kernels; `invariant` says what the invariant mode promises."""
    return together(
        click.option(
            "--dtype",
            default="auto",
            show_default=True,
            help="auto, bfloat16, float32, or on a GPU float16: what is computed in.",
        ),
        click.option("--verify", default="first", show_default=True, type=click.Choice(["first", "always", "never"])),
        DEVICE,
        click.option(
            "--fallback",
            type=click.Choice(["cpu"]),
            help="Let the processor compute where the GPU cannot be used; a --vram that is too small is refused.",
        ),
        click.option("--ram", help="Budget for the whole process, such as 2GiB. [default: 90% of what is free]"),
        click.option("--threads", type=POSITIVE, help="Compute threads. [default: all processors]"),
        click.option(
            "--kernels",
            default="auto",
            show_default=True,
            type=KERNELS,
            help="What multiplies; auto is the best that this machine has.",
        ),
        click.option(
            "--kernel-mode",
            default="invariant",
            show_default=True,
            type=KERNEL_MODES,
            help=f"invariant: {invariant}. fast: activations may be rounded to 8 bits.",
        ),
    )


def stated() -> frozenset[str]:
    """Names of the options that the running command was given, as opposed to their defaults."""
    context = click.get_current_context()
    given = ParameterSource.COMMANDLINE
    return frozenset(name for name in context.params if context.get_parameter_source(name) is given)


class TakesLists(click.Command):
    """A command whose options may have their values one after the other: --batch 1 4 16, or --batch 1,4,16."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        lists = [one for one in self.params if isinstance(one, click.Option) and one.multiple]
        options = {name: one for one in lists if one.type is not click.STRING for name in one.opts}
        return super().parse_args(ctx, list(self._one_by_one(args, options)))

    def _one_by_one(self, args: Sequence[str], options: Mapping[str, click.Option]) -> Iterator[str]:
        """`args`, with the name of a list's option before each of its values."""
        rest = iter(args)
        option: tuple[str, click.Option] | None = None
        for word in rest:
            if option is not None and _is_value(option[1], word):
                for value in word.split(","):
                    yield from (option[0], value)
                continue
            option = (word, options[word]) if word in options else None
            if option is None:
                yield word
            if word == "--":
                yield from rest
            elif option is not None:
                # The first value is taken as it is, so that a wrong one is named.
                for value in next(rest, "").split(","):
                    yield from (word, value)


def _is_value(option: click.Option, text: str) -> bool:
    """Whether `text` goes on with the list of `option`; a number does, if only to be refused by name."""
    if text.isdecimal():
        return True
    try:
        for value in text.split(","):
            option.type.convert(value, option, None)
    except click.BadParameter:
        return False
    return True


def size_text(text: str) -> str:
    """A number of bytes, which stays as it is written."""
    try:
        parse_size(text)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from None
    return text


def batch_size(text: str) -> int | str:
    """A number of sequences, or "disk-bound"."""
    if text == "disk-bound":
        return text
    if not text.isdecimal() or not int(text[:9]) >= 1:
        raise click.BadParameter(f"{text}: expected a whole number above 0, or disk-bound")
    return int(text)


def listed(*names: str, type: Any, help: str, metavar: str | None = None) -> Callable[[Command], Command]:
    """An option of a command that `TakesLists`."""
    return click.option(*names, multiple=True, type=type, help=help, metavar=metavar)
