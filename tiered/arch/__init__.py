"""What a model family looks like: its table entry, its graph on the meta device, its blocks."""

from tiered.arch.context import context_for, kv_sources, layer_configs, layer_windows, most_positions
from tiered.arch.families import FAMILIES, Family, family_for
from tiered.arch.order import order_of_use
from tiered.arch.skeleton import (
    BlockTensors,
    ParameterInfo,
    Skeleton,
    build_skeleton,
    is_expert_stack,
    is_plain_linear,
    load_config,
    text_config,
)
from tiered.arch.tokenizer import read_tokenizer

__all__ = [
    "FAMILIES",
    "BlockTensors",
    "Family",
    "ParameterInfo",
    "Skeleton",
    "build_skeleton",
    "context_for",
    "family_for",
    "is_expert_stack",
    "is_plain_linear",
    "kv_sources",
    "layer_configs",
    "layer_windows",
    "load_config",
    "most_positions",
    "order_of_use",
    "read_tokenizer",
    "text_config",
]
