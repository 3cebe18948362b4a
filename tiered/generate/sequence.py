"""One sequence: its tokens, its text as it becomes final, and why it ended."""

from collections.abc import Sequence as Items

import torch

from tiered.errors import TieredError
from tiered.generate.logprobs import Logprobs
from tiered.generate.sampling import Sampler
from tiered.generate.text import CompletionText, IdText
from tiered.generate.text import Decoder as Decoder


class Sequence:
    """A prompt and its completion."""

    def __init__(
        self,
        prompt_ids: list[int],
        sampler: Sampler,
        decoder: Decoder | None,
        max_new_tokens: int,
        eos_ids: frozenset[int],
        stops: Items[str] = (),
        logprobs: int | None = None,
    ) -> None:
        """`decoder`: None where there is no tokenizer; the text is then that of the token ids.

        `logprobs`: record the log-probability of each token, and of so many likeliest tokens; None: record none.
        """
        self.prompt_ids = prompt_ids
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        """None while running; then "stop" (end of text or a stop string), "length" or "error"."""
        self.error: TieredError | None = None
        """Why it failed; None if it did not."""
        self.max_new_tokens = max_new_tokens
        self.logprobs = None if logprobs is None else Logprobs(logprobs)
        """One entry per token; None if they were not asked for."""
        self._sampler = sampler
        self._eos_ids, self._stops = eos_ids, tuple(stops)
        self._completion = CompletionText(IdText()) if decoder is None else CompletionText(decoder, prompt_ids)
        self._shown = 0
        """How many characters of the text no later token can change or take back."""

    @property
    def text(self) -> str:
        """The completion so far, without stop strings; text that may still change is left out until the end."""
        return self._completion.text[: self._shown]

    @property
    def token_texts(self) -> list[str]:
        """The text that each token adds. Joined, they are `text` and, after it, what a stop string cut off.

        A character of several tokens belongs to the last of them; special tokens add nothing.
        """
        texts = self._completion.token_texts
        return texts + [""] * (len(self.token_ids) - len(texts))

    @property
    def offsets(self) -> list[int]:
        """Where each token's text begins in `text`; for tokens that a stop string cut off, the length of `text`."""
        length = len(self.text)
        starts = [0, *self._completion.ends][: len(self.token_ids)]
        return [min(start, length) for start in starts]

    @property
    def sampler(self) -> Sampler:
        return self._sampler

    @property
    def kept(self) -> int:
        """How many of the prompt's last positions need logits: only the last one."""
        return 1

    def take(self, index: int, logits: torch.Tensor) -> None:
        """Choose the next token from logits [1, vocab]."""
        self.advance(logits[-1])

    def advance(self, logits: torch.Tensor) -> None:
        """Choose the next token from logits [vocab], record its log-probability if asked for, and take it."""
        ids = self.prompt_ids + self.token_ids if self._sampler.reads_ids else []
        token = self._sampler(ids, logits, len(self.token_ids))
        if self.logprobs is not None:
            self.logprobs.record(logits, token)
        self.append(token)

    def fail(self, error: TieredError) -> None:
        """End here because of `error`; the text so far stays."""
        self.error, self.finish_reason = error, "error"

    def append(self, token: int) -> None:
        """Take the next token."""
        self.token_ids.append(token)
        if token in self._eos_ids:
            self._finish("stop", len(self._completion.text))
            return
        searched = self._completion.final
        self._completion.append(token)
        text = self._completion.text
        # Text that was final before has been searched already.
        places = (text.find(stop, max(0, searched - len(stop) + 1)) for stop in self._stops)
        found = [at for at in places if at >= 0]
        if found:
            self._finish("stop", min(found))
        elif len(self.token_ids) >= self.max_new_tokens:
            self._finish("length", len(text))
        else:
            final = self._completion.final
            self._shown = max(self._shown, final - self._held(text[:final]))

    def _finish(self, reason: str, length: int) -> None:
        self.finish_reason, self._shown = reason, length

    def _held(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a stop string."""
        held = 0
        for stop in self._stops:
            sizes = range(min(len(stop) - 1, len(text)), held, -1)
            held = next((size for size in sizes if text.endswith(stop[:size])), held)
        return held
