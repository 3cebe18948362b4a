"""What a configuration says of context: how many tokens a model is made for, and which layers look back less.

The cache keeps no more tokens than a layer looks back. What attention really asks for is compared with this at run
time (`model/attention.py`), so a family whose configuration means something else is detected, not computed wrongly.
"""

from typing import Final

from transformers import PretrainedConfig

from tiered.arch.families import FAMILIES
from tiered.errors import ConfigError
from tiered.plan.shapes import positions_of

_DEFAULT_CONTEXT: Final = 2048
"""max_context where none is asked for; a model that is made for fewer tokens gets those."""
_SLIDING: Final = ("sliding_attention", "local_attention")
_CHUNKED: Final = "chunked_attention"


def most_positions(config: PretrainedConfig) -> int | None:
    """Tokens of a sequence that the model is made for; None where its configuration names no limit."""
    return positions_of(config.to_dict())


def context_for(config: PretrainedConfig, asked: int | None, option: str, default: int = _DEFAULT_CONTEXT) -> int:
    """Tokens that a sequence may have: those `asked` for by `option`, else `default`, or fewer if the model says so.

    Raises ConfigError where more are asked for than the model is made for.
    """
    most = most_positions(config)
    if asked is None:
        return default if most is None else min(default, most)
    if most is not None and asked > most:
        raise ConfigError(f"{option} {asked}: this model has positions for {most}; ask for at most that many")
    return asked


def layer_configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The configuration of each decoder layer, where they differ in sizes; else the model's alone."""
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]


def kv_sources(config: PretrainedConfig) -> tuple[int, ...]:
    """For each decoder layer, the layer whose keys and values its queries read: itself, or an earlier one."""
    modes = getattr(config, "kv_sharing_modes", None) or [None] * int(config.num_hidden_layers)
    stored = {config.layer_types[layer]: layer for layer, mode in enumerate(modes) if mode == "store"}
    return tuple(stored[config.layer_types[n]] if mode == "reuse" else n for n, mode in enumerate(modes))


def layer_windows(config: PretrainedConfig) -> tuple[int, ...]:
    """For each decoder layer, how many tokens a query sees, its own included; 0: all up to its own. Of
    `chunked_layers`, the length of their chunks."""
    count = int(config.num_hidden_layers)
    chunked = chunked_layers(config)
    if chunked:
        return tuple(int(config.attention_chunk_size) if layer in chunked else 0 for layer in range(count))
    window = getattr(config, "sliding_window", None)
    family = FAMILIES.get(config.model_type)
    if not window or (family is not None and family.gathers) or getattr(config, "use_sliding_window", True) is False:
        return (0,) * count
    types = getattr(config, "layer_types", None) or [_SLIDING[0]] * count
    return tuple(int(window) if kind in _SLIDING else 0 for kind in types)


def chunked_layers(config: PretrainedConfig) -> frozenset[int]:
    """The decoder layers whose queries see what is before them in their own chunk of positions, and nothing else."""
    types = getattr(config, "layer_types", None) or ()
    return frozenset(layer for layer, kind in enumerate(types) if kind == _CHUNKED and config.attention_chunk_size)
