"""Small models and plans: what the tests of plans, reports and the loop share."""

from collections.abc import Sequence
from typing import Any

from tiered.plan import (
    CachePlan,
    ExpertShape,
    Held,
    KVShape,
    ModelShape,
    Needs,
    Plan,
    Tape,
    Tier,
    fit_units,
    layer_groups,
)
from tiered.plan.placement import UNHELD
from tiered.units import MIB

STREAMING, LOADED = (Tier.DISK, Tier.CPU), (Tier.CPU,)
NOTHING = Needs(0, 0, 0, 0)
CACHE = CachePlan(1, 16, False, layer_groups((0,), KVShape(1, 2, 2, "bfloat16")), 1, 100, 100, 100)


def tape_of(sizes: Sequence[int], file_sizes: Sequence[int] = (), counts: Sequence[int] = ()) -> Tape:
    """Units of these sizes; without `counts` each is a block, without `file_sizes` nothing is compressed."""
    return Tape(tuple(sizes), tuple(file_sizes or sizes), tuple(counts or [1] * len(sizes)))


def model_of(tape_sizes: Sequence[int] = (MIB,), layers: int = 2, dtype: str = "bfloat16", **fields: Any) -> ModelShape:
    """A model with blocks of these sizes, nothing of it compressed; all that is not named is middling."""
    shape: dict[str, Any] = {
        "tape": tape_of(tape_sizes),
        "weights": sum(tape_sizes) * 2,
        "side_nbytes": 1 << 20,
        "tables_nbytes": 20 << 20,
        "buffers_nbytes": 0,
        "hidden": 4096,
        "widest": 16384,
        "vocab": 50272,
        "heads": 32,
        "dtype": dtype,
        "groups": layer_groups((0,) * layers, KVShape(8, 128, 128, dtype)),
        "eager_attention": False,
        "dense_attention": False,
        "packed_nbytes": 40 << 10,
    }
    return ModelShape(**{**shape, **fields})


def mixture_of(
    dense: Sequence[int], count: int, chosen: int, nbytes: int, layers: int | None = None, **fields: Any
) -> ModelShape:
    """A model of a dense unit of these sizes per block, the last of which is the head, and of `count` experts of
    `nbytes` bytes in each of the first `layers` layers, or all."""
    layers = len(dense) - 1 if layers is None else layers
    blocks = [[size, *([nbytes] * count if number < layers else [])] for number, size in enumerate(dense)]
    whole = tape_of([size for block in blocks for size in block], counts=list(map(len, blocks)))
    experts = ExpertShape(tape_of(dense), layers, count, chosen, nbytes, nbytes, 2 * nbytes)
    return model_of(tape=whole, weights=2 * whole.total, experts=experts, **fields)


def plan_of(
    sizes: Sequence[int] = (MIB,),
    needs: Needs = NOTHING,
    budget: int = MIB,
    tiers: tuple[Tier, ...] = STREAMING,
    held: Held = UNHELD,
    **fields: Any,
) -> Plan:
    """A plan for blocks of these sizes beside `needs`; all that is not named is small."""
    small: dict[str, Any] = {"batch_size": 1, "max_context": 100, "max_batched_tokens": 100}
    small |= {"objective": "latency", "why": "", "side_nbytes": 0, "buffers_nbytes": 0}
    small |= {"micro_batch_rows": 1, "gathered_rows": 1, "head_rows": 1, "cache": CACHE}
    tape = tape_of(sizes)
    return Plan(budget, needs, fit_units(tape, needs, budget, tiers, held), tape, held, **{**small, **fields})
