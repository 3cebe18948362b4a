"""A model's configuration, as its config.json or a shape has it.

In: a folder, or keyword arguments. Out: transformers' configuration of a model that reads and writes text, of a family
in the table, with values that are counted and compared before anything is built of them. A checkpoint of a model that
also sees or hears has a configuration within its configuration: that one counts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from transformers import AutoConfig, PretrainedConfig

from tiered.arch.context import layer_configs
from tiered.arch.families import TEXT_HALVES, family_for
from tiered.errors import CheckpointError, ConfigError, UnsupportedFamilyError, shortened
from tiered.files import errors_of, read_json

_MOST_LAYERS: Final = 500
_MOST: Final = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer"), _MOST_LAYERS),
    "num_labels": 10_000,
}
"""Largest value of fields that count parts: transformers makes an object for each, which takes seconds for so many."""
_LEAST: Final = {
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"), 1),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 1),
    **dict.fromkeys(("max_position_embeddings", "num_key_value_heads", "head_dim", "sliding_window"), 0),
    "attention_chunk_size": 0,
}
"""Least value of each size that tiered itself reads. Sizes that may be 0 may be None: others are then used instead."""
REMEDY: Final = "put the model's own config.json there"
"""What to do about a config.json that describes no model."""
_OF_WHOLE: Final = ("dtype", "bos_token_id", "eos_token_id", "pad_token_id")
"""Fields that a configuration of a model that sees or hears may have beside that of its text half, for both."""
_OF_WEIGHTS: Final = ("quantization_config", "compression_config", "transformers_weights")
"""Fields that say how the weights are stored, of both halves."""

_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN: Final = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
"""What families call the experts of a layer, and those of them that compute for a token."""


def load_config(folder: Path) -> PretrainedConfig:
    """The configuration in `folder`/config.json, without running code from the folder.

    Of a model that also sees or hears it is that of the half that reads; its `name_or_path` is the folder's all the
    same. Raises CheckpointError where the file is missing or is no configuration, UnsupportedFamilyError where the
    model is of a family that is not in the table.
    """
    path = folder / "config.json"
    try:
        raw = read_json(path, CheckpointError, REMEDY)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no config.json; expected a Hugging Face model folder (config.json, tokenizer files, weights)"
        ) from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise CheckpointError(f"{path}: has no 'model_type'; expected a Hugging Face model configuration")
    is_half = raw["model_type"] in TEXT_HALVES
    if not is_half:
        family_for(raw["model_type"])
    try:
        for fields in (raw, *(each for each in raw.values() if isinstance(each, dict))):
            _check_counts(fields)
        with errors_of(path):
            config: PretrainedConfig = AutoConfig.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        if is_half:
            config = _text_half(config, raw)
        _check_read_here(config)
    except (MemoryError, UnsupportedFamilyError):
        raise  # an error of the machine, not of the file; or one that says all there is to say
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk, not of the file
        # Each family has code of its own that checks and converts fields and computes with them; it may raise anything.
        raise CheckpointError(f"{path}: transformers cannot read it: {shortened(error)}; {REMEDY}") from error
    return config


def is_text_half(folder: Path) -> bool:
    """Whether what `load_config` reads in `folder` is the configuration of the text half of a larger model."""
    path = folder / "config.json"
    raw = read_json(path, CheckpointError, REMEDY) if path.exists() else None
    return isinstance(raw, dict) and raw.get("model_type") in TEXT_HALVES


def _text_half(whole: PretrainedConfig, raw: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of the half that reads of the model of `whole`, whose config.json is `raw`."""
    text: PretrainedConfig = whole.get_text_config(decoder=True)
    given = raw.get("text_config") or {}
    for name in (*_OF_WHOLE, *_OF_WEIGHTS):
        value = getattr(whole, name, None)
        if value is not None and given.get(name) is None:
            setattr(text, name, value)
    text.name_or_path = whole.name_or_path
    family_for(text.model_type)
    tested = TEXT_HALVES[raw["model_type"]]
    if text.model_type not in tested:
        raise UnsupportedFamilyError(
            f"{raw['model_type']!r} with a text half of family {text.model_type!r}: not known to compute with text "
            f"what that family alone does; its text halves may be {', '.join(tested)}"
        )
    return text


def text_config(values: dict[str, Any]) -> PretrainedConfig:
    """A configuration from keyword arguments, as `configs/models/*.toml` hold them: model_type and its fields."""
    fields = dict(values)
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ConfigError("model shape: [config] has no model_type")
    family_for(model_type)
    _check_counts(fields)
    config: PretrainedConfig = AutoConfig.for_model(model_type, **fields)
    _check_read_here(config)
    return config


def _check_counts(values: Mapping[str, Any]) -> None:
    """Raises ValueError where a configuration asks for so many parts that even reading it would never end."""
    counts = [(name, values[name], most) for name, most in _MOST.items() if isinstance(values.get(name), int)]
    # GPT-Neo's: [[["global", "local"], 12]] are 24 layers.
    pairs = values.get("attention_types")
    for pair in pairs if isinstance(pairs, list) else ():
        if isinstance(pair, list) and isinstance(pair[-1], int):
            counts.append(("attention_types", pair[-1], _MOST_LAYERS))
    for name, count, most in counts:
        if count > most:
            raise ValueError(f"{name} is {count}, expected at most {most:,}")


def _check_read_here(config: PretrainedConfig) -> None:
    """Raises ValueError for bad values that tiered itself computes with: some families accept anything there."""
    for name, least in _LEAST.items():
        for value in (getattr(each, name, least) for each in layer_configs(config)):
            if value is None and not least:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}, expected a whole number" + " above 0" * least)
    types = getattr(config, "layer_types", None)
    if types is not None and (not isinstance(types, list | tuple) or len(types) != config.num_hidden_layers):
        raise ValueError(f"layer_types is {types!r}, expected a name for each of {config.num_hidden_layers} layers")
    count, chosen = (
        next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
        for names in (_EXPERTS, _CHOSEN)
    )
    if count and chosen and chosen > count:
        raise ValueError(f"{chosen} experts compute for a token, expected at most the {count} that a layer has")
    if "chunked_attention" in (types or ()) and not getattr(config, "attention_chunk_size", None):
        raise ValueError("layer_types has chunked_attention, expected an attention_chunk_size above 0")
