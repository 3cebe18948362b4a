"""One line of a job's input -> a `Request`, or a `Problem` that names what is wrong. Pure.

Lines are in OpenAI's batch format: custom_id, method, url, body. What a body asks for is either honoured or refused by
name: nothing that would change a result is ignored.
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn

from tiered.errors import ConfigError
from tiered.generate import SamplingParams
from tiered.jobs.fields import Fields, Refused, cut, expected, shown

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"

_HARMLESS: Final = frozenset(
    (
        *("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        "parallel_tool_calls",
    )
)
"""Fields of a body that never change a result."""
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "stream": (False,),
    "stream_options": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "verbosity": (),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""Fields of OpenAI's API that are not supported, with the values that change nothing."""
_MOST_CHOICES: Final = 128
_MOST_LOGPROBS: Final = 20
_MOST_STOPS: Final = 4
_MOST_TOKENS: Final = (1 << 31) - 1
_MOST_NESTED: Final = 100
"""How deep lists and objects may be nested. Python's own limit depends on the caller's stack, and so would a result."""
_ROLES: Final = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class Problem:
    """Why a line gets an error result."""

    line: int
    """Counted from 1, blank lines included."""
    code: str
    message: str
    """What was expected, what was found, and what to do; without the line's number."""
    param: str | None = None
    """The field of the body it is about."""
    custom_id: str | None = None
    """None where the line has none, or not one of its own."""
    status: int = 400
    """400 where the line is to blame, 500 where computing its answer has failed."""


@dataclass(frozen=True)
class Request:
    """What one good line asks for. Exactly one of `prompt` and `messages` is given."""

    line: int
    custom_id: str
    prompt: str | list[int] | None
    """Text, or token ids."""
    messages: list[dict[str, str]] | None
    max_tokens: int | None
    """None where the line leaves it to the job."""
    sampling: SamplingParams
    number: int
    """The sampler's key beside the seed: the line's number, or 0 where the line has a seed of its own."""
    stops: tuple[str, ...]
    choices: int
    logprobs: int | None
    """How many likeliest tokens to report for each token; None: no log-probabilities at all."""
    ignore_eos: bool

    @property
    def url(self) -> str:
        return COMPLETIONS if self.messages is None else CHAT


def parse_line(raw: bytes, line: int, seed: int) -> Request | Problem:
    """The request in `raw`, line number `line` of a job whose seed is `seed`."""
    value = parse_object(raw, line)
    if isinstance(value, Problem):
        return value
    custom_id = custom_id_of(value)
    try:
        if custom_id is None:
            raise expected("custom_id", "a text that is not empty", value.get("custom_id"))
        return _request(value, line, custom_id, seed)
    except Refused as refused:
        return Problem(line, refused.code, refused.message, refused.param, custom_id)


def parse_object(raw: bytes, line: int) -> dict[str, Any] | Problem:
    """The JSON object in `raw`."""
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
        value = json.loads(text, parse_constant=_no_number, object_pairs_hook=_object)
        if raw.count(b"[") + raw.count(b"{") > _MOST_NESTED and _is_nested(value):
            raise RecursionError
        if b"\\u" in raw:
            # Escapes can spell lone surrogates (half characters), which no tokenizer takes and no result can repeat.
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return Problem(line, "invalid_encoding", f"not UTF-8 ({error.reason} at byte {error.start}); convert the file")
    except UnicodeEncodeError:
        return Problem(line, "invalid_encoding", "a \\u escape spells half a character; write the whole one")
    except json.JSONDecodeError as error:
        where = f"{error.msg} at character {error.pos + 1}"
        return Problem(line, "invalid_json", f"not valid JSON ({where}); every line is one JSON object")
    except RecursionError:
        return Problem(line, "invalid_json", f"lists and objects nested more than {_MOST_NESTED} deep; flatten them")
    except ValueError as error:
        return Problem(line, "invalid_json", f"not valid JSON ({error}); every line is one JSON object")
    if not isinstance(value, dict):
        return Problem(line, "invalid_json", f"expected a JSON object, found {shown(value)}")
    return value


def _is_nested(value: Any) -> bool:
    """Whether `value` is nested deeper than `_MOST_NESTED`."""
    level = [value]
    for _ in range(_MOST_NESTED):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
    return any(isinstance(item, dict | list) for item in level)


