"""`tiered convert`: a checkpoint in, a store out; resumable."""

import contextlib
import os
import shlex
import sys
from pathlib import Path
from typing import Any, Final

import click

from tiered.cli.progress import ByteProgress
from tiered.cli.screen import StatusLine, is_terminal
from tiered.convert import ConvertOptions, ConvertProgress, ConvertResult, convert_checkpoint
from tiered.convert.taken import Taken
from tiered.errors import InterruptedRun, TieredError
from tiered.plan.shapes import read_store_shape
from tiered.shapes import store_shape
from tiered.store.manifest import VERSION
from tiered.units import format_seconds, format_size, parse_size

_NAMES_SHOWN: Final = 4


def run(source: str, output: Path | None, ram: str | None, group_size: str, **options: Any) -> None:
    """Convert, showing how far it is, and say what has been written."""
    ram_bytes = None if ram is None else parse_size(ram)
    settings = ConvertOptions(ram_bytes=ram_bytes, group_size=int(group_size), **options)
    try:
        with StatusLine() as status:
            # Opening what is on the hub shows the hub library's own bars. A name may be longer than any path.
            if settings.weights is not None or os.path.exists(source):  # noqa: PTH110
                status.say("opening")
            result = convert_checkpoint(source, output, settings, _Screen(status).show)
            # With a budget no headers are read besides: those of a large mixture take a hundred MB.
            if ram_bytes is None and read_store_shape(result.store) is None:
                status.say("noting the model's shape")
                # The store is whole without it: 'tiered plan' would make it when it is asked.
                with contextlib.suppress(TieredError):
                    store_shape(result.store)
    except KeyboardInterrupt:
        click.echo("tiered: finished blocks are kept; the same command resumes the conversion", err=True)
        raise InterruptedRun("interrupted") from None
    click.echo(summary(result))


def summary(result: ConvertResult) -> str:
    """What a person wants to know of a finished conversion."""
    where = shlex.quote(str(result.store))
    if result.upgraded_from == VERSION and result.tokenizer is None:
        return f"{result.store}: is of format version {VERSION}, nothing to do"
    following = f'next: tiered generate {where} -p "Once upon a time"'
    if result.upgraded_from == VERSION:
        return f"{result.store}: has the tokenizer of {result.tokenizer} now\n{following}"
    kind = "synthetic (random weights), " if result.synthetic else ""
    what = "" if result.upgraded_from is None else f"upgraded to format version {VERSION}, "
    lines = [
        f"{result.store}: {what}{kind}{result.blocks} blocks, {format_size(result.nbytes)}, {result.scheme}, "
        f"{result.bits_per_weight:.2f} bits per weight, in {format_seconds(result.seconds)}"
    ]
    if result.resumed_blocks:
        lines.append(f"resumed: {result.resumed_blocks} block files were there already")
    why = {"whose rows are no multiple of the group size": result.unquantized}
    why["that the model's own code computes with, and no linear layer"] = result.kept
    why["that the checkpoint has not quantized either; --quant int4 or int8 does"] = result.plain
    for reason, names in why.items():
        if names:
            more = ", …" if len(names) > _NAMES_SHOWN else ""
            lines.append(f"not quantized: {len(names)} weights {reason} ({', '.join(names[:_NAMES_SHOWN])}{more})")
    lines += [_taken(taken) for taken in result.taken]
    lines += [f"warning: {warning}" for warning in result.warnings]
    if not result.has_tokenizer:
        lines.append(
            f"no tokenizer: 'tiered convert {where} --tokenizer PATH' gives the store one; without, it takes token ids"
        )
        following = f"next: tiered generate {where} --prompt-ids 2,100,524"
    lines.append(following)
    return "\n".join(lines)


def _taken(taken: Taken) -> str:
    """What became of weights that were quantized already."""
    added = f"which adds an error of {100 * taken.added:.2g} % (relative RMS)" if taken.added else "as they were"
    return f"{taken.method}: {taken.weights} weights in {taken.form}, {added}"


class _Screen:
    """Shows how far a conversion is."""

    def __init__(self, status: StatusLine) -> None:
        self._status, self._progress = status, ByteProgress()
        self._is_terminal = is_terminal(sys.stderr)

    def show(self, now: ConvertProgress) -> None:
        """The conversion stands at `now`."""
        if now.downloading:
            # On a terminal the hub library shows its own bars.
            self._status.clear()
            if not self._is_terminal:
                click.echo(f"{now.block}: downloading its files", err=True)
            return
        line = self._progress.line(now.nbytes_done, now.nbytes_total, now.nbytes_skipped)
        percent = 100 * now.nbytes_done // max(now.nbytes_total, 1)
        self._status.update(lambda: f"{percent:3d}%  {now.block}  {line}")
