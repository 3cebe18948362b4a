"""A finished request -> a line of the result file, in OpenAI's batch format. Pure: the same tokens give the same bytes.

Ids are made of the job's key and the line of the input, so they tell a restarted job what is done. `created` is when
the job was begun. Nothing else in a result depends on when, where or together with what it was computed.
"""

import json
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from tiered.generate import Sequence
from tiered.generate.sequence import Decoder
from tiered.jobs.request import CHAT, Problem, Request

_ID: Final = "batch_req_"
_LEAST_LOGPROB: Final = -9999.0
"""What OpenAI's API says for a token of probability 0; JSON has no infinity."""


@dataclass(frozen=True)
class Label:
    """What all results of a job share."""

    key: str
    """The key of the job's identity."""
    created: int
    """When the job was begun, in seconds since 1970."""
    model: str
    """The store's name."""


class TokenTexts:
    """Texts of tokens that might have been chosen: what each would add to a text; of a special token, its name."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        # The same few tokens come again and again.
        self.text = lru_cache(maxsize=8192)(self._text)

    def _text(self, token: int) -> str:
        # Some decoders drop the space at the start of a text: the second of two tokens keeps it.
        once, twice = (str(self._decoder.decode([token] * count, skip_special_tokens=False)) for count in (1, 2))
        return twice[len(once) :]


def result_line(label: Label, request: Request, sequences: Items[Sequence], texts: TokenTexts | None) -> bytes:
    """The result of `request`, whose choices are `sequences`; without `texts` it has token ids in their place."""
    chat = request.url == CHAT
    if texts is None:
        choices = [_choice_of_ids(number, s) for number, s in enumerate(sequences)]
    else:
        choices = [(_chat_choice if chat else _choice)(number, s, texts) for number, s in enumerate(sequences)]
    prompt_tokens = len(sequences[0].prompt_ids)
    completion_tokens = sum(len(s.token_ids) for s in sequences)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{label.key}-{request.line}",
        "object": "chat.completion" if chat else "text_completion",
        "created": label.created,
        "model": label.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
    return _line(label, request.line, request.custom_id, 200, body, None)


def problem_line(label: Label, problem: Problem) -> bytes:
    """The error result of a line that cannot be served."""
    message = f"line {problem.line}: {problem.message}"
    inner = {
        "message": message,
        "type": "invalid_request_error" if problem.status < 500 else "server_error",
        "param": problem.param,
        "code": problem.code,
    }
    outer = {"code": problem.code, "message": message, "line": problem.line}
    return _line(label, problem.line, problem.custom_id, problem.status, {"error": inner}, outer)


def line_of_id(identifier: str, key: str) -> int | None:
    """The input line whose result has this id; None where the result is not of the job with this key."""
    start = f"{_ID}{key}_"
    number = identifier.removeprefix(start)
    return int(number) if identifier.startswith(start) and number.isascii() and number.isdecimal() else None


def _line(label: Label, line: int, custom_id: str | None, status: int, body: Any, error: Any) -> bytes:
    value = {
        "id": f"{_ID}{label.key}_{line}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"req_{label.key}_{line}", "body": body},
        "error": error,
    }
    # Line separators of Unicode are left as they are: only "\n" ends a line of JSONL. Lone surrogates (halves
    # of characters), which a template may put into its message, become JSON's own escapes.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace") + b"\n"


def _choice(number: int, sequence: Sequence, texts: TokenTexts) -> dict[str, Any]:
    return {
        "index": number,
        "text": sequence.text,
        "logprobs": _completion_logprobs(sequence, texts),
        "finish_reason": sequence.finish_reason,
    }


def _choice_of_ids(number: int, sequence: Sequence) -> dict[str, Any]:
    return {
        "index": number,
        "text": None,
        "token_ids": sequence.token_ids,
        "logprobs": None,
        "finish_reason": sequence.finish_reason,
    }


def _chat_choice(number: int, sequence: Sequence, texts: TokenTexts) -> dict[str, Any]:
    return {
        "index": number,
        "message": {"role": "assistant", "content": sequence.text, "refusal": None},
        "logprobs": _chat_logprobs(sequence, texts),
        "finish_reason": sequence.finish_reason,
    }


def _completion_logprobs(sequence: Sequence, texts: TokenTexts) -> dict[str, Any] | None:
    found = sequence.logprobs
    if found is None:
        return None
    chosen = list(enumerate(zip(sequence.token_ids, sequence.token_texts, strict=True)))
    return {
        "tokens": [text for _, (_, text) in chosen],
        "token_logprobs": [_finite(found.chosen(place)) for place, _ in chosen],
        "top_logprobs": [_by_text(found.top(place), *own, texts) for place, own in chosen] if found.count else None,
        "text_offset": sequence.offsets,
    }


def _chat_logprobs(sequence: Sequence, texts: TokenTexts) -> dict[str, Any] | None:
    found = sequence.logprobs
    if found is None:
        return None
    content = []
    for place, (token, text) in enumerate(zip(sequence.token_ids, sequence.token_texts, strict=True)):
        own = _token(text, found.chosen(place), list(text.encode()))
        top = [own if other == token else _other(other, logprob, texts) for other, logprob in found.top(place)]
        content.append({**own, "top_logprobs": top})
    return {"content": content, "refusal": None}


def _by_text(top: Items[tuple[int, float]], token: int, text: str, texts: TokenTexts) -> dict[str, float]:
    """Log-probabilities by text, where `token` has `text`; of tokens with the same text, the likeliest counts."""
    found: dict[str, float] = {}
    for other, logprob in top:
        found.setdefault(text if other == token else texts.text(other), _finite(logprob))
    return found


def _other(token: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    text = texts.text(token)
    # A part of a character has no text, so its bytes are not known.
    return _token(text, logprob, None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode()))


def _token(text: str, logprob: float, nbytes: list[int] | None) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": nbytes}


def _finite(logprob: float) -> float:
    """`logprob`, no less than `_LEAST_LOGPROB`, with the digits that float32 has."""
    return float(f"{max(logprob, _LEAST_LOGPROB):.7g}")
