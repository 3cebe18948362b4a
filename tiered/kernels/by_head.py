"""Products with a matrix for each head, in plain torch: what latent attention makes of queries, and of its results.

In: numbers of heads, and dense matrices. Out: their products. The native library has the same (`Kernels.by_head`);
this serves where it cannot, and devices.
"""

from typing import Final

import torch
from torch.nn import functional

_FIXED_TOKENS: Final = 32
"""Tokens of a product of fixed shape."""


def by_head_reference(x: torch.Tensor, w: torch.Tensor, transposed: bool, fixed: bool = False) -> torch.Tensor:
    """x [tokens, heads, rows] times w [heads, rows, in], in x's dtype: [tokens, heads, in]. Not `transposed`: x
    [tokens, heads, in] times every w transposed: [tokens, heads, rows].

    Computed in the dtype of w. With `fixed` all products have one shape, so that a token's result is the same bits
    whatever else is computed with it.
    """
    matrices = w if transposed else w.mT
    # [heads, tokens, ..]
    wide = x.transpose(0, 1).to(w.dtype)
    if not fixed:
        return (wide @ matrices).transpose(0, 1).to(x.dtype)
    tiles = []
    for tile in wide.split(_FIXED_TOKENS, dim=1):
        whole = functional.pad(tile, (0, 0, 0, _FIXED_TOKENS - tile.shape[1]))
        tiles.append((whole @ matrices)[:, : tile.shape[1]])
    return torch.cat(tiles, dim=1).transpose(0, 1).to(x.dtype)
