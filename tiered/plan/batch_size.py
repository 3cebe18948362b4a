"""How many sequences at once are worth a look, and, where no rates are known, how many windows to score in a pass.

N sequences that are about equally long take ceil(N / n) waves, the last of which may be nearly empty: so sizes that
make waves about equal are compared too (of 100 sequences 50 at once beside 64 and 96, which take as many waves and more
memory). `choose.py` compares them, by the seconds of the whole job.
Scoring, where nothing is sampled, can do without rates: there the bytes read decide. Pure functions.
"""

import math
from collections.abc import Callable
from typing import Final

_FEW_ROWS: Final = 512
"""Tokens below which a pass computes slower per token, even with all weights in memory."""
ENOUGH_TOKENS: Final = 16384
"""Tokens in a pass that take any processor far longer than any disk takes for the weights: more gains nothing, and
the first results come later."""


def candidates(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16 and so on up to `most`, which is the last."""
    doublings = [1 << n for n in range(most.bit_length())]
    return sorted({*doublings, *(3 * n // 2 for n in doublings[1:] if 3 * n // 2 < most), most})


def evened(sequences: int, count: int) -> int:
    """`count` of so many sequences in all, lowered as far as it takes no more waves."""
    return -(-sequences // _passes(sequences, count))


def even_candidates(sequences: int, most: int) -> list[int]:
    """`candidates` up to `most` for so many sequences in all, each lowered as far as it takes no more waves."""
    return sorted({evened(sequences, count) for count in candidates(min(sequences, most))})


def all_candidates(sequences: int, most: int) -> list[int]:
    """`candidates` up to `most` for so many sequences in all, and those that would make waves about equal."""
    return sorted({*candidates(min(sequences, most)), *even_candidates(sequences, most)})


def choose_windows_per_pass(read_nbytes: Callable[[int], int | None], windows: int, context: int) -> int:
    """Windows per pass for `windows` windows of `context` tokens that are only scored.

    `read_nbytes` tells how many bytes a later pass with so many windows reads, None where memory does not suffice.
    More windows make fewer passes but leave less memory for weights, so each pass reads more; the product decides. Of
    numbers with equal products the smallest that is not slow to compute is taken, and the windows are spread evenly
    over the passes. 1 where nothing fits: making the plan then says why.
    """
    most = max(1, min(windows, ENOUGH_TOKENS // context))
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
    return evened(windows, best)


def _passes(windows: int, per_pass: int) -> int:
    return -(-windows // per_pass)
