"""How much torch allocates of its own while rows pass through a block: a reserve, bounded by the rows per chunk."""

from dataclasses import dataclass
from typing import Final

from tiered.units import MIB

MAX_ROWS: Final = 512
"""More rows in one chunk no longer help: the weights' reading has long been paid for by then."""
_SHARE: Final = 1 / 16
"""Part of the budget that activations of one chunk may take."""
_FIXED_NBYTES: Final = 24 * MIB
"""Allocator slack, kernel scratch, JIT code, logits processing, Python objects made while running."""


@dataclass(frozen=True)
class Shape:
    """What activations depend on."""

    hidden: int
    widest: int
    """The largest `out` of any linear layer or expert in a decoder layer."""
    vocab: int
    heads: int
    itemsize: int
    """Bytes of the compute dtype."""
    eager_attention: bool
    """The family materializes attention scores."""
    packed_nbytes: int
    """Of one row of activations, while a linear kernel holds it in the order it needs."""
    scratch_nbytes: int
    """Of the linear kernel besides."""


@dataclass(frozen=True)
class Workspace:
    """The rows computed together and the bytes that takes."""

    rows: int
    """Tokens per chunk: a longer prompt passes through each block in several chunks."""
    nbytes: int


def row_nbytes(shape: Shape, context: int) -> int:
    """Bytes that one row (token) needs at most while it is inside a layer, with `context` keys to attend to.

    Hidden states: residual, normalized, q, k, v, attention output, and a float32 copy where a norm widens; the
    feed-forward's result, its activation and gate (experts compute one after the other); what a kernel packs of its
    input; one mask row, and for eager families the scores of all heads before and after softmax, in float32.
    """
    hidden = shape.hidden * (6 * shape.itemsize + 8)
    feed_forward = 3 * shape.widest * shape.itemsize
    mask = 2 * context * max(shape.itemsize, 4)
    scores = 3 * context * shape.heads * 4 if shape.eager_attention else context * 4
    return hidden + feed_forward + mask + scores + shape.packed_nbytes


def workspace_for(shape: Shape, tokens: int, sequences: int, context: int, budget: int) -> Workspace:
    """Rows per chunk for at most `tokens` in flight in `sequences` sequences, and the reserve they need."""
    per_row = row_nbytes(shape, context)
    rows = max(1, min(MAX_ROWS, tokens, int(budget * _SHARE) // per_row))
    # Hidden states of everything in flight live through the whole pass, two generations of them.
    in_flight = 2 * tokens * shape.hidden * shape.itemsize
    logits = 3 * min(sequences, rows) * shape.vocab * 4 + sequences * shape.vocab * 4
    return Workspace(rows, _FIXED_NBYTES + shape.scratch_nbytes + rows * per_row + in_flight + logits)
