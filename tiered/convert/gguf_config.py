"""The configuration of the model in a GGUF file, from its metadata and from which tensors it has.

In: metadata under llama.cpp's names. Out: config.json's fields as transformers has them. transformers' own conversion
leaves out what changes the model (scaled rotary frequencies, widths of heads and experts, soft caps), so this one takes
every entry of the architecture's or refuses the file by the entry's name.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tiered.convert.gguf_file import Metadata, Omitted
from tiered.errors import CheckpointError

Fields = dict[str, Any]
Read = Callable[[str], Sequence[float]]
"""The values of a small tensor, by its name in the file."""

_REMEDY: Final = "convert the original Hugging Face checkpoint"
_HARMLESS: Final = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"}
"""Entries that say nothing of how the model computes: the embedding has as many rows as there are tokens."""
_ROPE_FREQS: Final = "rope_freqs.weight"
_LONG: Final = "rope_factors_long.weight"
_SHORT: Final = "rope_factors_short.weight"
ROPE_TENSORS: Final = (_ROPE_FREQS, _LONG, _SHORT)
"""Tensors that belong to the configuration."""
_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every published model has whose frequencies are scaled as Llama 3.1's; the factor differs."""
_LARGEST_GEMMA: Final = {"gemma2": 46, "gemma3": 62}
"""Layers of the models whose queries are scaled by another width than a head's; no file says so, llama.cpp knows it."""


