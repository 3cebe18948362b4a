"""How much torch allocates while rows pass through a block: a reserve, bounded by the rows per micro-batch."""

from dataclasses import dataclass
from typing import Final

from tiered.plan.budget import heap_nbytes
from tiered.plan.inputs import ModelShape
from tiered.units import MIB

MAX_ROWS: Final = 512
"""More rows in one micro-batch no longer help: with so many, reading the weights takes little of the time."""
HEAD_ROWS: Final = 64
"""More logits at once gain nothing where the head's weights are in memory."""
_SHARE: Final = 1 / 16
"""Part of the budget that activations of one micro-batch may take."""
LATENT_HEADS: Final = 16
"""Heads of latent attention that are taken at once, at most: as many share the keys that a kernel reads."""
LATENT_WEIGHTS: Final = 1 << 20
"""Weights widened at once for them, unless one head has more: 4 MiB as float32 stay in a processor's cache."""
_FIXED_NBYTES: Final = 8 * MIB
"""JIT code, logits processing, Python objects made while running."""


@dataclass(frozen=True)
class Workspace:
    """The rows computed together and the bytes that takes."""

    rows: int
    """Tokens per micro-batch: a longer prompt passes through each block in several."""
    nbytes: int
    gathered_rows: int = 1
    """Sequences whose keys and values are gathered at once, by families that want them in one piece."""
    head_rows: int = 1
    """Positions whose logits are computed at once."""


def row_nbytes(shape: ModelShape, context: int, waiting: int = 0) -> int:
    """Bytes that one row (token) needs at most while it is inside a layer, with `context` keys to attend to.

    Hidden states: residual, normalized, q, k, v, attention output, and a float32 copy where a norm widens; what
    `waiting` experts have made of it, until that is summed; the feed-forward's result, its activation and gate (experts
    compute one after the other); what a kernel packs of its input; one mask row, and for eager families the scores of
    all heads before and after softmax, in float32; what a recurrent layer's scan takes. Or, if that is more, what it
    needs before the first layer, while its rows of tables are widened, projected and normalized.
    """
    hidden = shape.hidden * ((6 + waiting) * shape.itemsize + 8)
    feed_forward = 3 * shape.widest * shape.itemsize
    mask = 2 * context * max(shape.itemsize, 4)
    scores = 3 * context * shape.heads * 4 if shape.eager_attention else context * 4
    scan = 0 if shape.state is None else shape.state.row_nbytes
    # Queries of latents and what attention makes of them, of the heads that are taken at once.
    latents = 4 * min(shape.heads, LATENT_HEADS) * shape.latent_dim * max(shape.itemsize, 4)
    inside = hidden + feed_forward + mask + scores + scan + latents + shape.packed_nbytes
    return max(inside, shape.table_numbers * (4 * shape.itemsize + 12))


def workspace_for(
    shape: ModelShape,
    scratch_nbytes: int,
    tokens: int,
    sequences: int,
    context: int,
    budget: int,
    *,
    logits: int = 0,
    most_rows: int = MAX_ROWS,
    least_rows: int = 1,
    waiting: int = 0,
    native_steps: bool = True,
    is_device: bool = False,
    hidden_elsewhere: bool = False,
) -> Workspace:
    """Rows per micro-batch for at most `tokens` in flight in `sequences` sequences, and the reserve they need.

    `scratch_nbytes` are the kernels'; `logits` positions may get logits in one pass (0: one per sequence);
    `most_rows` bounds the rows, of which there are `least_rows` all the same; results of `waiting` experts per row wait
    until they are summed. `is_device`: in the memory of a device, where no heap of ours is and no logits are kept.
    `native_steps`: the library of kernels computes single tokens of recurrent layers; a device never has it.
    `hidden_elsewhere`: hidden states of tokens that do not compute are in other memory, which is not counted here.
    """
    per_row = row_nbytes(shape, context, waiting)
    share = int(budget * _SHARE)
    rows = min(tokens, max(least_rows, min(most_rows, share // per_row)))
    gathered = shape.gathered_nbytes * context
    gathered_rows = max(1, min(sequences, rows, share // gathered)) if gathered else 1
    in_flight = tokens * (_call_nbytes(shape) if hidden_elsewhere else _token_nbytes(shape))
    head_rows = min(logits or sequences, rows, HEAD_ROWS)
    live = rows * per_row + in_flight + gathered_rows * gathered
    # Widened weights of these heads.
    live += LATENT_WEIGHTS * 4 if shape.latent_dim else 0
    if shape.state is not None:
        is_native = native_steps and not is_device
        live += (shape.state.grid.padded(rows) - rows) * shape.state.row_nbytes
        live += min(sequences, rows) * (shape.state.native_step_nbytes if is_native else shape.state.step_nbytes)
    live += _logits_nbytes(shape, max(head_rows, min(sequences, rows)), 0 if is_device else sequences)
    nbytes = live + scratch_nbytes if is_device else _with_heap(live, budget) + scratch_nbytes
    return Workspace(rows, nbytes, gathered_rows, head_rows)


def transit_nbytes(shape: ModelShape, tokens: int, sequences: int, logits: int, budget: int) -> int:
    """Bytes of the host's memory that `tokens` embedded tokens take on their way to a device which computes all, and
    `logits` positions' logits on their way back, for at most `sequences` sequences."""
    live = tokens * _token_nbytes(shape) + _logits_nbytes(shape, logits, sequences)
    return _with_heap(live, budget)


def _token_nbytes(shape: ModelShape) -> int:
    """Bytes that a token in flight takes through the whole pass: two generations of its hidden states, its rows of
    tables, and what each layer will be given of them."""
    return 2 * shape.hidden_nbytes + shape.table_numbers * shape.itemsize + shape.table_row_nbytes


def _call_nbytes(shape: ModelShape) -> int:
    """Of these, bytes of what each layer will be given beside hidden states: its rows of tables, its position, and the
    sine and cosine of each channel of a head for it, in float32, of two kinds of layers."""
    channels = max((group.shape.head_dim for group in shape.groups), default=0)
    return shape.table_numbers * shape.itemsize + shape.table_row_nbytes + 8 + 2 * 2 * 4 * channels


def _logits_nbytes(shape: ModelShape, positions: int, kept: int) -> int:
    """Bytes of logits as computed, as float32, and as copied by sampling; and of `kept`, all of them that transformers'
    own loop keeps."""
    return (3 * positions + kept) * shape.vocab * 4


def _with_heap(live: int, budget: int) -> int:
    """`live` bytes of the host's memory, with what malloc and the process take beside them."""
    # Free memory that malloc holds was in use before: few activations leave small heaps, whatever the threshold.
    return live + min(heap_nbytes(budget), live) + _FIXED_NBYTES
