"""What one token adds to the KV cache, as a family's attention stores it."""

import torch
from transformers import PretrainedConfig

from tiered.plan.kv import KVShape


def kv_shape(config: PretrainedConfig, dtype: torch.dtype) -> KVShape:
    """The cache's shape as the family's attention stores it."""
    query_heads = int(getattr(config, "num_attention_heads", 1))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    heads = getattr(config, "num_key_value_heads", None) or query_heads
    if config.model_type == "falcon":
        # Its grouped variant broadcasts keys to every query head before they are cached; multi-query keeps one.
        heads = 1 if config.multi_query and not config.new_decoder_architecture else query_heads
    return KVShape(int(heads), int(head_dim), int(config.num_hidden_layers), str(dtype).removeprefix("torch."))
