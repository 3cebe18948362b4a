"""`tiered score`, step by step: texts, windows, plan, passes; a table of scores, and a report."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tiered.arch import context_for, load_config
from tiered.cli.lines import Failure, end_failed, print_json
from tiered.cli.measuring import hardware_of, measured, predicted, with_chosen_phases
from tiered.cli.progress import ScoreProgress
from tiered.cli.run_request import RunRequest
from tiered.cli.score_output import (
    PerTokenFile,
    Text,
    perplexity_so_far,
    score_json,
    scored_nbytes,
    table,
    together,
)
from tiered.cli.screen import StatusLine
from tiered.cli.texts import TokenIds
from tiered.cli.writable import check_writable
from tiered.errors import ConfigError, ModelError, TieredError, contained
from tiered.generate import ScoreReport, make_score_report
from tiered.generate.prompt import NO_TOKENIZER, check_ids, check_vocabulary
from tiered.generate.score import Window, count_windows, cut_windows, score
from tiered.generate.tokenizer import load_generation_config, load_tokenizer_if_any
from tiered.plan import Workload
from tiered.runtime import Runtime
from tiered.store import Store


@dataclass(frozen=True, kw_only=True)
class ScoreRequest(RunRequest):
    """The options of the command, as they were given."""

    texts: tuple[tuple[str, str | TokenIds], ...]
    """Pairs of a name, for messages, and a text, in words or in token ids."""
    context: int | None
    stride: int | None
    windows_per_pass: int | None
    per_token_path: Path | None


@dataclass(frozen=True)
class _Cut:
    """How texts are cut into windows."""

    texts: tuple[Text, ...]
    context: int
    stride: int

    @property
    def count(self) -> int:
        return sum(count_windows(len(t.ids), self.context, self.stride, len(t.begin_ids)) for t in self.texts)

    @property
    def longest(self) -> int:
        """Tokens of the longest window: texts may be shorter than the context."""
        return min(self.context, max(len(text.begin_ids) + len(text.ids) for text in self.texts))

    def workload(self, per_pass: int | None) -> Workload:
        """The workload of all windows; `per_pass`: how many share a pass, None: the plan chooses."""
        return Workload(
            self.count,
            self.longest,
            self.longest,
            batch_size=per_pass,
            choose_batch_size=True,
            one_pass=True,
            all_logits=True,
            is_whole=True,
        )

    def windows(self) -> Iterator[Window]:
        for number, text in enumerate(self.texts):
            for window in cut_windows(text.ids, self.context, self.stride, text.begin_ids, number):
                if text.error is not None:
                    break
                yield window


def run(request: ScoreRequest) -> None:
    """Score, writing table and report, or JSON. Where a text failed, the exit code is 1."""
    # The KV cache may be on disk: a window too long for memory can still be scored.
    options = request.options()
    if options.computes == ("gpu", "cpu"):
        raise ConfigError("--decode-device cpu: scoring decodes nothing, all texts are prompts; drop it")
    options = options.for_prompts()
    if request.per_token_path is not None:
        check_writable("--per-token", request.per_token_path, [name for name, _ in request.texts])
    store = Store.open(request.store)
    # Before the tokenizer, which reads config.json too and would be blamed for an error in it.
    config = load_config(store.path)
    context, stride = _sizes(request, config)
    tokenizer = load_tokenizer_if_any(store)
    encoder = _Encoder(store, tokenizer)
    texts = tuple(starmap(encoder.encode, request.texts))
    per_pass: int | None = None
    report: ScoreReport | None = None
    if not _has_none(texts):
        cut = _Cut(texts, context, stride)
        workload = cut.workload(request.windows_per_pass)
        say = None if request.as_json else partial(click.echo, err=True)
        options = with_chosen_phases(options, store, lambda: workload, say)
        with Runtime(store, workload, options, hardware_of(store, options, say)) as runtime:
            per_pass = request.windows_per_pass or runtime.plan.batch_size
            report = _score(request, runtime, cut, per_pass, tokenizer)
    if request.as_json:
        print_json(_result(texts, context, stride, per_pass, report))
    elif not _has_none(texts):
        for line in table(texts):
            click.echo(line)
        for line in report.lines() if report is not None else ():
            click.echo(line, err=True)
    end_failed(_failures(texts), len(texts))


def _result(
    texts: tuple[Text, ...], context: int, stride: int, per_pass: int | None, report: ScoreReport | None
) -> dict[str, Any]:
    """What `--json` prints; without a report where nothing could be computed."""
    return {
        "texts": [text.to_json() for text in texts],
        "together": score_json(together(texts), scored_nbytes(texts)),
        "context": context,
        "stride": stride,
        "windows_per_pass": per_pass,
        "report": None if report is None else report.to_json(),
    }


def _failures(texts: tuple[Text, ...]) -> list[Failure]:
    return [(text.name, text.error) for text in texts if text.error is not None]


def _has_none(texts: tuple[Text, ...]) -> bool:
    """Whether no text has a score. If there is only one text, raises its error."""
    found = all(text.error is not None for text in texts)
    if found and len(texts) == 1:
        end_failed(_failures(texts), 1)
    return found


def _sizes(request: ScoreRequest, config: PretrainedConfig) -> tuple[int, int]:
    """Context and stride, in tokens."""
    context = context_for(config, request.context, "--context")
    stride = request.stride or context
    if stride > context:
        raise ConfigError(f"--stride {stride}: a window has {context} tokens; score at most that many of them anew")
    return context, stride


def _begin_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts in front of a text by itself, as it does when the text is a prompt."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    places = [at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain]
    return tuple(whole[: places[0]]) if places else ()


class _Encoder:
    """Makes the texts of a store: their tokens, and what begins each of their windows."""

    def __init__(self, store: Store, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer, self._vocab_size = tokenizer, store.vocab_size
        self._begin_ids = () if tokenizer is None else _begin_ids(tokenizer)
        begin = load_generation_config(store).bos_token_id
        self._begin_id = begin if type(begin) is int else None

    def encode(self, name: str, given: str | TokenIds) -> Text:
        """`given` with its tokens, at least one of which can be scored; or without, and with the error that says
        why."""
        nbytes = len(given.encode("utf-8")) if isinstance(given, str) else None
        found = Text(name, torch.empty(0, dtype=torch.int32), nbytes)
        with contained(found.fail):
            try:
                ids, found.begin_ids = self._of_text(given) if isinstance(given, str) else self._of_ids(given)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from None
            if len(ids) < (1 if found.begin_ids else 2):
                raise ConfigError(
                    f"{name}: is {len(ids)} tokens long, with nothing before them to score them by; pass more"
                )
            found.ids = ids.to(torch.int32)
        return found

    def _of_text(self, text: str) -> tuple[torch.Tensor, tuple[int, ...]]:
        if not text:
            raise ConfigError("is empty; pass some text to score")
        if self._tokenizer is None:
            raise ConfigError(NO_TOKENIZER)
        found = self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids = torch.tensor(found["input_ids"], dtype=torch.int32)
        if len(ids):
            check_vocabulary(self._tokenizer, self._vocab_size, max(*self._begin_ids, int(ids.max()), 0))
        return ids, self._begin_ids

    def _of_ids(self, given: TokenIds) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Ids as they are. Where they begin with the model's token for it, that begins each window, as with a text."""
        ids = torch.from_numpy(np.asarray(given, dtype=np.int64))
        check_ids(ids[(ids < 0) | (ids >= self._vocab_size)][:1].tolist(), self._vocab_size)
        begins = int(ids[0]) == self._begin_id
        return (ids[1:], (int(ids[0]),)) if begins else (ids, ())


