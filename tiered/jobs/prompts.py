"""A request's prompt as token ids, and how many tokens may follow it; or a `Problem`."""

from collections.abc import Sequence
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from tiered.jobs.request import Problem, Request

_LONGEST_REASON: Final = 200
"""Characters of a chat template's own message that are repeated."""


class PromptEncoder:
    """Turns prompts into token ids, with the tokenizer and the chat template of one store."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    def encode(self, request: Request) -> list[int] | Problem:
        """Token ids of the prompt; never none."""
        if request.messages is not None:
            found = self._chat(request, request.messages)
        elif isinstance(request.prompt, str):
            found = list(self._tokenizer(request.prompt)["input_ids"])
        else:
            found = self._checked(request, request.prompt or ())
        if found == []:
            message = "an empty prompt gives this tokenizer nothing to start from; pass some text"
            return _problem(request, "invalid_value", message)
        return found

    def _checked(self, request: Request, ids: Sequence[int]) -> list[int] | Problem:
        for token in ids:
            if not 0 <= token < self._vocab_size:
                message = f"prompt: token ids of this model are 0 to {self._vocab_size - 1}, found {token}"
                return _problem(request, "invalid_value", message)
        return list(ids)

    def _chat(self, request: Request, messages: list[dict[str, str]]) -> list[int] | Problem:
        if self._tokenizer.chat_template is None:
            message = "this model's tokenizer has no chat template; send a prompt to /v1/completions instead"
            return _problem(request, "no_chat_template", message)
        try:
            encoded: Any = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:
            # Templates are programs: they raise what they like, most often on roles in an order they do not know.
            reason = str(error)[:_LONGEST_REASON]
            return _problem(request, "invalid_value", f"messages: this model's chat template refuses them: {reason}")
        return list(encoded["input_ids"])


def tokens_to_generate(request: Request, prompt_tokens: int, default: int, limit: int) -> int | Problem:
    """How many tokens may follow a prompt of `prompt_tokens`, where both together may come to `limit`.

    `default` is for requests that do not say; theirs is cut to what the limit leaves.
    """
    most = request.max_tokens if request.max_tokens is not None else max(1, min(default, limit - prompt_tokens))
    if prompt_tokens + most <= limit:
        return most
    message = (
        f"a prompt of {prompt_tokens} tokens and a completion of up to {most} come to {prompt_tokens + most}, "
        f"there is room for {limit}; shorten the prompt or lower max_tokens"
    )
    return _problem(request, "context_length_exceeded", message)


def _problem(request: Request, code: str, message: str) -> Problem:
    return Problem(request.line, code, message, "prompt" if request.messages is None else "messages", request.custom_id)
