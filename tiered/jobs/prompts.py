"""A request's prompt as token ids, and how many tokens may follow it; or a `Problem`."""

from types import TracebackType
from typing import Self

from transformers import PreTrainedTokenizerBase

from tiered.errors import ConfigError, TieredError, contained
from tiered.generate.prompt import NO_TOKENIZER, Prompts, PromptTooLongError
from tiered.generate.template import TemplateRefused
from tiered.jobs.request import Problem, Request


class PromptEncoder:
    """Turns prompts into token ids, with the tokenizer and the chat template of one store, if any; a context manager.

    `room`: how many tokens a prompt may have; None: no limit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, room: int | None = None) -> None:
        self._prompts = Prompts(tokenizer, vocab_size, room)
        self._has_tokenizer = tokenizer is not None
        self._has_template = tokenizer is not None and tokenizer.chat_template is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._prompts.__exit__(kind, error, trace)

    def encode(self, request: Request) -> list[int] | Problem:
        """Token ids of the prompt, at least one; or why there are none, or the request asks for texts that no tokenizer
        can make."""
        if not self._has_tokenizer:
            asked = {"messages": request.messages, "stop": request.stops or None, "logprobs": request.logprobs}
            field = next((name for name, value in asked.items() if value is not None), None)
            if field is not None:
                message = f"{field}: takes or gives texts; {NO_TOKENIZER}"
                return Problem(request.line, "unsupported_value", message, field, request.custom_id)
        if request.messages is not None and not self._has_template:
            message = "this model's tokenizer has no chat template; send a prompt to /v1/completions instead"
            return _problem(request, "no_chat_template", message)
        errors = list[TieredError]()
        with contained(errors.append):
            return self._ids(request)
        error = errors[0]
        if isinstance(error, PromptTooLongError):
            return _problem(request, "context_length_exceeded", str(error))
        if isinstance(error, ConfigError):
            return _problem(request, "invalid_value", str(error))
        what = "prompt: this model's tokenizer cannot read it"
        if request.messages is not None:
            what = "messages: this model's chat template refuses them"
        return _problem(request, "invalid_value", f"{what}: {error}")

    def _ids(self, request: Request) -> list[int]:
        if request.messages is not None:
            try:
                return self._prompts.encode_chat(request.messages)
            except TemplateRefused as error:
                raise TieredError(str(error)) from None
        if isinstance(request.prompt, str):
            return self._prompts.encode(request.prompt)
        try:
            return self._prompts.take(request.prompt or ())
        except ConfigError as error:
            raise ConfigError(f"prompt: {error}") from None


def tokens_to_generate(request: Request, prompt_tokens: int, default: int, limit: int) -> int | Problem:
    """How many tokens may follow a prompt of `prompt_tokens`, if both together may have at most `limit`.

    `default` is for requests that name no number; it is cut to what the limit leaves. Where a
    named number, or even one token, exceeds the limit, returns a `Problem`.
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
