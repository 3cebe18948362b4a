"""The tensors that stay in memory for good: read once, and given to every model that computes with them.

In: a store, and the bound models of it. Called while streams open, in their loop.
"""

from collections.abc import Sequence

import torch

from tiered.io import ChunkBuffers, DiskReader
from tiered.model.bind import BoundModel
from tiered.store import PAGE, Store, Unit


async def load_tables(models: Sequence[BoundModel], store: Store, reader: DiskReader) -> None:
    """Read the tensors that stay in memory for good, and give them to each of `models`: those that are neither in
    layers nor embedding nor head, and the small ones of layers and head."""
    if (outer := store.blocks.get("outer")) is not None:
        for unit in store.layout(outer).units:
            tensors = await _copies(unit, reader)
            for model in models:
                model.set_outer(tensors)
    for number, (block, units) in enumerate(zip(store.tape, store.small_units, strict=True)):
        for unit in units:
            tensors = {name.removeprefix(block.prefix): item for name, item in (await _copies(unit, reader)).items()}
            for model in models:
                model.set_small(model.blocks[number], tensors)


async def _copies(unit: Unit, reader: DiskReader) -> dict[str, torch.Tensor]:
    """The tensors of `unit`, by full name."""
    # Not borrowed from the arena: only copies in the compute dtype are kept, and this memory is freed at once.
    memory = _aligned(unit.memory_nbytes)
    view = memoryview(memory.numpy())  # type: ignore[arg-type]  # numpy's stubs lack the buffer protocol here
    await reader.read_unit(unit, view, ChunkBuffers())
    return {name: weight.view(memory).clone() for name, weight in unit.weights.items()}  # type: ignore[union-attr]


def _aligned(nbytes: int) -> torch.Tensor:
    """uint8 memory that starts on a page."""
    raw = torch.empty(nbytes + PAGE, dtype=torch.uint8)
    start = -raw.data_ptr() % PAGE
    return raw[start : start + nbytes]
