"""Damage: a file's bytes or a parsed JSON value in, something near it out. Pure; all chance comes from the caller."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any, Final

Path = tuple[str | int, ...]

_DEEP: Final = 100_000
NASTY: Final[tuple[Any, ...]] = (
    *(None, True, False, [], {}, "", "x", "128", "é\u2028\U0001f600", "../../up", "/dev/zero", "\x00", "\ud800"),
    *(-1, 0, 1, 2, 3, 7, 1 << 31, 1 << 63, 10**30, 2_000_000_000, 2_048_000_000_000),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf")),
    *([None], [1, [2, [3]]], {"a": 5}, "y" * 5000, [7] * 1000),
)
"""Values that some field somewhere does not expect."""
FIELDS: Final = (
    *("num_hidden_layers", "max_position_embeddings", "hidden_size", "vocab_size", "num_attention_heads", "head_dim"),
    *("init_std", "initializer_range", "hidden_act", "activation_function", "pad_token_id", "eos_token_id"),
    *(
        "quantization_config",
        "rope_parameters",
        "rope_scaling",
        "layer_types",
        "sliding_window",
        "dtype",
        "torch_dtype",
    ),
    *("model_type", "architectures", "auto_map", "tie_word_embeddings", "text_config", "attn_implementation"),
    *("num_experts", "num_local_experts", "transformers_version", "id2label", "num_labels", "is_encoder_decoder"),
    *(
        "per_layer_config",
        "chat_template",
        "tokenizer_class",
        "added_tokens_decoder",
        "model_max_length",
        "stop_strings",
    ),
)
"""Names that a configuration may have whether or not this one has."""


def mutate_json(chance: random.Random, raw: bytes) -> bytes:
    """The JSON file `raw` with a few values, keys or bytes changed."""
    if chance.random() < 0.2:
        return mutate_text(chance, raw)
    value = json.loads(raw)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        value = _edit(chance, value)
    text = json.dumps(value)
    if chance.random() < 0.05 and text.startswith("{"):
        # A key twice: readers differ in which one counts.
        name = json.dumps(chance.choice(list(value) or ["a"]))
        text = f"{{{name}: {json.dumps(chance.choice(NASTY))}, {text[1:]}"
    return text.encode("utf-8", "surrogatepass")


def mutate_toml(chance: random.Random, raw: bytes) -> bytes:
    """The TOML file `raw` with one line changed, or damaged as text."""
    value = json.dumps(chance.choice(NASTY)).encode("utf-8", "replace")
    lines = raw.split(b"\n")
    at = chance.randrange(len(lines))
    lines[at] = chance.choice((lines[at].partition(b"=")[0] + b"= " + value, value, b"", b"[" * 5000))
    return chance.choice((b"\n".join(lines), mutate_text(chance, raw)))


def mutate_text(chance: random.Random, raw: bytes) -> bytes:
    """`raw`, a text of any grammar, with some bytes changed."""
    at, to = sorted(chance.randrange(len(raw) + 1) for _ in range(2))
    others: tuple[bytes, ...] = (
        *(
            b"",
            b"null",
            b"5",
            b"[]",
            b"{}",
            b'"x"',
            b"\xef\xbb\xbf" + raw,
            raw.decode("utf-8", "replace").encode("utf-16"),
        ),
        *(b"[" * _DEEP, b'{"a":' * _DEEP, b"9" * 10_000, bytes(4096), raw + b"}", raw * 2),
        *(raw[:at], raw[:at] + raw[to:], raw[:at] + b"\xff\xfe" + raw[at:], raw[:at] + chance.randbytes(9) + raw[at:]),
    )
    return chance.choice(others)


def mutate_bytes(chance: random.Random, raw: bytes) -> bytes:
    """A binary file cut, grown, zeroed in places, or with bits flipped; its beginning more often than its middle."""
    at = chance.choice((chance.randrange(min(len(raw), 64)), chance.randrange(len(raw))))
    how = chance.randrange(6)
    if how == 0:
        return raw[:at]
    if how == 1:
        return raw + chance.randbytes(chance.choice((1, 4096)))
    if how == 2:
        return raw[:at] + bytes(min(4096, len(raw) - at)) + raw[at + 4096 :]
    if how == 3:
        return chance.choice((bytes(8), b"\xff" * 8, (100 << 20).to_bytes(8, "little"))) + raw[8:]
    damaged = bytearray(raw)
    for _ in range(chance.choice((1, 1, 30))):
        damaged[min(len(raw) - 1, at + chance.randrange(200))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def mutate_safetensors(chance: random.Random, raw: bytes) -> bytes:
    """A safetensors file with its JSON header changed, or damaged by `mutate_bytes`."""
    length = int.from_bytes(raw[:8], "little")
    if chance.random() < 0.3:
        return mutate_bytes(chance, raw)
    header = json.loads(raw[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    if "tiered" in metadata and chance.random() < 0.5:
        metadata["tiered"] = mutate_json(chance, metadata["tiered"].encode()).decode("utf-8", "replace")
        text = json.dumps(header).encode()
    else:
        text = mutate_json(chance, json.dumps(header).encode())
    # Padded to its former length where it fits, so that the file's size alone does not reveal the damage.
    text = text.ljust(length)
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def _edit(chance: random.Random, value: Any) -> Any:
    """`value` with one place changed."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places or chance.random() < 0.02:
        return chance.choice(NASTY)
    # Each depth is equally likely: shallow places count as much as the many deep ones.
    depth = chance.choice(sorted({len(place) for place in places}))
    place = chance.choice([p for p in places if len(p) == depth])
    holder = value
    for step in place[:-1]:
        holder = holder[step]
    key = place[-1]
    how = chance.randrange(8)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[chance.choice(FIELDS)] = chance.choice(NASTY)
    elif how == 2 and isinstance(holder, dict):
        holder[str(key) + "x"] = holder.pop(key)
    elif how == 3:
        holder[key] = _other_type(chance, holder[key])
    elif how == 4:
        other = value
        for step in chance.choice(places):
            other = other[step]
        holder[key] = copy.deepcopy(other)
    elif how == 5 and isinstance(holder[key], int):
        holder[key] = chance.choice(
            (holder[key] - 1, holder[key] + 1, holder[key] * 2, -holder[key], holder[key] << 20)
        )
    else:
        holder[key] = chance.choice(NASTY)
    return value


def _other_type(chance: random.Random, value: Any) -> Any:
    options: list[Any] = [str(value), [value], {"value": value}, None]
    if isinstance(value, int | float):
        options += [float(value), -value, bool(value)]
    if isinstance(value, list):
        options += [value * 2, value[:-1], dict.fromkeys(map(str, value), 1)]
    return chance.choice(options)


def _places(value: Any, here: Path = ()) -> Iterator[Path]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*here, key)
        yield from _places(inner, (*here, key))
