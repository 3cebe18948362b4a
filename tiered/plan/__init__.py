"""Decisions as pure functions: what is resident, how large the ring is, whether a run fits."""

from tiered.plan.budget import (
    available_budget,
    cpu_count,
    memory_limits,
    pin_malloc,
    process_peak_rss_bytes,
    process_rss_bytes,
)
from tiered.plan.placement import Placement, interleave, place
from tiered.plan.plan import Needs, Plan, Tier, make_plan, parse_tiers
from tiered.plan.workspace import Shape, Workspace, workspace_for

__all__ = [
    "Needs",
    "Placement",
    "Plan",
    "Shape",
    "Tier",
    "Workspace",
    "available_budget",
    "cpu_count",
    "interleave",
    "make_plan",
    "memory_limits",
    "parse_tiers",
    "pin_malloc",
    "place",
    "process_peak_rss_bytes",
    "process_rss_bytes",
    "workspace_for",
]
