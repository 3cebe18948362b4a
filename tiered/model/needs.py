"""What a run takes besides blocks, from headers and the configuration alone: the planner's input.

In: a store, the model's graph, how many tokens are in flight, the process's baseline. Out: `Needs` and the plan at
any budget.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Self

import torch
from transformers import PretrainedConfig

from tiered.arch import Skeleton, layer_windows
from tiered.cache import Bits, CachePlan, KVShape, LayerGroup, layer_groups
from tiered.errors import BudgetError, ConfigError
from tiered.kernels import packed_row_nbytes, scratch_nbytes
from tiered.kernels.attention import PAGE_TOKENS
from tiered.plan import Needs, Plan, Shape, Tier, Workspace, make_plan, workspace_for
from tiered.plan.fits import smallest_budget
from tiered.plan.kv import record_nbytes
from tiered.plan.workspace import MAX_ROWS
from tiered.store import CHUNK_NBYTES, PAGE, Store
from tiered.stream import EmbeddingRows
from tiered.units import MIB

_BASELINE_VARIES_NBYTES: Final = 4 * MIB
"""How much the process itself differs from run to run: a budget that was named as enough must be so next time."""


_LENT_SHARE: Final = 1 / 64
"""Part of the budget for the pages of one unit, where the KV cache is on disk; four times that is set aside."""


@dataclass(frozen=True)
class Load:
    """What a run will hold at once, so that memory for it can be set aside."""

    sequences: int = 1
    context: int = 2048
    """Tokens per sequence, prompt and completion together."""
    prompt: int = 0
    """Longest prompt; 0: as long as the context."""
    pass_tokens: int = 0
    """Tokens that pass together at most, longer prompts in several passes; 0: all prompts at once."""
    kv_tokens: int = 0
    """Tokens in the KV cache at most, of all sequences together; 0: as many as the sequences may have."""
    one_pass: bool = False
    """Sequences begin and end in the same pass, as those that are only scored do."""
    logits: int = 0
    """Positions of a pass that may get logits; 0: one per sequence."""
    least_context: int = 0
    """Tokens to which `context` may shrink where the budget is too small for it; 0: it may not."""

    def __post_init__(self) -> None:
        for name, value in (("sequences", self.sequences), ("context", self.context)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} {value!r}: expected a whole number above 0")

    def shrinking(self) -> Iterator[Self]:
        """This, and what may do instead where it does not fit: each half as long, down to the least."""
        context = self.context
        yield self
        while 0 < self.least_context < context:
            context = max(context // 2, self.least_context)
            yield replace(self, context=context)

    @property
    def tokens(self) -> int:
        """Tokens in flight at most."""
        tokens = self.sequences * (self.prompt or self.context)
        return min(tokens, max(self.pass_tokens, self.sequences)) if self.pass_tokens else tokens


@dataclass(frozen=True)
class CacheOptions:
    """How and where a run keeps its KV cache."""

    shape: KVShape
    groups: tuple[LayerGroup, ...]
    bits: Bits = 16
    on_disk: bool = False

    @classmethod
    def of(cls, config: PretrainedConfig, shape: KVShape, bits: Bits = 16, on_disk: bool = False) -> Self:
        """Those of a model; layers with a sliding window keep no more than it reaches."""
        return cls(shape, layer_groups(layer_windows(config)), bits, on_disk)


@dataclass(frozen=True)
class Footprint:
    """A store's needs as a function of the budget."""

    store: Store
    dtype: torch.dtype
    shape: Shape
    cache: CacheOptions
    load: Load
    baseline: int
    most_rows: int = MAX_ROWS
    """Rows per chunk at most."""

    def workspace(self, budget: int) -> Workspace:
        """Rows per chunk at `budget`, and what activations take with them."""
        load = self.load
        return workspace_for(self.shape, load.tokens, load.sequences, load.context, budget, load.logits, self.most_rows)

    def cache_plan(self, budget: int) -> CachePlan:
        """The KV cache's memory at `budget`."""
        load, cache = self.load, self.cache
        lent_pages = 0
        if cache.on_disk:
            # At least one sequence's; more in one go make longer reads and fuller chunks.
            pages = -(-load.context // PAGE_TOKENS)
            share = int(budget * _LENT_SHARE) // record_nbytes(cache.shape, cache.bits)
            lent_pages = max(pages, min(load.sequences * pages, share))
        return CachePlan(
            cache.shape,
            cache.bits,
            cache.on_disk,
            cache.groups,
            sequences=load.sequences,
            context=load.context,
            tokens=load.kv_tokens or load.sequences * load.context,
            chunk=min(self.most_rows, load.tokens),
            one_pass=load.one_pass,
            lent_pages=lent_pages,
        )

    def needs(self, budget: int) -> Needs:
        """What is taken at `budget`, whatever is resident."""
        workspace, cache = self.workspace(budget), self.cache_plan(budget)
        return Needs(
            baseline=self.baseline,
            outer=self._table_nbytes,
            kv=cache.memory_nbytes + 2 * PAGE,
            workspace=workspace.nbytes + cache.scratch_nbytes(workspace.rows),
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


def activation_shape(skeleton: Skeleton, kv: KVShape, threads: int) -> Shape:
    """What the size of activations depends on, with kernels of `threads` threads.

    `skeleton` must be as built: binding it takes its layers out.
    """
    config: PretrainedConfig = skeleton.config
    heads = int(config.num_attention_heads)
    layers = [p.shape for block in skeleton.blocks() if block.role == "layer" for p in block.parameters]
    return Shape(
        hidden=config.hidden_size,
        # Of a stack, one expert's: its tokens pass through one after the other.
        widest=max(shape[-2:][0] for shape in layers),
        vocab=config.vocab_size,
        heads=heads,
        itemsize=kv.itemsize,
        eager_attention=config._attn_implementation == "eager",
        packed_nbytes=packed_row_nbytes(max(shape[-1] for shape in layers)),
        scratch_nbytes=scratch_nbytes(threads),
        # Keys and values gathered, and repeated for every query head.
        gathered_nbytes=2 * (kv.heads + heads) * kv.head_dim * kv.itemsize if skeleton.family.gathers else 0,
    )
