"""`tiered verify`: every checksum of a store; names all that is damaged."""

import json
from pathlib import Path

import click

from tiered.cli.progress import ByteProgress
from tiered.cli.screen import StatusLine
from tiered.errors import ReadError, StoreError
from tiered.io.scrub import ScrubReport, scrub
from tiered.store import read_manifest
from tiered.units import format_rate, format_seconds, format_size


def run(store: Path, threads: int, as_json: bool) -> None:
    """Test the store, show what was found, and raise an error for what is damaged or could not be read."""
    manifest = read_manifest(store)
    total = sum(file.nbytes for file in manifest.files)
    progress = ByteProgress()
    with StatusLine() as status:

        def show(done: int) -> None:
            status.update(lambda: f"{100 * done // max(total, 1):3d}%  {store.name}  {progress.line(done, total)}")

        show(0)
        report = scrub(store, manifest, threads, show)
    if as_json:
        click.echo(json.dumps({"store": str(store), "synthetic": manifest.synthetic, **report.to_json()}, indent=2))
    else:
        for finding in report.findings:
            click.echo(str(finding))
        for line in _closing(report, manifest.synthetic):
            click.echo(line)
    _raise_for(store, report)


def _closing(report: ScrubReport, synthetic: bool) -> list[str]:
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


def _raise_for(store: Path, report: ScrubReport) -> None:
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
