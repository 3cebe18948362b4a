"""A prompt becomes token ids of this model, within what it has positions for, or a problem that says why not."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.fakes import Letters, request
from tiered.jobs import PromptEncoder
from tiered.jobs.prompts import tokens_to_generate
from tiered.jobs.request import Problem, Request, parse_line


def parsed(chat: bool = False, **body: Any) -> Request:
    found = parse_line(request("a", chat, **body).encode(), 3, 0)
    assert isinstance(found, Request)
    return found


def encoded(found: Request, template: str | None = "any") -> list[int] | Problem:
    tokenizer: Any = Letters()
    tokenizer.chat_template = template
    return PromptEncoder(tokenizer, 128).encode(found)


def told(found: object) -> str:
    assert isinstance(found, Problem)
    assert (found.line, found.custom_id) == (3, "a")
    return found.message


def test_text_goes_through_the_tokenizer_and_token_ids_do_not() -> None:
    assert encoded(parsed(prompt="ab")) == [97, 98]
    assert encoded(parsed(prompt=[5, 0, 127])) == [5, 0, 127]


@pytest.mark.parametrize("token", [-1, 128, 10**30])
def test_token_ids_that_the_model_does_not_have_are_refused(token: int) -> None:
    message = told(encoded(parsed(prompt=[5, token])))
    assert "0 to 127" in message and str(token) in message


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_with_a_token_that_only_the_tokenizer_has_is_refused(chat: bool) -> None:
    class Added(Letters):
        """Has an image among its letters, the model has not."""

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [200 if letter == "#" else ord(letter) for letter in text]}

        def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
            return "<image>" if token_ids == [200] else super().decode(token_ids)

    tokenizer: Any = Added()
    found = parsed(chat=True, messages=[{"role": "user", "content": "a#"}]) if chat else parsed(prompt="a#")
    message = told(PromptEncoder(tokenizer, 128).encode(found))
    assert '0 to 127, found 200, as which its tokenizer reads "<image>"' in message


class Panic(BaseException):
    """As tokenizers' are."""


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("error", [ValueError("no\nsuch text"), Panic("no such text"), RecursionError("no such text")])
def test_whatever_a_tokenizer_raises_concerns_its_prompt(error: BaseException, chat: bool) -> None:
    class Fails(Letters):
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            raise error

    tokenizer: Any = Fails()
    assert "no such text" in told(PromptEncoder(tokenizer, 128).encode(parsed(chat=chat)))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(5, "no such luck")])
def test_what_happens_to_the_machine_is_no_problem_of_a_prompt(error: BaseException, chat: bool) -> None:
    class Fails(Letters):
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            raise error

    tokenizer: Any = Fails()
    with pytest.raises(type(error)):
        PromptEncoder(tokenizer, 128).encode(parsed(chat=chat))


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_that_cannot_fit_never_comes_to_the_tokenizer(chat: bool) -> None:
    class Counts(Letters):
        read = 0

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            self.read += 1
            return {"input_ids": [1, 2]}

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b" * 100: 1}

    def told_of(length: int) -> list[int] | Problem:
        text = "a" * length
        body = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        return PromptEncoder(tokenizer, 128, room=20_000).encode(parsed(chat=chat, **body))

    tokenizer: Any = Counts()
    assert told_of(1_900_000) == [1, 2] and tokenizer.read == 1
    found = told_of(2_000_001)
    assert isinstance(found, Problem) and found.code == "context_length_exceeded" and tokenizer.read == 1
    assert "of 2000" in found.message and "room for 20000 tokens" in found.message


def test_an_encoder_leaves_no_process_behind() -> None:
    def children() -> str:
        return Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")

    tokenizer: Any = Letters()
    before = children()
    with PromptEncoder(tokenizer, 128) as encoder:
        encoder.encode(parsed(chat=True))
        assert children() != before
    assert children() == before


def test_an_empty_prompt_has_nothing_to_start_from() -> None:
    assert "empty prompt" in told(encoded(parsed(prompt="")))


def test_messages_go_through_the_chat_template() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert encoded(parsed(chat=True, messages=messages)) == Letters()("<user>Hi<assistant>")["input_ids"]


def test_a_model_without_a_chat_template_says_what_to_use_instead() -> None:
    assert "/v1/completions" in told(encoded(parsed(chat=True), template=None))


def test_what_a_chat_template_refuses_is_passed_on() -> None:
    messages = [{"role": "assistant", "content": "Hi"}]
    assert "must begin with the user" in told(encoded(parsed(chat=True, messages=messages)))


@pytest.mark.parametrize(("asked", "expected"), [(None, 8), (5, 5), (30, 30)])
def test_a_line_may_say_how_many_tokens_and_otherwise_the_job_does(asked: int | None, expected: int) -> None:
    assert tokens_to_generate(parsed(max_tokens=asked), 10, default=8, limit=40) == expected


def test_the_job_s_own_number_is_cut_to_what_there_is_room_for() -> None:
    assert tokens_to_generate(parsed(), 10, default=50, limit=40) == 30


@pytest.mark.parametrize(("asked", "prompt"), [(31, 10), (1, 40), (None, 40), (None, 41)])
def test_what_has_no_room_is_refused(asked: int | None, prompt: int) -> None:
    found = tokens_to_generate(parsed(max_tokens=asked), prompt, default=8, limit=40)
    assert isinstance(found, Problem) and found.code == "context_length_exceeded"
    assert f"{prompt} tokens" in found.message and "room for 40" in found.message
