"""The model in numbers, as plans want it: from a store's manifest and headers, and from the model's graph.

In: an open store, the skeleton as built, the compute dtype. Out: a `ModelShape`. Called where a runtime is opened.
"""

import math
import re
from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

from tiered.arch import Skeleton, Work, chunked_layers, kv_sources, layer_windows, state_shape, work_of_layers
from tiered.cache import kv_shapes, layer_groups
from tiered.io import CHUNK_BUFFERS
from tiered.kernels import packed_row_nbytes
from tiered.model.steps import native_forward
from tiered.plan import ExpertShape, ModelShape, Tape
from tiered.store import ALIGNMENT, CHUNK_NBYTES, Store, Unit
from tiered.store.manifest import RANGE
from tiered.stream import EmbeddingRows
from tiered.units import round_up


def model_shape(store: Store, skeleton: Skeleton, dtype: torch.dtype, of_store: ModelShape | None = None) -> ModelShape:
    """The shape of the model in `store`, computed in `dtype`.

    `skeleton` must be as built: binding it takes its layers out. `of_store`, the shape that the store keeps, if any,
    says how much layers compute beside products: counting that runs the graph, which takes a second for large ones.
    """
    config = skeleton.config
    state, own_dtype = state_shape(skeleton, native_forward), str(skeleton.model.dtype).removeprefix("torch.")
    blocks = store.units_of_pass(on_demand=False)
    (embed,) = store.layout(store.blocks["embed"]).weights.values()
    side = EmbeddingRows.side_nbytes(embed)
    compressed = (min(unit.nbytes, CHUNK_NBYTES) for units in blocks for unit in units if unit.compressed)
    buffers = CHUNK_BUFFERS * max(compressed, default=0)
    tables = side + CHUNK_NBYTES + buffers
    kept = _kept_units(store)
    tables += max((unit.memory_nbytes for unit in kept), default=0)
    tables += sum(math.prod(weight.shape) for unit in kept for weight in unit.weights.values()) * dtype.itemsize
    tables += _copied_nbytes(store, skeleton)
    # Parameters that are one number have no shape.
    layers = [p.shape for block in skeleton.blocks() if block.role == "layer" for p in block.parameters if p.shape]
    by_id = (store.layout(store.blocks[name]) for name in skeleton.tables)
    tables_by_id = [weight for layout in by_id for weight in layout.weights.values()]
    layers_work, expert_work = work_of_layers(skeleton) if of_store is None else _work_of(of_store)
    return ModelShape(
        tape=_tape(blocks),
        weights=sum(store.layout(block).weight_count for block in store.tape),
        side_nbytes=side,
        tables_nbytes=tables,
        buffers_nbytes=buffers,
        hidden=config.hidden_size,
        # Of a stack of experts only one counts, because they compute one after the other.
        widest=max(shape[-2:][0] for shape in layers),
        vocab=config.vocab_size,
        heads=int(getattr(config, "num_attention_heads", None) or 1),
        dtype=str(dtype).removeprefix("torch."),
        groups=layer_groups(
            layer_windows(config), kv_shapes(config, dtype), chunked_layers(config), kv_sources(config)
        ),
        eager_attention=config._attn_implementation == "eager",
        dense_attention=skeleton.family.gathers,
        packed_nbytes=packed_row_nbytes(max(shape[-1] for shape in layers)),
        quantization=store.manifest.quantization.get("layers"),
        experts=_expert_shape(store, config, expert_work),
        head_weights=store.layout(store.tape[-1]).weight_count,
        table_numbers=sum(weight.shape[1] for weight in tables_by_id),
        table_row_nbytes=sum(weight.nbytes // weight.shape[0] for weight in tables_by_id),
        state=None if state is None else state.in_dtype(str(dtype).removeprefix("torch."), own_dtype),
        operations=layers_work.operations,
        elements=layers_work.elements,
        float32_residual=bool(getattr(config, "residual_in_fp32", False)),
    )


def _work_of(shape: ModelShape) -> tuple[Work, Work]:
    """What `work_of_layers` gave when `shape` was made."""
    experts = shape.experts
    expert = Work() if experts is None else Work(experts.operations, experts.elements)
    return Work(shape.operations, shape.elements), expert


def _tape(blocks: Sequence[Sequence[Unit]]) -> Tape:
    units = [unit for block in blocks for unit in block]
    return Tape(
        tuple(unit.memory_nbytes for unit in units),
        tuple(unit.nbytes for unit in units),
        tuple(map(len, blocks)),
    )


def _expert_shape(store: Store, config: PretrainedConfig, work: Work) -> ExpertShape | None:
    """The experts, if each is a unit, and all layers that have experts have one module of equally many."""
    layers = [units for units in store.expert_units if units]
    modules = [{unit.name.partition(RANGE)[0] for unit in units} for units in layers]
    # Some have a name of their own for it, and Hunyuan may have a number for each layer.
    names = ("num_experts_per_tok", "moe_topk", "top_k_experts")
    chosen = next((found for name in names if (found := getattr(config, name, None))), None)
    chosen = max(chosen) if isinstance(chosen, list) and chosen else chosen
    if {*map(len, modules)} != {1} or len({*map(len, layers)}) != 1 or not isinstance(chosen, int):
        return None
    experts = [unit for units in layers for unit in units]
    count = len(layers[0])
    return ExpertShape(
        dense=_tape(store.units_of_pass(on_demand=True)),
        layers=len(layers),
        count=count,
        chosen=max(1, min(chosen, count)),
        nbytes=max(unit.memory_nbytes for unit in experts),
        file_nbytes=sum(unit.nbytes for unit in experts) // len(experts),
        weights=sum(math.prod(weight.shape) for weight in experts[0].weights.values()),
        operations=work.operations,
        elements=work.elements,
    )


def _kept_units(store: Store) -> list[Unit]:
    """The units that are copied once, to stay in memory for good: of what is outside the tape, and small ones."""
    outer = [block for name, block in store.blocks.items() if name == "outer"]
    small = [unit for units in store.small_units for unit in units]
    return [unit for block in outer for unit in store.layout(block).units] + small


def _copied_nbytes(store: Store, skeleton: Skeleton) -> int:
    """Bytes of the tensors that are copied when a layer begins, of the layer that has most: those in units that every
    token uses that neither linear layers nor experts borrow, in the graph's dtype."""
    own = skeleton.model.state_dict(keep_vars=True)
    lent = {p.name for block in skeleton.blocks() for p in block.parameters if p.is_linear}
    layers = [{w.whole_name for unit in units for w in unit.weights.values()} for units in store.dense_units[:-1]]
    copied = ([name for name in names if re.sub(r"\bbias$", "weight", name) not in lent] for names in layers)
    return max(sum(round_up(own[name].nbytes, ALIGNMENT) for name in names) for names in copied)