def _score(
    request: ScoreRequest, runtime: Runtime, cut: _Cut, per_pass: int, tokenizer: PreTrainedTokenizerBase | None
) -> ScoreReport | None:
    """Measure the disk, score, measure again. Adds to the texts' tallies; no report where no pass was computed."""
    with (
        StatusLine() as status,
        PerTokenFile(request.per_token_path, cut.texts, tokenizer) as per_token,
    ):

        def on_scored(window: Window, logprobs: torch.Tensor) -> None:
            text = cut.texts[window.text]
            if text.error is not None:
                return
            text.tally.add(logprobs)
            with contained(text.fail):  # its tokens may be impossible to decode
                per_token.write(window, logprobs)

        def on_failed(window: Window, error: TieredError) -> None:
            if isinstance(error, ModelError):
                last = window.position + len(window.targets) - 1
                error = ModelError(f"tokens {window.position} to {last}: {error}")
            cut.texts[window.text].fail(error)

        with measured(runtime, status, request.measure) as around:
            progress = ScoreProgress(status, -(-cut.count // per_pass), lambda: perplexity_so_far(cut.texts))
            scoring = score(runtime, cut.windows(), per_pass, on_scored, progress.on_block, on_failed)
    if not scoring.costs.passes:
        return None
    surroundings = around.surroundings(runtime, scoring.costs.prefill.disk_idle_seconds)
    return make_score_report(scoring, surroundings, predicted(runtime))
