"""`tiered generate`: prompts in, text out, a report at the end."""

import json
import sys
from pathlib import Path
from typing import Any, TextIO

import click

from tiered.cli.failures import end_failed
from tiered.cli.run_options import kv_options, run_options, stated_options

_POSITIVE = click.IntRange(min=1)


@click.command("generate")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", "prompts", multiple=True, help="A prompt; repeat for a batch.")
@click.option(
    "-f", "--file", "files", multiple=True, type=click.File("r", encoding="utf-8"), help="A file that is one prompt."
)
@click.option("-n", "--max-new-tokens", default=128, show_default=True, type=_POSITIVE, help="Tokens to generate.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="Sample from the k likeliest tokens; 0: all.")
@click.option("--top-p", default=1.0, show_default=True, help="Sample from the likeliest tokens of this total mass.")
@click.option("--min-p", default=0.0, show_default=True, help="Drop tokens below this share of the likeliest.")
@click.option("--repetition-penalty", default=1.0, show_default=True, help="Above 1 discourages repetition.")
@click.option("--seed", default=0, show_default=True, help="For sampling.")
@click.option("--stop", "stops", multiple=True, help="End at this text; repeatable.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the end-of-text token.")
@click.option("--prompt-tokens", type=_POSITIVE, help="Random prompts of exactly N tokens, for measuring.")
@click.option("--sequences", default=1, show_default=True, type=_POSITIVE, help="So many --prompt-tokens prompts.")
@click.option("--batch", type=_POSITIVE, help="Prompts that run at once. [default: all]")
@click.option("--micro-batch", type=_POSITIVE, help="Tokens computed together inside a block. [default: as useful]")
@kv_options
@click.option("--chat", is_flag=True, help="Apply the tokenizer's chat template to each prompt.")
@run_options("a text does not depend on what shares its batch")
@click.option("--prefetch", type=click.IntRange(min=0), help="Blocks read ahead; 0: none. [default: as memory allows]")
@click.option("--measure/--no-measure", default=True, help="Measure the raw disk bandwidth before and after.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--trace", "trace_path", type=click.Path(path_type=Path, dir_okay=False), help="Write a Perfetto trace.")
def command(**options: Any) -> None:
    """Generate text from STORE, the folder that 'tiered convert' wrote.

    Prompts come from -p, -f, or standard input. The text goes to standard output, everything else to standard
    error. One of several prompts that cannot be continued does not keep the others from it; the exit code is 1 then.
    """
    from tiered.cli.generation import Request, run

    result, failures = run(Request(**_read_prompts(options), stated=stated_options()))
    if options["as_json"]:
        click.echo(json.dumps(result, indent=2, ensure_ascii=False))
    end_failed(failures, len(result["completions"]))


def _read_prompts(options: dict[str, Any]) -> dict[str, Any]:
    """The options with all prompts in one list."""
    options = dict(options)
    prompts = [("-p", text) for text in options.pop("prompts")]
    prompts += [(file.name, _read(file, file.name)) for file in options.pop("files")]
    if options["prompt_tokens"] is not None and prompts:
        raise click.UsageError("--prompt-tokens makes its own prompts; drop -p and -f")
    if options["prompt_tokens"] is None and options["sequences"] > 1:
        raise click.UsageError("--sequences repeats what --prompt-tokens makes; repeat -p for a batch of your own")
    if options["prompt_tokens"] is None and not prompts:
        if sys.stdin.isatty():
            raise click.UsageError("no prompt: pass -p TEXT or -f FILE, or pipe text to standard input")
        prompts = [("standard input", _read(sys.stdin, "standard input"))]
    for source, text in prompts:
        # Bytes that are no text reach us as lone surrogates where Python lets them pass.
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise click.UsageError(f"{source}: not UTF-8; pass text in that encoding")
    return {**options, "prompts": tuple(text for _, text in prompts)}


def _read(file: TextIO, name: str) -> str:
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{name}: not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise click.UsageError(f"{name}: cannot be read: {error.strerror}") from None
