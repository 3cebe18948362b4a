"""Results are lines of OpenAI's batch format, and the same bytes whenever they are made."""

import json
from typing import Any

import pytest
import torch

from tests.generate.tokenizers import byte_fallback, ids_of
from tests.jobs.fakes import Letters
from tests.jobs.fakes import request as line
from tiered.generate import Sampler, SamplingParams, Sequence
from tiered.jobs import Label
from tiered.jobs.request import Problem, Request, parse_line
from tiered.jobs.results import TokenTexts, line_of_id, problem_line, result_line

LABEL = Label("0123456789abcdef", 1700000000, "letters")


def ended(text: str, most: int = 10, stops: tuple[str, ...] = (), logprobs: int | None = None) -> Sequence:
    """A sequence that was given the letters of `text`, the first half as likely as the last letter of the alphabet."""
    found = Sequence([72, 105], Sampler(SamplingParams(), 0), Letters(), most, frozenset({0}), stops, logprobs)
    for letter in text:
        logits = torch.full((128,), -20.0)
        logits[ord(letter)] = logits[122] = 5.0
        if found.logprobs is not None:
            found.logprobs.record(logits, ord(letter))
        found.append(ord(letter))
    assert found.finish_reason is not None
    return found


def answer(chat: bool, *sequences: Sequence, **body: Any) -> dict[str, Any]:
    request = parse_line(line("id-1", chat, **body).encode(), 7, 0)
    assert isinstance(request, Request)
    raw = result_line(LABEL, request, sequences, TokenTexts(Letters()))
    assert raw.endswith(b"\n") and raw.count(b"\n") == 1
    found = json.loads(raw)
    assert isinstance(found, dict)
    return found


def test_a_completion_has_every_field_of_the_format() -> None:
    found = answer(False, ended("abc", 3))
    assert found == {
        "id": "batch_req_0123456789abcdef_7",
        "custom_id": "id-1",
        "response": {
            "status_code": 200,
            "request_id": "req_0123456789abcdef_7",
            "body": {
                "id": "cmpl-0123456789abcdef-7",
                "object": "text_completion",
                "created": 1700000000,
                "model": "letters",
                "choices": [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": "length"}],
                "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
            },
        },
        "error": None,
    }


def test_a_chat_completion_has_a_message() -> None:
    body = answer(True, ended("abc\0"))["response"]["body"]
    assert (body["id"], body["object"]) == ("chatcmpl-0123456789abcdef-7", "chat.completion")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "abc", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]


def test_choices_keep_their_order_and_are_counted_together() -> None:
    body = answer(False, ended("ab", 2), ended("cde", 3))["response"]["body"]
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "ab"), (1, "cde")]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}


def test_log_probabilities_of_a_completion() -> None:
    (choice,) = answer(False, ended("ab", 2, logprobs=2))["response"]["body"]["choices"]
    assert choice["logprobs"]["tokens"] == ["a", "b"]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx([-0.6931472, -0.6931472])
    assert [set(top) for top in choice["logprobs"]["top_logprobs"]] == [{"a", "z"}, {"b", "z"}]
    assert choice["logprobs"]["text_offset"] == [0, 1]


def test_without_alternatives_there_are_none() -> None:
    (choice,) = answer(False, ended("ab", 2, logprobs=0))["response"]["body"]["choices"]
    assert choice["logprobs"]["top_logprobs"] is None
    assert len(choice["logprobs"]["token_logprobs"]) == 2


def test_tokens_that_a_stop_string_cut_off_stay_within_the_text() -> None:
    (choice,) = answer(False, ended("abcd", stops=("bcd",), logprobs=0))["response"]["body"]["choices"]
    assert choice["text"] == "a"
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 1]


