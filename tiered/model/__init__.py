"""transformers' graph, our weights: offloaded linears, the recorder, the engine."""

from tiered.model.attention import registered_attention, use_attention
from tiered.model.bind import BoundModel, OffloadedLinear
from tiered.model.engine import Engine, MicroBatch, OnBlock, Pass, check_token_ids, keep_positions, slice_mask
from tiered.model.match import check_match
from tiered.model.needs import Footprint, Load, activation_shape
from tiered.model.record import Recorder

__all__ = [
    "BoundModel",
    "Engine",
    "Footprint",
    "Load",
    "MicroBatch",
    "OffloadedLinear",
    "OnBlock",
    "Pass",
    "Recorder",
    "activation_shape",
    "check_match",
    "check_token_ids",
    "keep_positions",
    "registered_attention",
    "slice_mask",
    "use_attention",
]
