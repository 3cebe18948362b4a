"""`tiered convert`: a checkpoint in, a store out; resumable."""

import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiered.errors import InterruptedRun
from tiered.units import format_rate, format_seconds, format_size, parse_size

if TYPE_CHECKING:
    from tiered.convert import ConvertProgress, ConvertResult

_NAMES_SHOWN = 4


@click.command("convert")
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The store to write. [default: ./NAME.tiered]")
@click.option("--quant", default="int4", show_default=True, type=click.Choice(["int4", "int8", "none"]))
@click.option("--group-size", default="64", show_default=True, type=click.Choice(["32", "64", "128"]))
@click.option(
    "--compress",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "zstd", "none"]),
    help="zstd where it shrinks; auto: only where this disk is slow enough for it to pay.",
)
@click.option("--ram", help="Refuse to take more than this, such as 2GiB.")
@click.option("--force", is_flag=True, help="Replace the store or unfinished conversion that is in the way.")
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@click.option("--delete-downloads", is_flag=True, help="Remove each file that this downloads once it is converted.")
@click.option("--synthetic", is_flag=True, help="Random weights of a known shape (or a toml file), for benchmarks.")
@click.option("--distinct-blocks", type=click.IntRange(min=1), metavar="N", help="Synthetic: store only N layers.")
@click.option("--seed", default=0, show_default=True, help="Of synthetic weights.")
def command(source: str, output: Path | None, ram: str | None, group_size: str, **options: Any) -> None:
    """Convert SOURCE into a store that 'tiered generate' runs.

    SOURCE is a Hugging Face folder, a hub id such as facebook/opt-6.7b, or a known name such as opt-125m. An
    interrupted conversion is resumed by the same command.
    """
    if sys.stderr.isatty():
        # Downloads may take hours: let the hub library show its own bars, which `main` switches off.
        os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    from tiered.convert import ConvertOptions, convert_checkpoint

    ram_bytes = None if ram is None else parse_size(ram)
    settings = ConvertOptions(ram_bytes=ram_bytes, group_size=int(group_size), **options)
    bar = _Bar() if sys.stderr.isatty() else _Lines()
    try:
        with bar:
            result = convert_checkpoint(source, output, settings, bar.show)
    except KeyboardInterrupt:
        click.echo("tiered: finished blocks are kept; the same command resumes the conversion", err=True)
        raise InterruptedRun("interrupted") from None
    click.echo(summary(result))


def summary(result: "ConvertResult") -> str:
    """What a person wants to know of a finished conversion."""
    kind = "synthetic (random weights), " if result.synthetic else ""
    lines = [
        f"{result.store}: {kind}{result.blocks} blocks, {format_size(result.nbytes)}, {result.scheme}, "
        f"{result.bits_per_weight:.2f} bits per weight, in {format_seconds(result.seconds)}"
    ]
    if result.resumed_blocks:
        lines.append(f"resumed: {result.resumed_blocks} block files were there already")
    if result.unquantized:
        shown = ", ".join(result.unquantized[:_NAMES_SHOWN])
        more = ", …" if len(result.unquantized) > _NAMES_SHOWN else ""
        lines.append(
            f"not quantized: {len(result.unquantized)} weights whose rows are no multiple of the group size "
            f"({shown}{more})"
        )
    lines += [f"warning: {warning}" for warning in result.warnings]
    if not result.has_tokenizer:
        lines.append(f"the source has no tokenizer: copy the model's tokenizer files into {result.store} to have text")
    lines.append(f'next: tiered generate {shlex.quote(str(result.store))} -p "Once upon a time"')
    return "\n".join(lines)


class _Bar:
    """A progress bar on a terminal; out of the way while the hub library shows its own."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.fields[state]}"))
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("opening", total=None, state="")
        self._rate = _Rate()

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, now: "ConvertProgress") -> None:
        if now.downloading:
            self._progress.stop()
            return
        self._progress.start()
        state = self._rate.describe(now)
        self._progress.update(
            self._task, description=now.block, total=now.nbytes_total, completed=now.nbytes_done, state=state
        )


class _Lines:
    """A line for every tenth of the way, for logs."""

    def __init__(self) -> None:
        self._rate = _Rate()
        self._tenths = 0

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left on the screen."""

    def show(self, now: "ConvertProgress") -> None:
        if now.downloading:
            click.echo(f"{now.block}: downloading its files", err=True)
            return
        tenths = 10 * now.nbytes_done // max(now.nbytes_total, 1)
        state = self._rate.describe(now)
        if tenths > self._tenths:
            self._tenths = tenths
            click.echo(f"{10 * tenths:3d}%  {now.block}  {state}", err=True)


class _Rate:
    """Speed and time left, counted from the first report on."""

    def __init__(self) -> None:
        self._began: float | None = None

    def describe(self, now: "ConvertProgress") -> str:
        clock = time.perf_counter()
        if self._began is None:
            self._began = clock
        seconds = clock - self._began
        done = now.nbytes_done - now.nbytes_skipped
        state = f"{format_size(now.nbytes_done)} of {format_size(now.nbytes_total)}"
        if seconds < 0.5 or done <= 0:
            return state
        left = seconds / done * (now.nbytes_total - now.nbytes_done)
        return f"{state}  {format_rate(done / seconds)}  {format_seconds(left)} left"
