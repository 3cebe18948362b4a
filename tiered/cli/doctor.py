"""`tiered doctor`: what this machine can do, what is switched off, and why."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tiered.cli.findings import Examination


@click.command("doctor")
@click.argument("path", default=".", type=click.Path(path_type=Path))
@click.option("--disk-test", is_flag=True, help="Write, read and remove a temporary file of 256 MiB.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(path: Path, disk_test: bool, as_json: bool) -> None:
    """Show what this machine can do for tiered, what is switched off, and what would switch it on.

    PATH is a store, or the folder where one is to be; the current folder by default.
    """
    from tiered.cli.examination import examine

    found = examine(path, disk_test)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
        return
    for line in _lines(found):
        click.echo(line)


def _lines(found: "Examination") -> Iterator[str]:
    from tiered.cli.columns import columns

    for title, facts in found.sections.items():
        yield title
        if facts:
            yield from columns([(fact.label, fact.text) for fact in facts], "<<", indent="  ")
        yield ""
    yield "switched off"
    for off in found.off:
        yield f"  {off.feature}"
        yield f"    why      {off.why}"
        yield f"    turn on  {off.turn_on}"
    if not found.off:
        yield "  nothing"
    yield ""
    yield "warnings"
    yield from (f"  {warning}" for warning in found.warnings or ("none",))
