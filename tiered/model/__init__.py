"""transformers' graph, our weights: offloaded linears, the recorder, the engine."""

from tiered.model.attention import KernelAttention, registered_attention, use_attention
from tiered.model.bind import BoundModel
from tiered.model.engine import Engine, OnBlock, Pass
from tiered.model.forward import (
    ForwardBatch,
    ForwardWork,
    check_padding,
    check_token_ids,
    fits_one_pass,
    keep_positions,
    past_tokens,
    slice_mask,
)
from tiered.model.match import check_layers, check_match
from tiered.model.record import CACHE_NAMES, Recorder, cache_name
from tiered.model.seat import Seat, Seats
from tiered.model.segments import OnLogits, Segment, Segments
from tiered.model.shape import model_shape
from tiered.model.tables import load_tables
from tiered.model.waiting import WaitingRoom
from tiered.model.work import Work

__all__ = [
    "CACHE_NAMES",
    "BoundModel",
    "Engine",
    "ForwardBatch",
    "ForwardWork",
    "KernelAttention",
    "OnBlock",
    "OnLogits",
    "Pass",
    "Recorder",
    "Seat",
    "Seats",
    "Segment",
    "Segments",
    "WaitingRoom",
    "Work",
    "cache_name",
    "check_layers",
    "check_match",
    "check_padding",
    "check_token_ids",
    "fits_one_pass",
    "keep_positions",
    "load_tables",
    "model_shape",
    "past_tokens",
    "registered_attention",
    "slice_mask",
    "use_attention",
]
