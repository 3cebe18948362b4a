"""`tiered generate`: prompts in, text out, a report at the end."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import click

from tiered.cli.failures import end_failed
from tiered.cli.run_options import (
    STANDARD_INPUT,
    kv_options,
    objective_option,
    read_text,
    run_options,
    stated_options,
    text_files_option,
)

_POSITIVE = click.IntRange(min=1)


@click.command("generate")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", "prompts", multiple=True, help="A prompt; repeat for a batch.")
@text_files_option("A file that is one prompt")
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
@objective_option("latency")
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
    prompts += [_prompt_of(path) for path in options.pop("files")]
    if options["prompt_tokens"] is not None and prompts:
        raise click.UsageError("--prompt-tokens makes its own prompts; drop -p and -f")
    if options["prompt_tokens"] is None and options["sequences"] > 1:
        raise click.UsageError("--sequences repeats what --prompt-tokens makes; repeat -p for a batch of your own")
    if options["prompt_tokens"] is None and not prompts:
        if sys.stdin.isatty():
            raise click.UsageError("no prompt: pass -p TEXT or -f FILE, or pipe text to standard input")
        prompts = [_prompt_of(STANDARD_INPUT)]
    for source, text in prompts:
        # Bytes that are no text reach us as lone surrogates where Python lets them pass.
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise click.UsageError(f"{source}: not UTF-8; pass text in that encoding")
    return {**options, "prompts": tuple(text for _, text in prompts)}


def _prompt_of(path: Path) -> tuple[str, str]:
    """Name and text of a file, or of standard input; lines end as they do in Python, whatever system wrote them."""
    name, text = read_text(path)
    return name, io.IncrementalNewlineDecoder(None, translate=True).decode(text, final=True)
