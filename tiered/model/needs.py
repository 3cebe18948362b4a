"""What a run takes besides blocks, from headers and the configuration alone: the planner's input.

In: a store, the model's graph, how many tokens are in flight, the process's baseline. Out: `Needs` and the plan at
any budget.
"""

import functools
from dataclasses import dataclass, replace
from typing import Final

import torch
from transformers import PretrainedConfig

from tiered.arch import Skeleton
from tiered.cache import KVShape
from tiered.errors import BudgetError, ConfigError
from tiered.kernels import packed_row_nbytes, scratch_nbytes
from tiered.plan import Needs, Plan, Shape, Tier, Workspace, make_plan, workspace_for
from tiered.plan.fits import smallest_budget
from tiered.store import CHUNK_NBYTES, PAGE, Store
from tiered.stream import EmbeddingRows
from tiered.units import MIB, round_up

_BASELINE_VARIES_NBYTES: Final = 4 * MIB
"""How much the process itself differs from run to run: a budget that was named as enough must be so next time."""


@dataclass(frozen=True)
class Load:
    """What a run will hold at once, so that memory for it can be set aside."""

    sequences: int = 1
    context: int = 2048
    """Tokens per sequence, prompt and completion together."""
    prompt: int = 0
    """Longest prompt; 0: as long as the context."""

    def __post_init__(self) -> None:
        for name, value in (("sequences", self.sequences), ("context", self.context)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} {value!r}: expected a whole number above 0")

    @property
    def tokens(self) -> int:
        """Tokens in flight at most, when all prompts pass at once."""
        return self.sequences * (self.prompt or self.context)


@dataclass(frozen=True)
class Footprint:
    """A store's needs as a function of the budget."""

    store: Store
    dtype: torch.dtype
    shape: Shape
    kv: KVShape
    load: Load
    baseline: int

    def workspace(self, budget: int) -> Workspace:
        """Rows per chunk at `budget`, and what activations take with them."""
        load = self.load
        return workspace_for(self.shape, load.tokens, load.sequences, load.context, budget)

    def needs(self, budget: int) -> Needs:
        """What is taken at `budget`, whatever is resident."""
        load = self.load
        return Needs(
            baseline=self.baseline,
            outer=self._table_nbytes,
            kv=round_up(self.kv.nbytes(load.sequences, load.context), PAGE) + load.sequences * PAGE,
            workspace=self.workspace(budget).nbytes,
        )

    def plan(self, budget: int, tiers: tuple[Tier, ...]) -> Plan:
        """The plan at `budget`; a BudgetError names a budget that will do in the next process as well."""
        sizes = [self.store.layout(block).memory_nbytes for block in self.store.tape]
        try:
            return make_plan(sizes, self.needs(budget), budget, tiers)
        except BudgetError:
            spared = replace(self, baseline=self.baseline + _BASELINE_VARIES_NBYTES)
            # A larger budget computes more rows at once, which takes more: the planner is asked what it agrees to.
            smallest = smallest_budget(sizes, spared.needs, tiers)
        return make_plan(sizes, spared.needs(smallest), budget, tiers)

    @functools.cached_property
    def side_nbytes(self) -> int:
        """The embedding's scales and zeros."""
        (embed,) = self.store.layout(self.store.blocks["embed"]).weights.values()
        return EmbeddingRows.side_nbytes(embed)

    @functools.cached_property
    def _table_nbytes(self) -> int:
        """Outer tensors in the compute dtype with the block they are read through, embedding scales, staging."""
        store = self.store
        nbytes = self.side_nbytes + CHUNK_NBYTES
        if "outer" in store.blocks:
            layout = store.layout(store.blocks["outer"])
            nbytes += layout.memory_nbytes + layout.weight_count * self.dtype.itemsize
        return nbytes


def activation_shape(skeleton: Skeleton, dtype: torch.dtype, threads: int) -> Shape:
    """What the size of activations depends on, with kernels of `threads` threads.

    `skeleton` must be as built: binding it takes its layers out.
    """
    config: PretrainedConfig = skeleton.config
    layers = [p.shape for block in skeleton.blocks() if block.role == "layer" for p in block.parameters]
    return Shape(
        hidden=config.hidden_size,
        # Of a stack, one expert's: its tokens pass through one after the other.
        widest=max(shape[-2:][0] for shape in layers),
        vocab=config.vocab_size,
        heads=config.num_attention_heads,
        itemsize=dtype.itemsize,
        eager_attention=config._attn_implementation == "eager",
        packed_nbytes=packed_row_nbytes(max(shape[-1] for shape in layers)),
        scratch_nbytes=scratch_nbytes(threads),
    )
