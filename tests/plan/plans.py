"""Small models and plans: what the tests of plans, reports and the loop share."""

from collections.abc import Sequence
from typing import Any

from tiered.plan import CachePlan, KVShape, ModelShape, Needs, Plan, Tier, fit_blocks, layer_groups
from tiered.units import MIB

STREAMING, LOADED = (Tier.DISK, Tier.CPU), (Tier.CPU,)
NOTHING = Needs(0, 0, 0, 0)
CACHE = CachePlan(KVShape(1, 2, 1, "bfloat16"), 16, False, layer_groups((0,)), 1, 100, 100, 100)


def model_of(tape_sizes: Sequence[int] = (MIB,), layers: int = 2, dtype: str = "bfloat16", **fields: Any) -> ModelShape:
    """A model with blocks of these sizes, nothing of it compressed; all that is not named is middling."""
    shape: dict[str, Any] = {
        "tape_nbytes": tuple(tape_sizes),
        "file_nbytes": tuple(tape_sizes),
        "weights": sum(tape_sizes) * 2,
        "side_nbytes": 1 << 20,
        "tables_nbytes": 20 << 20,
        "hidden": 4096,
        "widest": 16384,
        "vocab": 50272,
        "heads": 32,
        "kv": KVShape(8, 128, layers, dtype),
        "groups": layer_groups((0,) * layers),
        "eager_attention": False,
        "dense_attention": False,
        "packed_nbytes": 40 << 10,
    }
    return ModelShape(**{**shape, **fields})


def plan_of(
    sizes: Sequence[int] = (MIB,),
    needs: Needs = NOTHING,
    budget: int = MIB,
    tiers: tuple[Tier, ...] = STREAMING,
    **fields: Any,
) -> Plan:
    """A plan for blocks of these sizes beside `needs`; all that is not named is small."""
    small: dict[str, Any] = {"batch_size": 1, "max_context": 100, "max_batched_tokens": 100}
    small |= {"objective": "latency", "why": ""}
    small |= {"side_nbytes": 0, "micro_batch_rows": 1, "gathered_rows": 1, "head_rows": 1, "cache": CACHE}
    return Plan(budget, needs, fit_blocks(sizes, needs, budget, tiers), tuple(sizes), **{**small, **fields})
