"""A store without weights: what a conversion would write for a configuration, with holes for data.

In: a skeleton and options. Out: an opened `Store` in a folder that the caller removes; it takes no more room than its
headers. Called where the shape of a model is wanted before its weights are here (`tiered/shapes.py`), so that how a
store is laid out is described once, by the code that converts.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from tiered.arch import Skeleton
from tiered.convert.block import write_block
from tiered.convert.blocks import RangeRecipe, TensorRecipe
from tiered.convert.compression import Compression
from tiered.convert.recipe import ConvertOptions, StoreRecipe, make_recipe
from tiered.convert.source import Packed
from tiered.errors import ConfigError
from tiered.quant import folded
from tiered.store import Store
from tiered.store.format import tensor_nbytes
from tiered.store.hollow import HollowWriter
from tiered.store.manifest import MANIFEST_NAME
from tiered.units import MIB

_SOURCE: Final = {"kind": "synthetic", "name": "hollow", "revision": None, "fingerprint": ""}
_PIECE_NBYTES: Final = 4 * MIB


DtypeOf = Callable[[TensorRecipe], torch.dtype]
"""In what a checkpoint has a tensor."""


def hollow_store(skeleton: Skeleton, dtype_of: DtypeOf, options: ConvertOptions, folder: Path) -> Store:
    """The store in `folder`, which is empty, of `skeleton`'s model, whose checkpoint has its weights in `dtype_of`.

    Exponents of 16-bit weights are not coded: how far they shrink only weights can tell.
    """
    recipe, holes = _shortest_recipe(skeleton, options), _Holes(dtype_of)
    files = {
        block.path: write_block(folder, block, holes, Compression("none"), lambda _: None, HollowWriter)
        for block in recipe.files
    }
    (folder / "config.json").write_text(skeleton.config.to_json_string())
    (folder / MANIFEST_NAME).write_text(recipe.manifest(files, _SOURCE, "none").to_json())
    return Store.open(folder)


def _shortest_recipe(skeleton: Skeleton, options: ConvertOptions) -> StoreRecipe:
    """One file for all layers, where they are alike: a mixture has a thousand tensors in each."""
    try:
        return make_recipe(skeleton, replace(options, synthetic=True, distinct_blocks=1))
    except ConfigError:
        return make_recipe(skeleton, options)


class _Holes:
    """A source of weights of which only sizes matter: all of it is one piece of memory, again and again."""

    def __init__(self, dtype_of: DtypeOf) -> None:
        self.dtype, self._memory = dtype_of, memoryview(bytes(_PIECE_NBYTES))

    def plain(self, part: RangeRecipe) -> Iterator[memoryview]:
        return self._pieces(tensor_nbytes(self.dtype(part.whole), part.shape))

    def packed(self, part: RangeRecipe) -> Packed:
        scheme = part.whole.scheme
        assert scheme is not None
        parts = scheme.parts(*folded(part.shape))
        q, scales, zeros = (
            self._pieces(tensor_nbytes(*parts[name]) if name in parts else 0) for name in ("q", "scale", "zero")
        )
        return Packed(q, scales, zeros)

    def _pieces(self, nbytes: int) -> Iterator[memoryview]:
        for start in range(0, nbytes, _PIECE_NBYTES):
            yield self._memory[: nbytes - start]
