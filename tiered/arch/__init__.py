"""What a model family looks like: its table entry, its graph on the meta device, its blocks."""

from tiered.arch.config import is_text_half, load_config, text_config
from tiered.arch.context import (
    chunked_layers,
    context_for,
    kv_sources,
    layer_configs,
    layer_windows,
    most_positions,
)
from tiered.arch.families import FAMILIES, Family, Scan, family_for
from tiered.arch.mixers import is_mixer, state_shape
from tiered.arch.modules import ExpertStacks, StandIn, activation_of, expert_stacks, linear_size
from tiered.arch.order import Work, order_of_use, work_of_layers
from tiered.arch.skeleton import (
    BlockTensors,
    ParameterInfo,
    Skeleton,
    build_skeleton,
)
from tiered.arch.tokenizer import read_tokenizer

__all__ = [
    "FAMILIES",
    "BlockTensors",
    "ExpertStacks",
    "Family",
    "ParameterInfo",
    "Scan",
    "Skeleton",
    "StandIn",
    "Work",
    "activation_of",
    "build_skeleton",
    "chunked_layers",
    "context_for",
    "expert_stacks",
    "family_for",
    "is_mixer",
    "is_text_half",
    "kv_sources",
    "layer_configs",
    "layer_windows",
    "linear_size",
    "load_config",
    "most_positions",
    "order_of_use",
    "read_tokenizer",
    "state_shape",
    "text_config",
    "work_of_layers",
]
