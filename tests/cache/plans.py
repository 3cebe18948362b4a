"""Small cache plans, and a file in memory: what the tests of the paged cache share."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

import torch

from tiered.cache import CachePlan, Extent, KVPool, KVShape, layer_groups

SHAPE: Final = KVShape(2, 16, 16, "bfloat16")
UNEQUAL: Final = KVShape(1, 24, 8, "bfloat16")
LATENT: Final = KVShape(1, 24, 0, "bfloat16")
MIXED: Final = (UNEQUAL, None, LATENT, SHAPE)
"""Shapes of layers: one has values of another width, one keeps no keys, one keeps latents."""
UNTOUCHED: Final = 171
"""What memory holds that nothing has been written to."""


def plan_of(
    windows: tuple[int, ...] = (0,),
    shapes: KVShape | Sequence[KVShape | None] = SHAPE,
    chunked: Collection[int] = (),
    **fields: Any,
) -> CachePlan:
    """A plan for layers with the given windows, or chunks, and shapes; all that is not named is small."""
    small: dict[str, Any] = {"bits": 16, "on_disk": False, "sequences": 3, "context": 320, "tokens_at_once": 64}
    fields = small | fields
    fields.setdefault("tokens", fields["sequences"] * fields["context"])
    return CachePlan(layers=len(windows), groups=layer_groups(windows, shapes, chunked), **fields)


def pool_of(plan: CachePlan) -> KVPool:
    """A pool in memory that is exactly as large as planned, and dirty."""
    return KVPool(plan, torch.full((plan.pool_nbytes,), UNTOUCHED, dtype=torch.uint8))


class FakeFile:
    """The cache's file, as bytes that start dirty."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = torch.full((nbytes,), UNTOUCHED, dtype=torch.uint8)

    def read(self, extents: Iterable[Extent], memory: torch.Tensor) -> None:
        for extent in extents:
            memory[extent.memory_offset :][: extent.nbytes] = self._at(extent)

    def write(self, extents: Iterable[Extent], memory: torch.Tensor) -> None:
        for extent in extents:
            found = memory[extent.memory_offset : extent.memory_offset + extent.nbytes]
            assert len(found) == extent.nbytes, "an extent reaches beyond the memory lent"
            self._at(extent).copy_(found)

    def _at(self, extent: Extent) -> torch.Tensor:
        found = self.bytes[extent.offset : extent.offset + extent.nbytes]
        assert len(found) == extent.nbytes, "an extent reaches beyond the file"
        return found
