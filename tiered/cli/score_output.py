"""What `tiered score` shows: a table of scores, and a line per token in a file."""

import json
import math
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import PreTrainedTokenizerBase

from tiered.cli.lines import columns
from tiered.errors import DiskFullError, TieredError
from tiered.generate.score import Tally, Window
from tiered.generate.text import CompletionText


@dataclass
class Text:
    """One text to score."""

    name: str
    ids: torch.Tensor  # [tokens], int32
    nbytes: int | None
    """Bytes of the text in UTF-8; None where token ids were given."""
    tally: Tally = field(default_factory=Tally)
    error: TieredError | None = None
    """Why it has no score; None if it has one."""
    begin_ids: tuple[int, ...] = ()
    """What begins every window of it, and is not scored."""

    def fail(self, error: TieredError) -> None:
        """Drop the score because of `error`, and keep the first error: a part's score would not be that of the text."""
        self.tally, self.error = Tally(), self.error or error

    def to_json(self) -> dict[str, Any]:
        error = None if self.error is None else str(self.error)
        return {"file": self.name, **score_json(self.tally, self.nbytes), "error": error}


def score_json(tally: Tally, nbytes: int | None) -> dict[str, Any]:
    """The scores of `nbytes` of text; None for what is infinite, which JSON cannot say, and for bytes of token ids."""
    scores = {
        "nats_per_token": tally.nats_per_token,
        "perplexity": tally.perplexity,
        "bits_per_byte": tally.bits_per_byte(nbytes or 0),
    }
    finite = {name: value if math.isfinite(value) else None for name, value in scores.items()}
    return {"bytes": nbytes, "tokens": tally.tokens, **finite}


def together(texts: Items[Text]) -> Tally:
    """The tallies of all texts added up."""
    return Tally(sum(text.tally.tokens for text in texts), sum(text.tally.nats for text in texts))


def perplexity_so_far(texts: Items[Text]) -> float | None:
    """The perplexity over all texts; None while nothing has been scored."""
    total = together(texts)
    return total.perplexity if total.tokens else None


def scored_nbytes(texts: Items[Text]) -> int | None:
    """Bytes of the texts that `together` is about; None where one of them was given as token ids."""
    found = [text.nbytes for text in texts if text.error is None]
    return None if None in found else sum(nbytes for nbytes in found if nbytes is not None)


def table(texts: Items[Text]) -> list[str]:
    """A line per text; where there are several, also one for all together, without those that failed."""
    rows: list[tuple[str, ...]] = [("text", "tokens", "nats/token", "perplexity", "bits/byte")]
    failed = ("failed", "", "", "")
    rows += [_row(text.name, text.tally, text.nbytes) if text.error is None else (text.name, *failed) for text in texts]
    if len(texts) > 1:
        rows.append(_row("together", together(texts), scored_nbytes(texts)))
    return columns(rows, "<>>>>")


def _row(name: str, tally: Tally, nbytes: int | None) -> tuple[str, ...]:
    perplexity = f"{tally.perplexity:.3f}" if tally.perplexity < 1e7 else f"{tally.perplexity:.3e}"
    bits = "-" if nbytes is None else f"{tally.bits_per_byte(nbytes):.4f}"
    return name, str(tally.tokens), f"{tally.nats_per_token:.4f}", perplexity, bits


class TokenTextReader:
    """The text that each token of one text adds, read from beginning to end; joined, they are the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> None:
        self._decoder, self._ids = _Verbatim(tokenizer), ids.numpy().data
        self._known: list[str] = []
        self._first = 0
        """Index of the token whose text `_known` begins with."""

    def take(self, start: int, stop: int) -> list[str]:
        """The texts of tokens `start` to `stop`; all tokens taken before must come before `start`.

        A character of several tokens belongs to the last of them.
        """
        assert self._first <= start and stop <= len(self._ids)
        while self._first + len(self._known) < stop:
            self._known += self._read(stop)
        found = self._known[start - self._first : stop - self._first]
        del self._known[: stop - self._first]
        self._first = stop
        return found

    def _read(self, stop: int) -> list[str]:
        """The texts of the next tokens, at least up to `stop`, and on until later tokens cannot change them. With a
        tokenizer written in Python they end at `stop`, as they are there."""
        begin = self._first + len(self._known)
        text = CompletionText(self._decoder, self._ids[:begin])
        for place in range(begin, len(self._ids)):
            text.append(self._ids[place])
            # The text of a tokenizer written in Python never closes before its end, and each token decodes all of it.
            if place + 1 >= stop and (text.is_closed or not self._decoder.is_fast):
                break
        return text.token_texts


class _Verbatim:
    """A tokenizer that leaves nothing out: what is scored is the text as it lies in the file."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.is_fast = tokenizer.is_fast
        self.convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class PerTokenFile:
    """Writes one JSON line per scored token, as they come. A context manager; without a path it writes nothing, without
    a tokenizer no texts."""

    def __init__(self, path: Path | None, texts: Items[Text], tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._path, self._texts = path, texts
        self._token_texts = None if tokenizer is None else [TokenTextReader(tokenizer, text.ids) for text in texts]
        self._file = None if path is None else path.open("w", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None:
            self._guarded(self._file.close)

    def write(self, window: Window, logprobs: torch.Tensor) -> None:
        """Write a line per target of `window`, with logprobs [targets]; the windows of a text must come in order."""
        if self._file is None:
            return
        name, stop = self._texts[window.text].name, window.position + len(window.targets)
        texts: Items[str | None] = [None] * len(window.targets)
        if self._token_texts is not None:
            texts = self._token_texts[window.text].take(window.position, stop)
        scored = zip(window.targets, texts, logprobs.tolist(), strict=True)
        lines = []
        for position, (token, text, logprob) in enumerate(scored, window.position):
            line = {
                "file": name,
                "position": position,
                "token_id": token,
                "text": text,
                "logprob": logprob if math.isfinite(logprob) else None,
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        self._guarded(self._file.writelines, lines)

    def _guarded(self, act: Any, *arguments: Any) -> None:
        try:
            act(*arguments)
        except OSError as error:
            raise DiskFullError(f"--per-token {self._path}: cannot be written: {error.strerror}") from error
