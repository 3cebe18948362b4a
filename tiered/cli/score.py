"""`tiered score`: how likely a model finds a text. Perplexity, and a log-probability per token."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from tiered.cli.failures import end_failed
from tiered.cli.run_options import STANDARD_INPUT, kv_bits_option, read_text, run_options, text_files_option

_POSITIVE = click.IntRange(min=1)


@click.command("score")
@click.argument("store", type=click.Path(path_type=Path))
@text_files_option("A text")
@click.option("--context", type=_POSITIVE, help="Tokens in a window. [default: 2048, or what the model has]")
@click.option(
    "--stride",
    type=_POSITIVE,
    help="Tokens of a window that are scored anew; the others are context. [default: all: windows do not overlap]",
)
@click.option(
    "--batch",
    "--windows-per-pass",
    "windows_per_pass",
    type=_POSITIVE,
    help="Windows that share a pass. [default: as memory allows]",
)
@click.option(
    "--per-token",
    "per_token_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a JSON line per token: file, position, token_id, text, logprob.",
)
@kv_bits_option
@run_options("a score does not depend on what shares its pass")
@click.option("--measure/--no-measure", default=True, help="Measure the raw disk bandwidth before and after.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(**options: Any) -> None:
    """Score texts with STORE: perplexity, nats per token, bits per byte.

    Texts come from -f or standard input, each scored on its own. A text is cut into windows of --context tokens, and
    each of its tokens is scored once, by what comes before it in its window. Every window begins with the token that
    the model's tokenizer puts in front of texts; where there is none, a text's first token has nothing before it and
    is not counted. Bits per byte lets models with different tokenizers be compared. The table goes to standard output,
    everything else to standard error. One of several texts that cannot be scored is named, and the others are scored;
    the exit code is 1 then.
    """
    from tiered.cli.scoring import Request, run

    result, failures = run(Request(**_read_texts(options)))
    if options["as_json"]:
        click.echo(json.dumps(result, indent=2, ensure_ascii=False))
    end_failed(failures, len(result["texts"]))


def _read_texts(options: dict[str, Any]) -> dict[str, Any]:
    """The options with all texts read, as pairs of name and text."""
    options = dict(options)
    paths = options.pop("files")
    if not paths:
        if sys.stdin.isatty():
            raise click.UsageError("no text: pass -f FILE, or pipe text to standard input")
        return {**options, "texts": (read_text(STANDARD_INPUT),)}
    return {**options, "texts": tuple(map(read_text, paths))}