def test_log_probabilities_of_a_chat() -> None:
    (choice,) = answer(True, ended("a", 1, logprobs=2))["response"]["body"]["choices"]
    (entry,) = choice["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == ("a", [97])
    assert entry["logprob"] == pytest.approx(-0.6931472)
    assert sorted(top["token"] for top in entry["top_logprobs"]) == ["a", "z"]


@pytest.mark.parametrize("chat", [False, True])
def test_texts_offsets_and_bytes_of_tokens_agree_with_the_text(chat: bool) -> None:
    llama = byte_fallback()
    words = ("▁to", "<0xE2>", "<0x82>", "<0xAC>", "<0x41>", "▁a", "<hidden>", "b", "<0xFF>", "</s>")
    end = ids_of(llama, "</s>")[0]
    sequence = Sequence(
        ids_of(llama, "<s>", "▁a"), Sampler(SamplingParams(), 0), llama, 99, frozenset({end}), logprobs=3
    )
    for token in ids_of(llama, *words):
        assert sequence.logprobs is not None
        sequence.logprobs.record(torch.nn.functional.one_hot(torch.tensor(token), len(llama)).float(), token)
        sequence.append(token)
    body = {"logprobs": True, "top_logprobs": 3} if chat else {"logprobs": 3}
    request = parse_line(line("id-1", chat, **body).encode(), 7, 0)
    assert isinstance(request, Request)
    (choice,) = json.loads(result_line(LABEL, request, [sequence], TokenTexts(llama)))["response"]["body"]["choices"]
    texts = [" to", "", "", "€", "A", " a", "", "b", "\N{REPLACEMENT CHARACTER}", ""]
    if chat:
        entries = choice["logprobs"]["content"]
        assert [entry["token"] for entry in entries] == texts
        raw = bytes(byte for entry in entries for byte in entry["bytes"])
        assert raw.decode() == choice["message"]["content"] == "".join(texts)
        assert [entry["top_logprobs"][0]["token"] for entry in entries] == texts
    else:
        assert (choice["logprobs"]["tokens"], choice["text"]) == (texts, "".join(texts))
        assert choice["logprobs"]["text_offset"] == [0, 3, 3, 3, 4, 5, 7, 7, 8, 9]
        assert all(text in top for text, top in zip(texts, choice["logprobs"]["top_logprobs"], strict=True))


def test_impossible_tokens_have_a_number_that_json_can_hold() -> None:
    found = Sequence([1], Sampler(SamplingParams(), 0), Letters(), 1, frozenset(), logprobs=1)
    assert found.logprobs is not None
    logits = torch.full((128,), -torch.inf)
    logits[97] = 0.0
    found.logprobs.record(logits, 98)
    found.append(98)
    (choice,) = answer(False, found)["response"]["body"]["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-9999.0]


def test_the_text_of_a_token_keeps_the_space_it_brings() -> None:
    class Words:
        def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
            return " ".join("ab"[token] for token in token_ids)

    assert [TokenTexts(Words()).text(token) for token in (0, 1)] == [" a", " b"]


def test_text_is_written_as_it_is() -> None:
    request = parse_line(line("caf\u00e9").encode(), 1, 0)
    assert isinstance(request, Request)
    sequence = Sequence([1], Sampler(SamplingParams(), 0), Letters(), 2, frozenset())
    for token in (0x8A9E, 0x2028):
        sequence.append(token)
    raw = result_line(LABEL, request, [sequence], TokenTexts(Letters()))
    assert "caf\u00e9" in raw.decode() and "\u8a9e\u2028" in raw.decode()


def test_a_problem_says_the_line_in_both_places_where_clients_look() -> None:
    found = json.loads(problem_line(LABEL, Problem(9, "invalid_value", "n: expected 1", "n", "id-9")))
    assert (found["id"], found["custom_id"]) == ("batch_req_0123456789abcdef_9", "id-9")
    assert found["response"]["status_code"] == 400
    assert found["response"]["body"]["error"] == {
        "message": "line 9: n: expected 1",
        "type": "invalid_request_error",
        "param": "n",
        "code": "invalid_value",
    }
    assert found["error"] == {"code": "invalid_value", "message": "line 9: n: expected 1", "line": 9}


def test_where_the_line_is_not_to_blame_the_status_says_so() -> None:
    problem = Problem(9, "model_error", "the model's logits are NaN", None, "id-9", 500)
    found = json.loads(problem_line(LABEL, problem))["response"]
    assert (found["status_code"], found["body"]["error"]["type"]) == (500, "server_error")


def test_half_a_character_in_a_message_is_escaped() -> None:
    found = json.loads(problem_line(LABEL, Problem(9, "invalid_value", "refused: \ud800", None, "id-9")))
    assert found["error"]["message"] == "line 9: refused: \ud800"


def test_an_id_leads_back_to_its_line_and_to_no_other_job() -> None:
    found = answer(False, ended("abc", 3))
    assert line_of_id(found["id"], LABEL.key) == 7
    for other in ("fedcba9876543210", "", "0123456789abcde"):
        assert line_of_id(found["id"], other) is None
    for identifier in (
        "batch_req_0123456789abcdef_",
        "batch_req_0123456789abcdef_x",
        "7",
        "batch_req_0123456789abcdef_-1",
    ):
        assert line_of_id(identifier, LABEL.key) is None
