"""The KV cache of a run: preallocated layers in the arena, behind transformers' cache interface."""

from tiered.cache.kv import KVCache, KVShape, PositionCache, kv_shape

__all__ = ["KVCache", "KVShape", "PositionCache", "kv_shape"]
