"""What one token adds to the KV cache, as a family's attention stores it."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig


@dataclass(frozen=True)
class KVShape:
    """Keys and values one token adds to one layer."""

    heads: int
    head_dim: int
    layers: int
    dtype: torch.dtype

    def nbytes(self, sequences: int, tokens: int) -> int:
        """Bytes of the whole cache for `sequences` sequences of `tokens` tokens."""
        return 2 * self.layers * self.heads * self.head_dim * self.dtype.itemsize * sequences * tokens


def kv_shape(config: PretrainedConfig, dtype: torch.dtype) -> KVShape:
    """The cache's shape as the family's attention stores it."""
    query_heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    heads = getattr(config, "num_key_value_heads", None) or query_heads
    if config.model_type == "falcon":
        # Its grouped variant broadcasts keys to every query head before they are cached; multi-query keeps one.
        heads = 1 if config.multi_query and not config.new_decoder_architecture else query_heads
    return KVShape(int(heads), int(head_dim), int(config.num_hidden_layers), dtype)
