"""The KV cache of a run: pages of 64 tokens, in memory or on disk, behind transformers' cache interface."""

from tiered.cache.chunk import ChunkKV, GatheredKV, PackedKV, PagedKeys, PagedRead, PositionCache
from tiered.cache.layout import PageLayout
from tiered.cache.pool import KVPool, SequenceKV
from tiered.cache.records import Extent, LentRecords, Part
from tiered.cache.shape import kv_shape
from tiered.plan.kv import Bits, CachePlan, KVShape, LayerGroup, layer_groups

__all__ = [
    "Bits",
    "CachePlan",
    "ChunkKV",
    "Extent",
    "GatheredKV",
    "KVPool",
    "KVShape",
    "LayerGroup",
    "LentRecords",
    "PackedKV",
    "PageLayout",
    "PagedKeys",
    "PagedRead",
    "Part",
    "PositionCache",
    "SequenceKV",
    "kv_shape",
    "layer_groups",
]
