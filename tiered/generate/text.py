"""Turns token ids into text, token by token. All text that is shown, cut at stops, measured or returned is made here.

In: a tokenizer, a prompt's ids, then one id after the other. Out: the text of the completion, exactly as the tokenizer
decodes all of it; how much of that is final; where each token's text ends. `Sequence` uses it for completions,
`tiered score` for whole texts.

A tokenizer's text is not the sum of its tokens' texts. A space at the beginning of a text is dropped, a character may
be spread over several tokens, a run of byte tokens (`<0xE2>`) counts as text only if all of it is UTF-8, and some
tokenizers take away spaces before punctuation. So a few tokens are decoded again with every new one: those since
the text was last closed (ended so that no later token can change it), behind some tokens before that place as context.
"""

import re
from array import array
from collections.abc import Sequence as Items
from itertools import pairwise
from typing import Any, Final, Protocol

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Decoder(Protocol):
    """The part of a Hugging Face tokenizer that turns tokens into text."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> Any: ...


class IdText:
    """The text of a store without a tokenizer: token ids as options take them, such as 2,100,524."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return ",".join(map(str, token_ids))


class CompletionText:
    """decode(prompt + completion) without decode(prompt) at its beginning, while the completion grows.

    Special tokens have no text. Where decode(prompt + completion) does not begin with decode(prompt) (the prompt ends
    within a character, or the completion joins its last word), only their longest common prefix is left out: a
    character that the completion completes belongs to the completion as a whole.

    A tokenizer written in Python may rewrite a text from its beginning. Its text is decoded whole with every token, and
    none of it is final before the end.
    """

    def __init__(self, decoder: Decoder, prompt_ids: Items[int] = ()) -> None:
        self._decoder, self._prompt_ids = decoder, prompt_ids
        self._settled = ""
        """Text that no later token can change."""
        self._open = ""
        """Text after `_settled`, that of `_pending`."""
        self._pending: list[int] = []
        """Tokens since the text was last closed."""
        self._before: list[int] = []
        """Tokens that were pending when the text was last closed; `_pending` may have to be decoded behind them."""
        self._context: list[int] | None = None
        """Tokens that `_pending` is decoded behind; found when the first token comes."""
        self._context_text = ""
        self._cleans = self._is_local = False
        self._ends = array("q")
        self._whole = ""
        """The open text when it last ended with a whole character."""

    @property
    def text(self) -> str:
        """The text of all tokens so far."""
        return self._settled + self._open

    @property
    def final(self) -> int:
        """How many characters of `text` no later token can change."""
        return len(self._settled)

    @property
    def is_closed(self) -> bool:
        """Whether all of `text` is final."""
        return not self._pending

    @property
    def token_texts(self) -> list[str]:
        """The text that each token adds; joined, they are `text`. A character of several tokens belongs to the last."""
        text = self.text
        return [text[start:end] for start, end in pairwise([0, *self.ends])]

    @property
    def ends(self) -> list[int]:
        """For each token, the length of the text made by it and the tokens before it, as far as that has stayed."""
        length = len(self._settled) + len(self._open)
        ends = [min(end, length) for end in self._ends]
        return [*ends[:-1], length] if ends else []

    def append(self, token: int) -> None:
        """Take the next token."""
        if self._context is None:
            self._begin()
        assert self._context is not None
        before = self._open
        self._pending.append(token)
        whole = self._decoded(self._context + self._pending)
        self._open = whole[_shared(self._context_text, whole) :]
        self._note_end()
        if self._open == before and self._is_hidden(token):
            self._pending.pop()  # special tokens leave no trace in the text, so they need not be decoded again
        elif self._is_local and self._closes(self._open, token):
            self._settle()

    def _begin(self) -> None:
        """Choose the context: the prompt from its last token that closes a text by itself; none before it matters."""
        self._is_local = bool(getattr(self._decoder, "is_fast", True))
        self._cleans = _cleans_up(self._decoder)
        start = 0
        if self._is_local:
            places = range(len(self._prompt_ids) - 1, -1, -1)
            start = next((at for at in places if self._stands_alone(self._prompt_ids[at])), 0)
        self._context = list(self._prompt_ids[start:])
        self._context_text = self._decoded(self._context)

    def _stands_alone(self, token: int) -> bool:
        return self._closes(self._decoded([token]), token)

    def _closes(self, text: str, token: int) -> bool:
        """Whether no later token can change a text that ends with `text`, whose last token is `token`."""
        if not text or text.endswith(_REPLACEMENT) or self._is_byte(token):
            return False
        # Cleaning removes a space because of what follows it, as in " ." or " 've". In a text that ends with two
        # letters or digits, no such sequence can have begun.
        return not self._cleans or (len(text) > 1 and text[-2:].isalnum())

    def _settle(self) -> None:
        """Close the text: the tokens since it was last closed become the context of the next ones."""
        assert self._context is not None
        self._settled += self._open
        # The context must have some text, or the next tokens would begin a text and lose their leading space.
        for context in (self._pending, self._before + self._pending, self._context + self._pending):
            text = self._decoded(context)
            if text:
                break
        self._context, self._context_text = context, text
        self._before, self._pending, self._open = self._pending, [], ""
        self._whole = ""

    def _note_end(self) -> None:
        """Note where the newest token's text ends, and correct the ends of earlier tokens whose text it has changed."""
        whole = self._open.rstrip(_REPLACEMENT)
        if whole == self._open or whole.startswith(self._whole):
            kept = len(self._settled) + _shared(self._whole, whole)
            for at in range(len(self._ends) - 1, -1, -1):
                if self._ends[at] <= kept:
                    break
                self._ends[at] = kept
            self._whole = whole
        # Else the text ends within a character; until that is complete, characters before it may be missing too.
        self._ends.append(len(self._settled) + len(self._whole))

    def _is_byte(self, token: int) -> bool:
        """Whether `token` is a byte token; a run of them may still turn out not to be UTF-8."""
        pieces = getattr(self._decoder, "convert_ids_to_tokens", None)
        return pieces is not None and _BYTE_TOKEN.fullmatch(str(pieces(token))) is not None

    def _is_hidden(self, token: int) -> bool:
        """Whether `token` is a special token, which decoding leaves out."""
        return not self._decoded([token]) and bool(self._decoder.decode([token], skip_special_tokens=False))

    def _decoded(self, ids: list[int]) -> str:
        return str(self._decoder.decode(ids, skip_special_tokens=True))


def _shared(earlier: str, later: str) -> int:
    """The length of the longest common prefix, in characters."""
    if later.startswith(earlier):
        return len(earlier)
    pairs = enumerate(zip(earlier, later, strict=False))
    return next((at for at, (one, other) in pairs if one != other), len(later))


def _cleans_up(decoder: Any) -> bool:
    """Whether decoding takes away spaces before punctuation; not every tokenizer that says so does."""
    if not getattr(decoder, "clean_up_tokenization_spaces", False):
        return False
    ids = decoder("a .", add_special_tokens=False)["input_ids"]
    return "a ." not in str(decoder.decode(ids))
