"""KV cache layers that live in one preallocated stretch of memory and never move.

transformers' own DynamicLayer concatenates: every token copies the layer's whole cache into a new allocation. Here
`update` writes behind what is there, and what it returns are views.

Layers with a sliding window keep all their keys; the mask, which is computed from positions, hides what has slid
out. So a rollback or a longer chunk never finds a key missing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from tiered.errors import BudgetError, ConfigError


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


class KVLayer(CacheLayerMixin):
    """One layer: keys and values [sequences, heads, capacity, head_dim], of which the first `length` are filled."""

    is_sliding = False
    is_croppable = True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._keys, self._values = keys, values
        self._length = 0
        self._sequences = keys.shape[0]
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: memory is given at construction."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [sequences, heads, new, head_dim]; returns views of everything so far."""
        stop = self._length + key_states.shape[-2]
        expected = (self._sequences, *self._keys.shape[1:2], self._keys.shape[3])
        found = (key_states.shape[0], key_states.shape[1], key_states.shape[3])
        if found != expected:
            raise ConfigError(f"KV cache: keys of (sequences, heads, head_dim) {found}, expected {expected}")
        if stop > self._keys.shape[2]:
            raise BudgetError(f"KV cache: {stop} tokens, room was planned for {self._keys.shape[2]}")
        self._keys[: self._sequences, :, self._length : stop] = key_states
        self._values[: self._sequences, :, self._length : stop] = value_states
        self._length = stop
        return self._view(self._keys), self._view(self._values)

    def _view(self, states: torch.Tensor) -> torch.Tensor:
        return states[: self._sequences, :, : self._length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens; positive values raise, as in transformers 5."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, found {tokens_to_remove}")
        self._length = max(0, self._length + tokens_to_remove)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences of `indices`, ascending, at the front of the same memory."""
        for states in (self._keys, self._values):
            for target, source in enumerate(indices.tolist()):
                if target != source:
                    states[target, :, : self._length] = states[source, :, : self._length]
        self._sequences = len(indices)

    def reset(self) -> None:
        self._length = 0


class KVCache(Cache):
    """A cache for `sequences` sequences of at most `capacity` tokens, in `memory` (uint8)."""

    def __init__(self, shape: KVShape, sequences: int, capacity: int, memory: torch.Tensor) -> None:
        per_layer = (2, sequences, shape.heads, capacity, shape.head_dim)
        nbytes = shape.nbytes(sequences, capacity)
        states = memory[:nbytes].view(shape.dtype).view(shape.layers, *per_layer)
        super().__init__(layers=[KVLayer(states[i, 0], states[i, 1]) for i in range(shape.layers)])


class _PositionLayer(CacheLayerMixin):
    """A layer that only knows how many tokens came before."""

    is_sliding = False

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._length = length
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("a position cache holds no states")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("a position cache holds no states")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1


class PositionCache(Cache):
    """Stands for a cache of `length` tokens while masks and positions of a chunk are computed.

    All chunks of a prompt are recorded before any layer has run, when the real cache is still empty.
    """

    def __init__(self, length: int, layers: int) -> None:
        super().__init__(layers=[_PositionLayer(length) for _ in range(layers)])
