"""The KV cache of a run: pages of 64 tokens, in memory or on disk, behind transformers' cache interface."""

from tiered.cache.blocks import Extent, LentBlocks, Part
from tiered.cache.gathered import GatheredKV
from tiered.cache.layout import PageLayout
from tiered.cache.micro_batch import MicroBatchKV, PackedKV, PagedKeys, PagedRead, PositionCache
from tiered.cache.outbox import Outbox
from tiered.cache.pool import KVPool, SequenceKV
from tiered.cache.shape import kv_shapes
from tiered.cache.state import AwayStates, BundleStates, Snapshot, StatePool
from tiered.plan.kv import Bits, CachePlan, KVShape, layer_groups

__all__ = [
    "AwayStates",
    "Bits",
    "BundleStates",
    "CachePlan",
    "Extent",
    "GatheredKV",
    "KVPool",
    "KVShape",
    "LentBlocks",
    "MicroBatchKV",
    "Outbox",
    "PackedKV",
    "PageLayout",
    "PagedKeys",
    "PagedRead",
    "Part",
    "PositionCache",
    "SequenceKV",
    "Snapshot",
    "StatePool",
    "kv_shapes",
    "layer_groups",
]
