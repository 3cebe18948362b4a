"""A request's prompt as token ids, and how many tokens may follow it; or a `Problem`."""

from transformers import PreTrainedTokenizerBase

from tiered.errors import error_of_one, shortened
from tiered.generate.template import ChatTemplate, TemplateRefused
from tiered.jobs.fields import shown
from tiered.jobs.request import Problem, Request


class PromptEncoder:
    """Turns prompts into token ids, with the tokenizer and the chat template of one store."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._template = ChatTemplate(tokenizer)

    def encode(self, request: Request) -> list[int] | Problem:
        """Token ids of the prompt; never none."""
        if request.messages is not None:
            found = self._chat(request, request.messages)
        elif isinstance(request.prompt, str):
            found = self._text(request, request.prompt)
        else:
            found = list(request.prompt or ())
        return found if isinstance(found, Problem) else self._checked(request, found)

    def _checked(self, request: Request, ids: list[int]) -> list[int] | Problem:
        if not ids:
            message = "an empty prompt gives this tokenizer nothing to start from; pass some text"
            return _problem(request, "invalid_value", message)
        wrong = next((token for token in (min(ids), max(ids)) if not 0 <= token < self._vocab_size), None)
        if wrong is None:
            return ids
        message = f"token ids of this model are 0 to {self._vocab_size - 1}, found {shown(wrong)}"
        if isinstance(request.prompt, list):
            return _problem(request, "invalid_value", f"prompt: {message}")
        # Added to the tokenizer, but not to the model.
        text = shown(str(self._tokenizer.decode([wrong])))
        return _problem(request, "invalid_value", f"{message}, as which its tokenizer reads {text}; leave that out")

    def _text(self, request: Request, prompt: str) -> list[int] | Problem:
        try:
            return list(self._tokenizer(prompt)["input_ids"])
        except BaseException as error:
            reason = _reason(error)
            return _problem(request, "invalid_value", f"prompt: this model's tokenizer cannot read it: {reason}")

    def _chat(self, request: Request, messages: list[dict[str, str]]) -> list[int] | Problem:
        if self._tokenizer.chat_template is None:
            message = "this model's tokenizer has no chat template; send a prompt to /v1/completions instead"
            return _problem(request, "no_chat_template", message)
        try:
            return self._template.encode(messages)
        except TemplateRefused as error:
            reason = str(error)
        except BaseException as error:
            reason = _reason(error)
        return _problem(request, "invalid_value", f"messages: this model's chat template refuses them: {reason}")


def _reason(error: BaseException) -> str:
    """Why a prompt could not be encoded; raises what has nothing to do with it. Panics are no Exceptions."""
    if not isinstance(error, Exception) and error_of_one(error) is None:
        raise error
    return shortened(error)


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
