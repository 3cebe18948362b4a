"""The model in numbers, as plans want it: from a store's manifest and headers, and from the model's graph.

In: an open store, the skeleton as built, the compute dtype. Out: a `ModelShape`. Called where a runtime is opened.
"""

import torch

from tiered.arch import Skeleton, layer_windows
from tiered.cache import kv_shape, layer_groups
from tiered.kernels import packed_row_nbytes
from tiered.plan import ModelShape
from tiered.store import CHUNK_NBYTES, Store
from tiered.stream import EmbeddingRows


def model_shape(store: Store, skeleton: Skeleton, dtype: torch.dtype) -> ModelShape:
    """The shape of the model in `store`, computed in `dtype`.

    `skeleton` must be as built: binding it takes its layers out.
    """
    config, tape = skeleton.config, [store.layout(block) for block in store.tape]
    kv = kv_shape(config, dtype)
    (embed,) = store.layout(store.blocks["embed"]).weights.values()
    side = EmbeddingRows.side_nbytes(embed)
    tables = side + CHUNK_NBYTES
    if "outer" in store.blocks:
        outer = store.layout(store.blocks["outer"])
        tables += outer.memory_nbytes + outer.weight_count * kv.itemsize
    layers = [p.shape for block in skeleton.blocks() if block.role == "layer" for p in block.parameters]
    return ModelShape(
        tape_nbytes=tuple(layout.memory_nbytes for layout in tape),
        file_nbytes=tuple(block.file.units_nbytes for block in store.tape),
        weights=sum(layout.weight_count for layout in tape),
        side_nbytes=side,
        tables_nbytes=tables,
        hidden=config.hidden_size,
        # Of a stack of experts only one counts, because they compute one after the other.
        widest=max(shape[-2:][0] for shape in layers),
        vocab=config.vocab_size,
        heads=int(config.num_attention_heads),
        kv=kv,
        groups=layer_groups(layer_windows(config)),
        eager_attention=config._attn_implementation == "eager",
        dense_attention=skeleton.family.gathers,
        packed_nbytes=packed_row_nbytes(max(shape[-1] for shape in layers)),
        quantization=store.manifest.quantization.get("layers"),
    )
