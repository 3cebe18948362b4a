"""`tiered inspect`: what a store holds, and what fits in which budget. Reads headers only."""

import json
from pathlib import Path

import click


@click.command("inspect")
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--context", type=click.IntRange(min=1), help="Tokens to plan for. [default: 2048, or what the model has]"
)
@click.option("--sequences", default=1, show_default=True, type=click.IntRange(min=1), help="Prompts in one batch.")
@click.option("--dtype", default="auto", show_default=True, help="auto, bfloat16 or float32: what is computed in.")
@click.option("--disk-bandwidth", help="Of the disk, such as 2GB/s: adds the seconds of a pass.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(
    store: Path, context: int | None, sequences: int, dtype: str, disk_bandwidth: str | None, as_json: bool
) -> None:
    """Show what STORE holds and what fits in which memory budget.

    Budgets are estimates for one process like this one; 'tiered generate' measures its own and decides.
    """
    from tiered.cli.inspection import inspect_store, lines, parse_rate

    rate = None if disk_bandwidth is None else parse_rate(disk_bandwidth)
    inspection = inspect_store(store, context, sequences, dtype, rate)
    if as_json:
        click.echo(json.dumps(inspection.to_json(), indent=2, ensure_ascii=False))
        return
    for line in lines(inspection):
        click.echo(line)
