"""What a run takes besides blocks, from headers and the configuration alone: the planner's input.

In: a store, the model's graph, how many tokens are in flight, the process's baseline. Out: `Needs` at any budget.
"""

import functools
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from tiered.arch import Skeleton
from tiered.cache import KVShape, kv_shape
from tiered.kernels import scratch_nbytes
from tiered.plan import Needs, Shape, workspace_for
from tiered.store import CHUNK_NBYTES, PAGE, Store
from tiered.stream import EmbeddingRows
from tiered.units import round_up


@dataclass(frozen=True)
class InFlight:
    """What a run holds at once."""

    sequences: int
    context: int
    """Tokens per sequence, prompt and completion together."""
    prompt: int
    """Longest prompt."""


@dataclass(frozen=True)
class Footprint:
    """A store's needs as a function of the budget."""

    store: Store
    dtype: torch.dtype
    shape: Shape
    kv: KVShape
    load: InFlight
    baseline: int

    @classmethod
    def of(cls, store: Store, skeleton: Skeleton, dtype: torch.dtype, load: InFlight, baseline: int) -> "Footprint":
        """`skeleton` must be as built: binding it takes its linear layers out."""
        shape = activation_shape(skeleton, dtype)
        return cls(store, dtype, shape, kv_shape(skeleton.config, dtype), load, baseline)

    def needs(self, budget: int) -> Needs:
        """What is taken at `budget`, whatever is resident."""
        load = self.load
        workspace = workspace_for(self.shape, load.sequences * load.prompt, load.sequences, load.context, budget)
        return Needs(
            baseline=self.baseline,
            outer=self._table_nbytes,
            kv=round_up(self.kv.nbytes(load.sequences, load.context), PAGE) + load.sequences * PAGE,
            workspace=workspace.nbytes,
        )

    @functools.cached_property
    def _table_nbytes(self) -> int:
        """Outer tensors in the compute dtype with the block they are read through, embedding scales, staging."""
        store = self.store
        (embed,) = store.layout(store.blocks["embed"]).weights.values()
        nbytes = EmbeddingRows.side_nbytes(embed) + CHUNK_NBYTES
        if "outer" in store.blocks:
            layout = store.layout(store.blocks["outer"])
            nbytes += layout.memory_nbytes + layout.weight_count * self.dtype.itemsize
        return nbytes


def activation_shape(skeleton: Skeleton, dtype: torch.dtype) -> Shape:
    """What the size of activations depends on."""
    config: PretrainedConfig = skeleton.config
    layers = (p.shape for block in skeleton.blocks() if block.role == "layer" for p in block.parameters)
    return Shape(
        hidden=config.hidden_size,
        # Of a stack, one expert's: its tokens pass through one after the other.
        widest=max(shape[-2:][0] for shape in layers),
        vocab=config.vocab_size,
        heads=config.num_attention_heads,
        itemsize=dtype.itemsize,
        eager_attention=config._attn_implementation == "eager",
        scratch_nbytes=scratch_nbytes(),
    )
