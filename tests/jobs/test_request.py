"""A line of input becomes exactly what it asks for, or a problem that names the field and what to do."""

import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.jobs.fakes import request as line
from tests.quick import examples
from tiered.jobs.request import Problem, Request, parse_line


def parse(text: str, number: int = 5, seed: int = 0) -> Request | Problem:
    return parse_line(text.encode(), number, seed)


def good(text: str, number: int = 5, seed: int = 0) -> Request:
    found = parse(text, number, seed)
    assert isinstance(found, Request), found
    return found


def bad(text: str) -> Problem:
    found = parse(text)
    assert isinstance(found, Problem), found
    return found


# What is asked for.


def test_a_line_that_says_nothing_gets_openai_s_defaults() -> None:
    found = good(line("a"))
    assert (found.custom_id, found.line, found.prompt, found.messages) == ("a", 5, "Hi", None)
    assert (found.max_tokens, found.choices, found.logprobs, found.stops) == (None, 1, None, ())
    assert (found.sampling.temperature, found.sampling.top_p) == (1.0, 1.0)


def test_every_field_of_a_completion_arrives() -> None:
    body: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "top_p": 0.5, "stop": ["x", "yy"], "n": 2, "logprobs": 0}
    found = good(line("a", **body, top_k=4, min_p=0.25, repetition_penalty=1.5, ignore_eos=True))
    assert (found.max_tokens, found.choices, found.logprobs, found.stops) == (3, 2, 0, ("x", "yy"))
    assert found.ignore_eos
    params = found.sampling
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty) == (
        *(0.0, 0.5, 4),
        *(0.25, 1.5),
    )


def test_a_chat_has_messages_whose_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": parts, "name": "Ann"}]
    found = good(line("a", chat=True, messages=messages, max_completion_tokens=9))
    assert found.messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a\nb", "name": "Ann"},
    ]
    assert (found.prompt, found.max_tokens, found.url) == (None, 9, "/v1/chat/completions")


@pytest.mark.parametrize(
    ("body", "logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 4}, 4),
    ],
)
def test_a_chat_asks_for_log_probabilities_in_two_fields(body: dict[str, Any], logprobs: int | None) -> None:
    assert good(line("a", chat=True, **body)).logprobs == logprobs


@pytest.mark.parametrize(("given", "taken"), [("abc", "abc"), (["abc"], "abc"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2])])
def test_a_prompt_is_a_text_or_token_ids(given: Any, taken: Any) -> None:
    assert good(line("a", prompt=given)).prompt == taken


def test_null_is_as_good_as_absent() -> None:
    nothing: dict[str, Any] = dict.fromkeys(
        ("max_tokens", "stop", "seed", "logprobs", "n", "temperature", "stream", "tools")
    )
    assert good(line("a", **nothing)) == good(line("a"))


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    body: dict[str, Any] = {
        "model": "any",
        "user": "u",
        "metadata": {"k": "v"},
        "stream": False,
        "presence_penalty": 0.0,
    }
    more: dict[str, Any] = {
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "echo": False,
    }
    assert good(line("a", **body, **more)) == good(line("a"))


def test_without_a_seed_of_its_own_a_line_is_keyed_by_the_job_s_seed_and_its_place() -> None:
    first, second = good(line("a"), 5, seed=3), good(line("a"), 6, seed=3)
    assert first.sampling.seed == second.sampling.seed == 3
    assert (first.number, second.number) == (5, 6)


def test_a_seed_of_its_own_means_the_same_wherever_the_line_stands() -> None:
    first, second = good(line("a", seed=9), 5, seed=3), good(line("b", seed=9), 77, seed=4)
    assert (first.sampling, first.number) == (second.sampling, second.number)
    # Lines without one are counted from 1.
    assert first.number == 0


def test_negative_seeds_are_seeds() -> None:
    seeds = {good(line("a", seed=seed)).sampling.seed for seed in (-1, -(2**63), 0, 1, 2**64 - 2)}
    assert len(seeds) == 5


# What is refused.

