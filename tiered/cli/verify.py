"""`tiered verify`: every checksum of a store; names all that is damaged."""

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tiered.errors import ReadError, StoreError
from tiered.units import format_rate, format_seconds, format_size

if TYPE_CHECKING:
    from rich.progress import Progress

    from tiered.io.scrub import ScrubReport

_THREADS = 8


@click.command("verify")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--threads", default=_THREADS, show_default=True, type=click.IntRange(1, 256), help="Reads in flight.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(store: Path, threads: int, as_json: bool) -> None:
    """Test every checksum of STORE, in parallel, at the speed of the disk.

    Names every chunk that is damaged and every file that is missing, truncated or cannot be read. Exit code 4 where
    anything is damaged, 1 where something could only not be read.
    """
    from tiered.io.scrub import scrub
    from tiered.store import read_manifest

    manifest = read_manifest(store)
    total = sum(file.nbytes for file in manifest.files)
    with _progress() as bar:
        if bar is None:
            report = scrub(store, manifest, threads)
        else:
            task = bar.add_task(store.name, total=total)
            report = scrub(store, manifest, threads, lambda done: bar.update(task, completed=done))
    if as_json:
        click.echo(json.dumps({"store": str(store), "synthetic": manifest.synthetic, **report.to_json()}, indent=2))
    else:
        for finding in report.findings:
            click.echo(str(finding))
        for line in _closing(report, manifest.synthetic):
            click.echo(line)
    _raise_for(store, report)


def _closing(report: "ScrubReport", synthetic: bool) -> list[str]:
    lines = [
        f"{report.files} files, {report.chunks} chunks: {format_size(report.bytes_read)} read in "
        f"{format_seconds(report.seconds)}, {format_rate(report.bytes_per_second)}, "
        f"{report.read_mode or 'nothing could be read'}"
    ]
    lines += ["synthetic weights: a benchmark, not a language model"] if synthetic else []
    lines += [f"not read with {refusal}" for refusal in report.refused]
    if not report.findings:
        lines.append("every checksum is right")
    return lines


def _raise_for(store: Path, report: "ScrubReport") -> None:
    """The exit code: corrupt bytes weigh more than bytes that could not be read."""
    if not report.findings:
        return
    files = len({finding.file for finding in report.findings})
    what = f"{store}: {len(report.findings)} problems in {files} of {report.files} files"
    if len(report.findings) == 1:
        what = f"{store}: 1 problem"
    if report.corrupt:
        raise StoreError(f"{what}; convert the model again (a repaired disk does not bring the bytes back)")
    raise ReadError(f"{what}, all of them failed reads; check the disk and the kernel log, then verify again")


def _progress() -> "AbstractContextManager[Progress | None]":
    """A bar with speed and time left on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
