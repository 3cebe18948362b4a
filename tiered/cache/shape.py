"""What one token adds to the KV cache, as a family's attention stores it."""

from typing import Final

import torch
from transformers import PretrainedConfig

from tiered.arch import kv_sources, layer_configs
from tiered.plan.kv import KVShape

_KEYLESS: Final = ("linear_attention", "conv", "mamba", "moe", "mlp")
"""What `layer_types` calls layers whose tokens leave no keys."""


def kv_shapes(config: PretrainedConfig, dtype: torch.dtype) -> tuple[KVShape | None, ...]:
    """For each decoder layer, what one token adds to it; None for a layer that keeps no keys and values of its own."""
    types = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    if all(kind in _KEYLESS for kind in types):
        return (None,) * len(types)
    shapes = [_kv_shape(each, dtype) for each in layer_configs(config)]
    shapes = shapes if len(shapes) == len(types) else shapes * len(types)
    keeps = [source == layer for layer, source in enumerate(kv_sources(config))]
    return tuple(
        shape if keeps[layer] and kind not in _KEYLESS else None
        for layer, (shape, kind) in enumerate(zip(shapes, types, strict=True))
    )


def _kv_shape(config: PretrainedConfig, dtype: torch.dtype) -> KVShape:
    """What one token adds to a layer, as the family's attention stores it."""
    query_heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    heads = getattr(config, "num_key_value_heads", None) or query_heads
    if getattr(config, "kv_lora_rank", None):
        # Latents, of which attention makes every head's keys and values, and the channels that know positions.
        return KVShape(1, config.kv_lora_rank + config.qk_rope_head_dim, 0, str(dtype).removeprefix("torch."))
    if config.model_type == "falcon":
        # Its grouped variant broadcasts keys to every query head before they are cached; multi-query keeps one.
        heads = 1 if config.multi_query and not config.new_decoder_architecture else query_heads
    return KVShape(int(heads), int(head_dim), int(head_dim), str(dtype).removeprefix("torch."))