CASES: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"max_tokens": 0}, "max_tokens", ("whole number from 1", "found 0")),
    ({"max_tokens": "5"}, "max_tokens", ('found "5"',)),
    ({"max_tokens": True}, "max_tokens", ("found true",)),
    ({"temperature": -1}, "temperature", ("0 (greedy) or more",)),
    ({"temperature": "hot"}, "temperature", ("a number", '"hot"')),
    ({"temperature": 10**400}, "temperature", ("moderate size",)),
    ({"top_p": 0}, "top_p", ("more than 0",)),
    ({"min_p": 2}, "min_p", ("between 0 and 1",)),
    ({"stop": ""}, "stop", ("not empty",)),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", ("up to 4",)),
    ({"stop": [1]}, "stop", ("text",)),
    ({"seed": 0.5}, "seed", ("whole number",)),
    ({"seed": 2**64}, "seed", ("whole number",)),
    ({"n": 0}, "n", ("1 to 128",)),
    ({"n": 129}, "n", ("1 to 128",)),
    ({"logprobs": 21}, "logprobs", ("0 to 20",)),
    ({"logprobs": True}, "logprobs", ("whole number",)),
    ({"prompt": []}, "prompt", ("text or a list of token ids",)),
    ({"prompt": ["a", "b"]}, "prompt", ("one prompt, found 2", "line of its own")),
    ({"prompt": [1, "b"]}, "prompt", ("token ids",)),
    ({"prompt": [1.0]}, "prompt", ("token ids",)),
    ({"prompt": None}, "prompt", ("found null",)),
    ({"stream": True}, "stream", ("not supported", "remove it")),
    ({"presence_penalty": 0.5}, "presence_penalty", ("not supported",)),
    ({"frequency_penalty": -1}, "frequency_penalty", ("not supported",)),
    ({"logit_bias": {"5": 1}}, "logit_bias", ("not supported",)),
    ({"echo": True}, "echo", ("not supported",)),
    ({"best_of": 3}, "best_of", ("not supported",)),
    ({"suffix": "end"}, "suffix", ("not supported",)),
    ({"max_new_tokens": 5}, "max_new_tokens", ("/v1/completions", "correct it")),
    ({"messages": []}, "messages", ("/v1/completions",)),
]
CHATS: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"tools": [{"type": "function"}]}, "tools", ("not supported",)),
    ({"response_format": {"type": "json_object"}}, "response_format", ("not supported",)),
    ({"reasoning_effort": "high"}, "reasoning_effort", ("not supported",)),
    ({"top_logprobs": 3}, "top_logprobs", ('"logprobs": true',)),
    ({"logprobs": 3}, "logprobs", ("true or false",)),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", ("only one",)),
    ({"prompt": "Hi"}, "prompt", ("/v1/chat/completions",)),
    ({"messages": []}, "messages", ("at least one",)),
    ({"messages": "Hi"}, "messages", ("a list",)),
    ({"messages": ["Hi"]}, "messages[0]", ("role and content",)),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", ("system, developer, user, assistant",)),
    ({"messages": [{"role": "user"}]}, "messages[0].content", ("found null",)),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", ("a text",)),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", ("type text",)),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "messages", ("tool_calls",)),
]


@pytest.mark.parametrize(("body", "param", "told"), CASES, ids=lambda value: str(value)[:40])
def test_a_bad_field_of_a_completion_is_named(body: dict[str, Any], param: str, told: tuple[str, ...]) -> None:
    assert_named(bad(line("a", **body)), param, told)


@pytest.mark.parametrize(("body", "param", "told"), CHATS, ids=lambda value: str(value)[:40])
def test_a_bad_field_of_a_chat_is_named(body: dict[str, Any], param: str, told: tuple[str, ...]) -> None:
    assert_named(bad(line("a", chat=True, **body)), param, told)