def custom_id_of(value: dict[str, Any]) -> str | None:
    """The custom_id of a line, None where it has no proper one."""
    found = value.get("custom_id")
    return found if isinstance(found, str) and found else None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`. Raises ValueError for two fields of the same name, as one of them would be ignored."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{shown(twice)} is there twice in one object")
    return value


def _request(value: dict[str, Any], line: int, custom_id: str, seed: int) -> Request:
    url, body = value.get("url"), value.get("body")
    if value.get("method") != "POST":
        raise expected("method", '"POST"', value.get("method"))
    if url not in (COMPLETIONS, CHAT):
        raise expected("url", f'"{COMPLETIONS}" or "{CHAT}"', url)
    if not isinstance(body, dict):
        raise expected("body", "an object", body)
    fields = Fields(body)
    own_seed = fields.whole("seed", -(1 << 63), (1 << 64) - 1)
    request = Request(
        line=line,
        custom_id=custom_id,
        prompt=None,
        messages=None,
        max_tokens=fields.whole("max_tokens", 1, _MOST_TOKENS),
        sampling=_sampling(fields, seed if own_seed is None else own_seed % (1 << 64)),
        # The same request with the same seed gives the same text, in whatever line of whatever file it stands.
        number=line if own_seed is None else 0,
        stops=_stops(fields.take("stop")),
        choices=fields.whole("n", 1, _MOST_CHOICES) or 1,
        logprobs=None,
        ignore_eos=fields.flag("ignore_eos"),
    )
    request = _chat(request, fields) if url == CHAT else _completion(request, fields)
    fields.refuse_others(_HARMLESS, _NEUTRAL, url)
    return request


def _completion(request: Request, fields: Fields) -> Request:
    return replace(request, prompt=_prompt(fields.take("prompt")), logprobs=fields.whole("logprobs", 0, _MOST_LOGPROBS))


def _chat(request: Request, fields: Fields) -> Request:
    newer = fields.whole("max_completion_tokens", 1, _MOST_TOKENS)
    if newer is not None and request.max_tokens not in (None, newer):
        raise expected("max_completion_tokens", f"max_tokens, {request.max_tokens}, or only one of them", newer)
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, _MOST_LOGPROBS)
    if top and not wanted:
        raise expected("top_logprobs", '"logprobs": true beside it', top)
    return replace(
        request,
        messages=_messages(fields.take("messages")),
        max_tokens=request.max_tokens or newer,
        logprobs=(top or 0) if wanted else None,
    )


def _sampling(fields: Fields, seed: int) -> SamplingParams:
    temperature, top_p = fields.number("temperature", 1.0), fields.number("top_p", 1.0)
    top_k = fields.whole("top_k", 0, _MOST_TOKENS) or 0
    min_p, penalty = fields.number("min_p", 0.0), fields.number("repetition_penalty", 1.0)
    try:
        return SamplingParams(temperature, top_k, top_p, min_p, penalty, seed)
    except ConfigError as error:
        option, _, rest = str(error).partition(" ")
        name = option.replace("-", "_")
        raise Refused("invalid_value", f"{name}: {rest}", name) from None


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise expected("stop", f"a text that is not empty, or up to {_MOST_STOPS} of them", value)
    return tuple(stops)


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            message = f"prompt: expected one prompt, found {len(value)}; give each a line of its own"
            raise Refused("unsupported_value", message, "prompt")
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return value
    raise expected("prompt", "a text or a list of token ids", value)


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise expected("messages", "a list of at least one message", value)
    return [_message(f"messages[{number}]", message) for number, message in enumerate(value)]


def _message(where: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise expected(where, "an object with role and content", value)
    if value.get("role") not in _ROLES:
        raise expected(f"{where}.role", f"one of {', '.join(_ROLES)}", value.get("role"))
    message = {"role": value["role"], "content": _content(f"{where}.content", value.get("content"))}
    for name in value.keys() - {"role", "content"}:
        if name == "name" and isinstance(value[name], str):
            message[name] = value[name]
        elif value[name] not in (None, []):
            raise Refused("unsupported_value", f"{where}.{cut(name)}: not supported; remove it", "messages")
    return message


def _content(where: str, value: Any) -> str:
    """The text of a message; parts are joined by line ends."""
    parts = value if isinstance(value, list) and value else [{"type": "text", "text": value}]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise expected(where, "a text, or a list of parts of type text", value)
    return "\n".join(part["text"] for part in parts)
