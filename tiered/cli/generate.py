"""`tiered generate`, step by step: prompts, plan, passes; text as it comes, and a report."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tiered.arch import load_config, most_positions
from tiered.cli.lines import Failure, end_failed, print_json
from tiered.cli.measuring import hardware_of, measured, predicted, with_chosen_phases
from tiered.cli.progress import PassProgress
from tiered.cli.run_request import RunRequest
from tiered.cli.screen import StatusLine, TextWriter
from tiered.cli.texts import TokenIds
from tiered.cli.writable import check_writable
from tiered.errors import ConfigError, TieredError, contained
from tiered.generate import Report, Sampler, SamplingParams, Sequence, generate, make_report
from tiered.generate.prompt import NO_TOKENIZER, Prompts
from tiered.generate.template import TemplateRefused
from tiered.generate.tokenizer import SAMPLING, load_generation_settings, load_tokenizer_if_any
from tiered.plan import MAX_BATCHED_TOKENS, Workload
from tiered.runtime import Options, Runtime
from tiered.store import Store
from tiered.units import format_size

_INSTEAD_OF: Final = {
    "max_new_tokens": ("max_new_tokens", "max_length"),
    "temperature": ("temperature", "do_sample"),
    "top_k": ("top_k",),
    "top_p": ("top_p",),
    "min_p": ("min_p",),
    "repetition_penalty": ("repetition_penalty",),
}
"""For each option the store's generation settings that it replaces."""


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(RunRequest):
    """The options of the command, as they were given."""

    prompts: tuple[str | TokenIds, ...]
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    stops: tuple[str, ...]
    ignore_eos: bool
    prompt_tokens: int | None
    sequences: int
    batch: int | None
    chat: bool
    prefetch: int | None
    trace_path: Path | None


def run(request: GenerateRequest) -> None:
    """Generate, writing text as it comes and a report, or JSON. Where a prompt failed, the exit code is 1."""
    sampling = SamplingParams(
        request.temperature,
        request.top_k,
        request.top_p,
        request.min_p,
        request.repetition_penalty,
        request.seed,
    )
    options = request.options(prefetch=request.prefetch, keep_spans=request.trace_path is not None)
    _check(request)
    store = Store.open(request.store)
    # Before the tokenizer, which reads config.json too and would be blamed for an error in it.
    config = load_config(store.path)
    tokenizer = load_tokenizer_if_any(store)
    if tokenizer is None and request.stops:
        raise ConfigError(f"--stop: looks for a text; drop it: {NO_TOKENIZER}")
    sequences = _sequences(request, sampling, store, config, tokenizer)
    able = [sequence for sequence in sequences if sequence.error is None]
    if not able and len(sequences) == 1:
        end_failed(_failures(sequences), 1)
    report = _run(request, store, options, sequences, able) if able else None
    if request.as_json:
        print_json(_result(request, sequences, tokenizer, report))
    elif report is not None:
        for line in report.lines():
            click.echo(line, err=True)
    end_failed(_failures(sequences), len(sequences))


def _check(request: GenerateRequest) -> None:
    """Refuse, before anything is read, options that are wrong whatever the files hold."""
    if request.temperature == 0 and (request.top_k, request.top_p, request.min_p) != (0, 1.0, 0.0):
        raise ConfigError("--top-k, --top-p and --min-p choose what to sample from: add --temperature, such as 0.7")
    if "" in request.stops:
        raise ConfigError("--stop: expected some text, found none")
    if request.chat and not all(isinstance(prompt, str) for prompt in request.prompts):
        raise ConfigError("--chat: puts texts into a template, token ids stay as they are; drop --chat or pass texts")
    if request.trace_path is not None:
        check_writable("--trace", request.trace_path)


