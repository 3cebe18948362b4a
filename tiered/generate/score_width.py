"""How many windows share a pass of a scoring: as many as make the disk's work least."""

import math
from collections.abc import Callable
from typing import Final

from tiered.plan.width import candidates

_FEW_ROWS: Final = 512
"""Tokens below which a pass computes slower per token, even with all weights in memory."""
_ENOUGH_TOKENS: Final = 16384
"""Tokens in a pass that take any processor far longer than any disk takes for the weights: more gains nothing, and
the first results come later."""


def choose_windows_per_pass(read_nbytes: Callable[[int], int | None], windows: int, context: int) -> int:
    """Windows per pass for `windows` windows of `context` tokens.

    `read_nbytes` tells how many bytes a later pass with so many windows reads, None where memory does not suffice.
    More windows make fewer passes but leave less memory for weights, so each pass reads more; the product decides. Of
    equal ones the smallest is taken that is not slow to compute, and passes are made about equal. 1 where nothing
    fits: the plan then says why.
    """
    most = max(1, min(windows, _ENOUGH_TOKENS // context))
    least = min(most, -(-_FEW_ROWS // context))
    best, best_cost = 1, math.inf
    for count in candidates(most):
        read = read_nbytes(count)
        if read is None:
            break
        # The first pass reads everything, whatever will be resident.
        cost = (_passes(windows, count) - 1) * read
        if cost < best_cost or (cost == best_cost and best < least):
            best, best_cost = count, cost
    return -(-windows // _passes(windows, best))


def _passes(windows: int, per_pass: int) -> int:
    return -(-windows // per_pass)
