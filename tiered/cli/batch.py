"""`tiered batch`: a file of requests in, a file of results out; killed and started again at will."""

import json
from pathlib import Path
from typing import Any

import click

from tiered.cli.run_options import kv_options, objective_option, run_options, stated_options

_POSITIVE = click.IntRange(min=1)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("batch")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("-i", "--input", "input_path", required=True, type=_FILE, help="Requests, one JSON object per line.")
@click.option("-o", "--output", "output_path", required=True, type=_FILE, help="Where results are appended.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, (1 << 64) - 1), help="For sampling.")
@click.option(
    "--max-tokens", default=128, show_default=True, type=_POSITIVE, help="Tokens to generate where a line says nothing."
)
@click.option("--context", type=_POSITIVE, help="Tokens of the longest sequence. [default: as the input needs]")
@click.option("--batch", type=_POSITIVE, help="Sequences that share a pass. [default: as time and memory allow]")
@click.option("--micro-batch", type=_POSITIVE, help="Rows computed together. [default: as memory allows]")
@objective_option("throughput")
@kv_options
@run_options("a text does not depend on what shares its batch")
@click.option("--measure/--no-measure", default=True, help="Measure the raw disk bandwidth before and after.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the report.")
def command(**options: Any) -> None:
    """Answer all requests of a file with STORE, the folder that 'tiered convert' wrote.

    Lines are requests in OpenAI's batch format, for /v1/completions or /v1/chat/completions. Results are appended in
    its result format as they are finished, in any order. The same command again goes on where an interrupted one has
    stopped: what is done is kept, and the results are those of a run in one go. OUTPUT.job tells which job a result
    file belongs to.
    """
    from tiered.cli.batch_options import BatchOptions
    from tiered.cli.batch_run import run

    result = run(BatchOptions(**options, stated=stated_options()))
    if options["as_json"]:
        click.echo(json.dumps(result, indent=2, ensure_ascii=False))