def _sequences(
    request: GenerateRequest,
    sampling: SamplingParams,
    store: Store,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[Sequence]:
    """A sequence for each prompt; those of prompts that cannot be continued have failed."""
    settings = load_generation_settings(store, tokenizer)
    if (ignored := settings.ignored(_overridden(request))) is not None:
        click.echo(ignored, err=True)
    eos = frozenset[int]() if request.ignore_eos else settings.eos_ids
    stops = (*request.stops, *settings.stops)
    sequences = []
    for number, found in enumerate(_encode(request, store, config, tokenizer)):
        ids = [] if isinstance(found, TieredError) else found
        sequence = Sequence(ids, Sampler(sampling, number), tokenizer, request.max_new_tokens, eos, stops)
        sequences.append(sequence)
        if isinstance(found, TieredError):
            sequence.fail(found)
    return sequences


def _run(
    request: GenerateRequest, store: Store, options: Options, sequences: list[Sequence], able: list[Sequence]
) -> Report:
    """Run the `able` sequences: those that have not failed."""
    longest = max(len(sequence.prompt_ids) for sequence in able)
    workload = Workload(
        len(able),
        longest + request.max_new_tokens,
        longest,
        max_batched_tokens=MAX_BATCHED_TOKENS,
        batch_size=request.batch,
        choose_batch_size=request.prompt_tokens is None,  # what is measured runs as it was asked for
        objective=request.objective,
        is_whole=request.prompt_tokens is None,
    )
    say = None if request.as_json else partial(click.echo, err=True)
    options = with_chosen_phases(options, store, lambda: workload, say)
    with Runtime(store, workload, options, hardware_of(store, options, say)) as runtime:
        if request.batch is None and runtime.plan.batch_size < len(able) and say is not None:
            say(f"batch     {runtime.plan.why}")
        if request.kv_bits == "auto" and not request.as_json:
            cache = runtime.plan.cache
            place = "on disk" if cache.on_disk else "on the GPU" if cache.on_device else "in memory"
            click.echo(f"kv cache  {cache.bits} bits, {format_size(cache.blocks_nbytes)} {place}", err=True)
        report = _generate(request, runtime, sequences, able)
    if request.trace_path is not None:
        runtime.host.trace.write(request.trace_path)
    return report


def _result(
    request: GenerateRequest,
    sequences: list[Sequence],
    tokenizer: PreTrainedTokenizerBase | None,
    report: Report | None,
) -> dict[str, Any]:
    """What `--json` prints; without a report where nothing could be computed. Prompts are as they were given."""
    prompts: list[Any] = [prompt if isinstance(prompt, str) else list(prompt) for prompt in request.prompts]
    if not prompts:
        ids = [sequence.prompt_ids for sequence in sequences]
        prompts = list(ids) if tokenizer is None else [str(tokenizer.decode(found)) for found in ids]
    return {
        "prompts": prompts,
        "completions": [_completion(sequence, tokenizer is not None) for sequence in sequences],
        "report": None if report is None else report.to_json(),
    }


def _completion(sequence: Sequence, has_text: bool) -> dict[str, Any]:
    """What `--json` says of one prompt."""
    return {
        "text": sequence.text if has_text else None,
        "token_ids": sequence.token_ids,
        "finish_reason": sequence.finish_reason,
        "error": None if sequence.error is None else str(sequence.error),
    }


def _failures(sequences: list[Sequence]) -> list[Failure]:
    return [(f"prompt {number}", s.error) for number, s in enumerate(sequences, 1) if s.error is not None]


def _overridden(request: GenerateRequest) -> set[str]:
    """Which of a store's generation settings are replaced by options that were given."""
    found = {field for option in request.stated for field in _INSTEAD_OF.get(option, ())}
    is_greedy = "temperature" in request.stated and request.temperature == 0
    return found | SAMPLING.keys() if is_greedy else found


def _generate(request: GenerateRequest, runtime: Runtime, sequences: list[Sequence], able: list[Sequence]) -> Report:
    """Measure the disk, generate for `able`, measure again; the texts of all `sequences` are shown."""
    titles = [""] * len(sequences)
    if len(sequences) > 1:
        titles = [f"[{number}] " for number in range(1, len(sequences) + 1)]
    with (
        TextWriter([] if request.as_json else sequences, titles) as writer,
        StatusLine(lambda: writer.at_edge) as status,
    ):

        def on_pass() -> None:
            status.clear()
            writer.update()

        progress = PassProgress(status, lambda: runtime.bytes_read)
        with _saying_how_far(able, status, progress), measured(runtime, status, request.measure) as around:
            generation = generate(runtime, able, runtime.plan.batch_size, on_pass, on_block=progress.on_block)
    surroundings = around.surroundings(runtime, generation.decode.disk_idle_seconds)
    return make_report(generation, surroundings, predicted(runtime))


@contextmanager
def _saying_how_far(able: list[Sequence], status: StatusLine, progress: PassProgress) -> Iterator[None]:
    """Around the passes: an interruption says how far they came."""
    try:
        yield
    except KeyboardInterrupt:
        status.clear()
        tokens = sum(len(sequence.token_ids) for sequence in able)
        count = f"{tokens} token{'' if tokens == 1 else 's'}"
        click.echo(f"tiered: {count} generated, ended in {progress.so_far()}", err=True)
        raise


def _encode(
    request: GenerateRequest, store: Store, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> list[list[int] | TieredError]:
    """For every prompt its token ids, at least one, or the error that says why it cannot be continued."""
    if request.prompt_tokens is not None:
        _check_context(config, request.prompt_tokens + request.max_new_tokens)
        generator = torch.Generator().manual_seed(request.seed)
        vocab = store.vocab_size if tokenizer is None else min(len(tokenizer), store.vocab_size)
        shape = (request.sequences, request.prompt_tokens)
        ids: list[list[int] | TieredError] = torch.randint(0, vocab, shape, generator=generator).tolist()
        return ids
    if request.chat and tokenizer is None:
        raise ConfigError(f"--chat: {NO_TOKENIZER}")
    if request.chat and tokenizer is not None and tokenizer.chat_template is None:
        raise ConfigError("--chat: this model's tokenizer has no chat template; drop --chat to continue plain text")
    limit = most_positions(config)
    room = None if limit is None else max(0, limit - request.max_new_tokens)
    encoded: list[list[int] | TieredError] = []
    with Prompts(tokenizer, store.vocab_size, room) as prompts:
        for prompt in request.prompts:
            # Tokenizers may panic, and templates may raise anything.
            with contained(encoded.append):
                if not isinstance(prompt, str):
                    found = prompts.take(prompt)
                else:
                    found = _apply_chat(store, prompts, prompt) if request.chat else prompts.encode(prompt)
                _check_context(config, len(found) + request.max_new_tokens)
                encoded.append(found)
    return encoded


def _apply_chat(store: Store, prompts: Prompts, prompt: str) -> list[int]:
    try:
        return prompts.encode_chat([{"role": "user", "content": prompt}])
    except TemplateRefused as error:
        raise ConfigError(
            f"--chat: the chat template in {store.path} refuses the prompt: {error}; drop --chat to continue plain "
            "text, or put the model's own template there"
        ) from None


def _check_context(config: PretrainedConfig, tokens: int) -> None:
    limit = most_positions(config)
    if limit is not None and tokens > limit:
        raise ConfigError(
            f"prompt and completion come to {tokens} tokens, this model has positions for {limit}; "
            "shorten the prompt or lower --max-new-tokens"
        )