class Entries:
    """The metadata entries of one architecture; it knows which have been taken."""

    def __init__(self, path: Path, metadata: Metadata, tensors: Collection[str], read: Read) -> None:
        """`tensors`: the names of all tensors of the model, of which `read` reads small ones."""
        self.path, self.tensors, self.read = path, tensors, read
        self.architecture = str(metadata.get("general.architecture"))
        self._metadata = metadata
        self._prefix = f"{self.architecture}."
        self._taken: set[str] = set()

    def has(self, name: str) -> bool:
        return self._prefix + name in self._metadata

    def take(self, name: str, default: Any = None) -> Any:
        """The entry `name`, for all layers where it is one for each; raises CheckpointError where layers differ, and
        where it is missing and there is no `default`."""
        self._taken.add(name)
        value = self._metadata.get(self._prefix + name, default)
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, tuple | Omitted) or value is None:
            found = "differs between layers" if value else "is missing"
            raise CheckpointError(f"{self.path}: metadata {self._prefix}{name} {found}; {_REMEDY}")
        return value

    def layers(self, name: str) -> tuple[Any, ...]:
        """The entry `name`, a value for each layer; () where there is none."""
        self._taken.add(name)
        value = self._metadata.get(self._prefix + name, ())
        if not isinstance(value, tuple):
            raise self.wrong(name, value, "a value for each layer")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """The entry `name`, a whole number above 0."""
        value = self.take(name, default)
        if type(value) is not int or value <= 0:
            raise self.wrong(name, value, "a whole number above 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """The entry `name`, a finite number; of what float32 holds as many digits as tell it from others."""
        value = self.take(name, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.wrong(name, value, "a finite number")
        return float(f"{value:.7g}")

    def token(self, name: str) -> int | None:
        """The id of the special token `name`, if there is one."""
        value = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int else None

    def check_all_taken(self) -> None:
        """Raise CheckpointError where an entry of the architecture has not been taken."""
        names = (key.removeprefix(self._prefix) for key in self._metadata if key.startswith(self._prefix))
        left = sorted(set(names) - self._taken - _HARMLESS)
        if left:
            raise CheckpointError(
                f"{self.path}: metadata {self._prefix}{left[0]} is not known here, and it may change what the model "
                f"computes; {_REMEDY}"
            )

    def wrong(self, name: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: metadata {self._prefix}{name} is {value!r}, expected {expected}")


def model_config(entries: Entries, model_type: str, vocab_size: int, dtype: str) -> Fields:
    """config.json of a model of `model_type` with `vocab_size` tokens, whose weights were of `dtype`.

    Raises CheckpointError where entries are missing or wrong, or one is there that is not known.
    """
    heads, hidden = entries.count("attention.head_count"), entries.count("embedding_length")
    head_dim = entries.count("attention.key_length", max(1, hidden // heads))
    if entries.count("attention.value_length", head_dim) != head_dim:
        raise entries.wrong("attention.value_length", entries.take("attention.value_length"), f"{head_dim}, as of keys")
    fields = {
        "model_type": model_type,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": entries.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": entries.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": entries.count("context_length"),
        "rms_norm_eps": entries.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(entries, head_dim),
        "tie_word_embeddings": "output.weight" not in entries.tensors,
        **{f"{name}_token_id": entries.token(name) for name in ("bos", "eos")},
        "pad_token_id": entries.token("padding"),
    }
    if entries.take("attention.causal", True) is not True:
        raise entries.wrong("attention.causal", False, "true")
    fields |= _OF_TYPE[model_type](entries, fields)
    if "intermediate_size" not in fields:
        fields["intermediate_size"] = entries.count("feed_forward_length")
    entries.check_all_taken()
    return fields


def generation_config(entries: Entries) -> Fields:
    """generation_config.json: special tokens, all of those that end a text."""
    ends = dict.fromkeys(token for name in ("eos", "eot", "eom") if (token := entries.token(name)) is not None)
    tokens: Fields = {"bos_token_id": entries.token("bos"), "pad_token_id": entries.token("padding")}
    tokens["eos_token_id"] = list(ends) if len(ends) > 1 else next(iter(ends), None)
    return {name: token for name, token in tokens.items() if token is not None}


def _rope(entries: Entries, head_dim: int) -> Fields:
    """rope_parameters: how fast positions turn, and what that is scaled by."""
    theta = entries.number("rope.freq_base", 10000.0)
    rotated = entries.count("rope.dimension_count", head_dim)
    if theta <= 0:
        raise entries.wrong("rope.freq_base", theta, "a number above 0")
    fields: Fields = {"rope_type": "default", "rope_theta": theta}
    if rotated != head_dim:
        if entries.architecture != "phi3":
            raise entries.wrong("rope.dimension_count", rotated, f"{head_dim}, the width of a head")
        fields["partial_rotary_factor"] = rotated / head_dim
    if _ROPE_FREQS in entries.tensors:
        return fields | _llama3(entries, theta, rotated)
    if _LONG in entries.tensors or _SHORT in entries.tensors:
        return fields | _longrope(entries)
    kind = entries.take("rope.scaling.type", "linear")  # older files have the factor alone
    factor = entries.number("rope.scaling.factor", entries.number("rope.scale_linear", 1.0))
    trained = entries.count("rope.scaling.original_context_length", entries.count("context_length"))
    if kind == "none" or (factor == 1.0 and kind == "linear"):
        return fields
    if kind == "linear":
        return fields | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return fields | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}
    raise entries.wrong("rope.scaling.type", kind, "none, linear or yarn")


def _llama3(entries: Entries, theta: float, rotated: int) -> Fields:
    """Frequencies scaled as Llama 3.1's, which a file has as one divisor for each; {} where all are 1."""
    found = entries.read(_ROPE_FREQS)
    factor = max(1.0, round(max(found, default=1.0), 6))
    expected = list(_llama3_divisors(theta, rotated, factor))
    same = len(found) == len(expected) and all(
        math.isclose(one, other, rel_tol=1e-4) for one, other in zip(found, expected, strict=True)
    )
    if not same:
        raise CheckpointError(
            f"{entries.path}: {_ROPE_FREQS} scales rotary frequencies in another way than Llama 3.1 does; {_REMEDY}"
        )
    return {} if factor == 1.0 else {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _llama3_divisors(theta: float, rotated: int, factor: float) -> Iterator[float]:
    low, high, trained = _LLAMA3.values()
    for index in range(0, rotated, 2):
        turns = trained / (2 * math.pi * theta ** (index / rotated))  # within the context that it was trained with
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        yield 1 / ((1 - smooth) / factor + smooth)


def _longrope(entries: Entries) -> Fields:
    """Frequencies scaled by one list for short texts and another for long ones, as Phi 3's."""
    if not {_SHORT, _LONG} <= set(entries.tensors):
        raise CheckpointError(f"{entries.path}: has one of {_SHORT} and {_LONG}, expected both; {_REMEDY}")
    if (kind := entries.take("rope.scaling.type", "longrope")) != "longrope":
        raise entries.wrong("rope.scaling.type", kind, f"longrope, as there is {_LONG}")
    trained = entries.count("rope.scaling.original_context_length")
    fields: Fields = {
        "rope_type": "longrope",
        "factor": entries.count("context_length") / trained,
        "original_max_position_embeddings": trained,
        "short_factor": list(entries.read(_SHORT)),
        "long_factor": list(entries.read(_LONG)),
    }
    if entries.has("rope.scaling.attn_factor"):
        fields["attention_factor"] = entries.number("rope.scaling.attn_factor")
    return fields


def _llama(entries: Entries, _: Fields) -> Fields:
    biased = {name.rpartition(".")[0] for name in entries.tensors if name.endswith(".bias")}
    parts = {name.rpartition(".")[2] for name in biased}
    return {"attention_bias": "attn_q" in parts, "mlp_bias": "ffn_up" in parts}


def _mixtral(entries: Entries, _: Fields) -> Fields:
    experts = entries.count("expert_count")
    return {"num_local_experts": experts, "num_experts_per_tok": entries.count("expert_used_count")}


def _qwen3(entries: Entries, _: Fields) -> Fields:
    return {"attention_bias": any(name.endswith("attn_q.bias") for name in entries.tensors)}


def _qwen2_moe(entries: Entries, _: Fields) -> Fields:
    # Of each file the width that its architecture has; qwen3moe's has no shared expert.
    shared = entries.take("expert_shared_feed_forward_length", entries.take("feed_forward_length", 1))
    return {**_mixture(entries, norm=False), "shared_expert_intermediate_size": shared}


def _qwen3_moe(entries: Entries, fields: Fields) -> Fields:
    return {**_qwen3(entries, fields), **_mixture(entries, norm=True)}


def _mixture(entries: Entries, *, norm: bool) -> Fields:
    """What mixtures have. llama.cpp's graph of each says whether weights of the chosen experts are made to add up to 1
    (`norm`); newer files say it too."""
    if (gating := entries.take("expert_gating_func", 1)) != 1:
        raise entries.wrong("expert_gating_func", gating, "1 (softmax)")
    if (scale := entries.number("expert_weights_scale", 1.0)) not in (0.0, 1.0):
        raise entries.wrong("expert_weights_scale", scale, "1")
    width = entries.count("expert_feed_forward_length")
    return {
        "num_experts": entries.count("expert_count"),
        "num_experts_per_tok": entries.count("expert_used_count"),
        "moe_intermediate_size": width,
        # Of layers without experts; there are none.
        "intermediate_size": entries.count("feed_forward_length", width) or width,
        "norm_topk_prob": bool(entries.take("expert_weights_norm", norm)),
    }


def _gemma2(entries: Entries, fields: Fields) -> Fields:
    return {
        "attn_logit_softcapping": entries.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": entries.number("final_logit_softcapping", 30.0),
        **_sliding_gemma(entries, fields, 2),
    }


def _gemma3(entries: Entries, fields: Fields) -> Fields:
    local = {"rope_type": "default", "rope_theta": entries.number("rope.freq_base_swa", 10000.0)}
    rope = {"full_attention": fields["rope_parameters"], "sliding_attention": local}
    cap = entries.number("final_logit_softcapping", 0.0)
    return {"rope_parameters": rope, "final_logit_softcapping": cap or None, **_sliding_gemma(entries, fields, 6)}


def _sliding_gemma(entries: Entries, fields: Fields, every: int) -> Fields:
    """Layers that see a window: as the file says of each, else all but one of `every`; and what scales queries."""
    layers = fields["num_hidden_layers"]
    is_largest = layers == _LARGEST_GEMMA[entries.architecture]
    slides = entries.layers("attention.sliding_window_pattern") or [(layer + 1) % every for layer in range(layers)]
    return {
        "sliding_window": entries.count("attention.sliding_window", 4096),
        "layer_types": ["sliding_attention" if layer else "full_attention" for layer in slides],
        "query_pre_attn_scalar": fields["hidden_size"] // fields["num_attention_heads"]
        if is_largest
        else fields["head_dim"],
    }


def _phi3(entries: Entries, fields: Fields) -> Fields:
    rope = fields["rope_parameters"]
    trained = rope.get("original_max_position_embeddings")
    entries.take("rope.scaling.original_context_length", 0)  # without lists of factors it changes nothing
    entries.take("rope.scaling.attn_factor", 1.0)
    found = {"sliding_window": entries.take("attention.sliding_window", 0) or None}
    return found if trained is None else {**found, "original_max_position_embeddings": trained}


_OF_TYPE: Final[Mapping[str, Callable[[Entries, Fields], Fields]]] = {
    "llama": _llama,
    "mixtral": _mixtral,
    "qwen2": lambda _, __: {},
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma": lambda _, __: {},
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
}
"""What a model type has besides what all have."""
