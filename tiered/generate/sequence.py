"""One sequence: its tokens, its text as it becomes final, and why it ended."""

from collections.abc import Sequence as Strings
from typing import Any, Final, Protocol

import torch

from tiered.generate.logprobs import Logprobs
from tiered.generate.sampling import Sampler

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """The part of a Hugging Face tokenizer that turns tokens into text."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> Any: ...


class Sequence:
    """A prompt and its completion."""

    def __init__(
        self,
        prompt_ids: list[int],
        sampler: Sampler,
        decoder: Decoder,
        max_new_tokens: int,
        eos_ids: frozenset[int],
        stops: Strings[str] = (),
        logprobs: int | None = None,
    ) -> None:
        """`logprobs` asks for the log-probability of each token, and of that many likeliest ones at its place."""
        self.prompt_ids = prompt_ids
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        """None while running; then "stop" (end of text or a stop string) or "length"."""
        self.max_new_tokens = max_new_tokens
        self.logprobs = None if logprobs is None else Logprobs(logprobs)
        """One entry per token, where they were asked for."""
        self.offsets: list[int] = []
        """Characters of the text before each token, where log-probabilities were asked for."""
        self._sampler, self._decoder = sampler, decoder
        self._eos_ids, self._stops = eos_ids, tuple(stops)
        self._text = ""
        self._stable = 0
        """Characters of the text that no later token can change or take back."""
        self._start = 0
        """First token of the stretch that is decoded again with every token."""
        self._head = ""
        """Text of the tokens before it, and of its first `_skip` characters."""
        self._skip = 0

    @property
    def text(self) -> str:
        """The completion so far, without stop strings; what may still change is missing until the end."""
        return self._text[: self._stable]

    @property
    def sampler(self) -> Sampler:
        return self._sampler

    def advance(self, logits: torch.Tensor) -> None:
        """Choose the next token from logits [vocab], record its log-probability if asked for, and take it."""
        ids = self.prompt_ids + self.token_ids if self._sampler.reads_ids else []
        token = self._sampler(ids, logits, len(self.token_ids))
        if self.logprobs is not None:
            self.logprobs.record(logits, token)
        self.append(token)

    def append(self, token: int) -> None:
        """Take the next token."""
        if self.logprobs is not None:
            # Half a character is none yet.
            self.offsets.append(len(self._text.rstrip(_REPLACEMENT)))
        self.token_ids.append(token)
        if token in self._eos_ids:
            self._finish("stop")
            return
        self._decode()
        found = [at for stop in self._stops if (at := self._text.find(stop)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self._finish("stop")
        elif len(self.token_ids) >= self.max_new_tokens:
            self._finish("length")
        else:
            self._stable = max(self._stable, self._stable_length())

    def _finish(self, reason: str) -> None:
        self.finish_reason = reason
        self._stable = len(self._text)

    def _decode(self) -> None:
        tail = self._decoded(self._start)
        self._text = self._head + tail[self._skip :]
        # Decoding all tokens every time would be quadratic. A new stretch may begin at a line's end, because no
        # tokenizer joins characters across it. It takes the line's last token along: some decoders drop the space
        # at the start of a text, which would be a line's indentation.
        if tail.endswith("\n") and len(self.token_ids) - self._start > 32:
            self._head, self._start = self._text, len(self.token_ids) - 1
            self._skip = len(self._decoded(self._start))

    def _decoded(self, start: int) -> str:
        text: str = self._decoder.decode(self.token_ids[start:], skip_special_tokens=True)
        return text

    def _stable_length(self) -> int:
        """Text that is final: without half a character, and without what may become a stop string."""
        length = len(self._text)
        while length and self._text[length - 1] == _REPLACEMENT:
            length -= 1
        text, held = self._text[:length], 0
        for stop in self._stops:
            sizes = range(min(len(stop) - 1, length), held, -1)
            held = next((size for size in sizes if text.endswith(stop[:size])), held)
        return length - held
