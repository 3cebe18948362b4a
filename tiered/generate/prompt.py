"""Turns prompts into token ids, for `cli/generate.py` and `jobs/prompts.py`.

In: texts, messages for the chat template, or token ids. Out: token ids of the model, at least one; or a ConfigError
that says why there are none, or whatever the tokenizer raises.
"""

import json
from collections.abc import Iterable
from functools import cached_property
from types import TracebackType
from typing import Final, Self

from transformers import PreTrainedTokenizerBase

from tiered.errors import ConfigError, cut
from tiered.generate.template import ChatTemplate, Messages
from tiered.units import MIB

_ANY_CHARACTERS: Final = MIB
"""Texts of up to so many characters go to the tokenizer, however few tokens there is room for."""
_TOKEN_CHARACTERS: Final = 64
"""At least so many characters are allowed for a token: normalizers drop characters, and collapse spaces."""
_LONGEST_SHOWN: Final = 40
NO_TOKENIZER: Final = (
    "this store has no tokenizer: pass token ids instead of a text (generate: --prompt-ids or --ids-file, score: "
    "--ids-file, batch: a list of them as the prompt), or put one there with 'tiered convert STORE --tokenizer PATH'"
)


class PromptTooLongError(ConfigError):
    """A text has more characters than can fit into the tokens that there is room for."""


class Prompts:
    """The tokenizer and the chat template of one store, or none; a context manager.

    `room`: how many tokens a prompt may have; None: no limit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, room: int | None) -> None:
        self._found, self._vocab_size, self._room = tokenizer, vocab_size, room
        self._template = None if tokenizer is None else ChatTemplate(tokenizer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._template is not None:
            self._template.__exit__(kind, error, trace)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        self._check_length(text)
        return self._checked(self._tokenizer(text)["input_ids"])

    def encode_chat(self, messages: Messages) -> list[int]:
        """Token ids of `messages` and of what begins an answer. Raises TemplateRefused."""
        assert self._template is not None, "without a tokenizer there is no chat template"
        text = self._template.render(messages)
        self._check_length(text)
        return self._checked(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self._found is None:
            raise ConfigError(NO_TOKENIZER)
        return self._found

    def take(self, ids: Iterable[int]) -> list[int]:
        """Token ids that were given as such, as they are."""
        return check_ids(ids, self._vocab_size)

    def _check_length(self, text: str) -> None:
        """Refuse what cannot fit: a tokenizer takes up to 500 bytes of memory for a character."""
        if self._room is None or len(text) <= _ANY_CHARACTERS:
            return
        if len(text) > max(self._room, 1) * self._most_per_token:
            raise PromptTooLongError(
                f"a text of {len(text)} characters is too long for a prompt: there is room for {self._room} tokens; "
                "shorten it"
            )

    @cached_property
    def _most_per_token(self) -> int:
        return max(_TOKEN_CHARACTERS, max(map(len, self._tokenizer.get_vocab()), default=0))

    def _checked(self, found: list[int]) -> list[int]:
        ids = list(found)
        if not ids:
            raise ConfigError("an empty prompt gives this tokenizer nothing to start from; pass some text")
        check_vocabulary(self._tokenizer, self._vocab_size, max(ids))
        return ids


def check_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """`ids`; raises ConfigError where one of them is no token of the model."""
    found = list(ids)
    wrong = next((token for token in found if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ConfigError(f"token ids of this model are 0 to {vocab_size - 1}, found {cut(str(wrong), _LONGEST_SHOWN)}")
    return found


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, largest: int) -> None:
    """Raises ConfigError where the model does not know `largest`, the largest token id of a text."""
    if largest < vocab_size:
        return
    text = cut(json.dumps(str(tokenizer.decode([largest])), ensure_ascii=False), _LONGEST_SHOWN)
    raise ConfigError(
        f"this model knows tokens 0 to {vocab_size - 1}, found {largest}, as which its tokenizer reads {text}; "
        "leave that out, or put the model's own into the store with 'tiered convert STORE --tokenizer PATH'"
    )