def assert_named(found: Problem, param: str, told: tuple[str, ...]) -> None:
    assert (found.custom_id, found.param, found.line) == ("a", param, 5)
    for text in (param, *told):
        assert text in found.message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"custom_id": None}, "custom_id"),
        ({"custom_id": 7}, "custom_id"),
        ({"custom_id": ""}, "custom_id"),
        ({"method": "GET"}, '"POST"'),
        ({"url": "/v1/embeddings"}, "/v1/completions"),
        ({"url": ["/v1/completions"]}, "/v1/completions"),
        ({"body": "prompt"}, "body"),
        ({"body": None}, "body"),
    ],
)
def test_a_line_that_is_no_request_is_explained(change: dict[str, Any], told: str) -> None:
    found = bad(json.dumps({**json.loads(line("a")), **change}))
    assert told in found.message
    assert found.custom_id == (None if "custom_id" in change else "a")


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"nonsense",
        b"[1, 2]",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b"9" * 5000,
        b'{"custom_id": "a", "body": {"temperature": NaN}}',
        b'{"custom_id": "caf\xe9"}',
        b'\xff\xfe{"custom_id": "a"}',
        b'{"custom_id": "\\ud800"}',
        b"\x00\x00\x00",
        b'{"custom_id": "a", "custom_id": "b"}',
        b'{"custom_id": "a", "body": {"prompt": "x", "seed": 1, "seed": 2}}',
    ],
    ids=lambda raw: repr(raw[:30]),
)
def test_a_line_that_is_no_json_object_is_a_problem_without_custom_id(raw: bytes) -> None:
    found = parse_line(raw, 3, 0)
    assert isinstance(found, Problem)
    assert (found.line, found.custom_id) == (3, None)
    assert found.message and len(found.message) < 300


@pytest.mark.parametrize("name", ["custom_id", "method", "url", "body", "prompt", "stop", "seed", "zzz", "messages"])
def test_a_field_nested_to_the_edge_of_what_can_be_read_is_a_problem(name: str) -> None:
    # Somewhere below the recursion limit a value can be read, and not be shown any more.
    whole = json.loads(line("a", chat=name == "messages"))
    (whole if name in whole else whole["body"])[name] = "DEEP"
    messages = set()
    for depth in (200, *range(sys.getrecursionlimit() - 100, sys.getrecursionlimit() + 10), 100_000):
        found = parse(json.dumps(whole).replace('"DEEP"', "[" * depth + "]" * depth))
        assert isinstance(found, Problem)
        messages.add(found.message)
    assert messages == {"lists and objects nested more than 100 deep; flatten them"}


def test_a_value_may_be_nested_as_deeply_as_anybody_needs() -> None:
    text = line("a", metadata="DEEP", messages=[{"role": "user", "content": "Hi"}] * 200, chat=True)
    for depth, kind in ((98, Request), (99, Problem)):
        assert isinstance(parse(text.replace('"DEEP"', "[" * depth + "]" * depth)), kind)


@pytest.mark.parametrize("chat", [False, True])
def test_a_message_repeats_no_name_of_any_length(chat: bool) -> None:
    name = "k" * 100_000
    messages: dict[str, Any] = {"messages": [{"role": "user", "content": "", name: 1}]}
    fields: dict[str, Any] = messages if chat else {name: 1}
    whole = line("a", chat, **fields)
    found = bad(whole)
    assert "kkk..." in found.message and len(found.message) < 300 and len(found.param or "") < 100


def test_a_byte_order_mark_may_begin_the_file_and_no_other_line() -> None:
    raw = b"\xef\xbb\xbf" + line("a").encode()
    assert isinstance(parse_line(raw, 1, 0), Request)
    assert isinstance(parse_line(raw, 2, 0), Problem)


@examples(200)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
    name=st.sampled_from(
        ["custom_id", "method", "url", "body", "prompt", "messages", "max_tokens", "stop", "seed", "logprobs", "n"]
    ),
    chat=st.booleans(),
)
def test_whatever_a_field_holds_the_answer_is_a_request_or_a_problem(value: Any, name: str, chat: bool) -> None:
    whole = json.loads(line("a", chat=chat))
    (whole if name in whole else whole["body"])[name] = value
    found = parse(json.dumps(whole))
    assert isinstance(found, Request | Problem)


def test_a_line_of_many_fields_with_one_twice_is_read_at_once() -> None:
    fields = ", ".join(f'"f{number}": 0' for number in [*range(100_000), 7])
    found = parse_line(f"{{{fields}}}".encode(), 1, 0)
    assert isinstance(found, Problem) and '"f7" is there twice' in found.message
