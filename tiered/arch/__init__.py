"""What a model family looks like: its table entry, its graph on the meta device, its blocks."""

from tiered.arch.families import FAMILIES, Family, family_for
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
from tiered.arch.windows import layer_windows

__all__ = [
    "FAMILIES",
    "BlockTensors",
    "Family",
    "ParameterInfo",
    "Skeleton",
    "build_skeleton",
    "family_for",
    "is_expert_stack",
    "is_plain_linear",
    "layer_windows",
    "load_config",
    "text_config",
]
