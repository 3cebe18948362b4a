"""Decisions as pure functions of numbers: batch size, KV cache, rows, what is resident, whether a run fits."""

from tiered.plan.budget import available_budget, cpu_count, memory_limits
from tiered.plan.cost import pass_seconds
from tiered.plan.inputs import (
    MAX_BATCHED_TOKENS,
    Budgets,
    ComputeRate,
    Computes,
    ExpertShape,
    KVTier,
    Machine,
    ModelShape,
    Objective,
    Tier,
    Workload,
    parse_tiers,
)
from tiered.plan.kv import AnyBits, Bits, CachePlan, KVShape, layer_groups, parse_bits
from tiered.plan.make import make_plan, wants_rates
from tiered.plan.on_device import WAITING_SLOTS, DeviceNeeds, DevicePlan, WaitingPlan
from tiered.plan.pace import pace_for
from tiered.plan.placement import Held, Placement, Tape, full_ring, interleave, place
from tiered.plan.plan import ExpertCachePlan, Needs, Plan, fit_units
from tiered.proc import process_peak_rss_bytes, process_rss_bytes

__all__ = [
    "MAX_BATCHED_TOKENS",
    "WAITING_SLOTS",
    "AnyBits",
    "Bits",
    "Budgets",
    "CachePlan",
    "ComputeRate",
    "Computes",
    "DeviceNeeds",
    "DevicePlan",
    "ExpertCachePlan",
    "ExpertShape",
    "Held",
    "KVShape",
    "KVTier",
    "Machine",
    "ModelShape",
    "Needs",
    "Objective",
    "Placement",
    "Plan",
    "Tape",
    "Tier",
    "WaitingPlan",
    "Workload",
    "available_budget",
    "cpu_count",
    "fit_units",
    "full_ring",
    "interleave",
    "layer_groups",
    "make_plan",
    "memory_limits",
    "pace_for",
    "parse_bits",
    "parse_tiers",
    "pass_seconds",
    "place",
    "process_peak_rss_bytes",
    "process_rss_bytes",
    "wants_rates",
]
