"""What a pass costs: seconds of computing and of reading, as closed forms of numbers.

In: a model, the machine's rates, rows and contexts. Out: seconds and bytes. The choice of a batch size, the pace of
prompts, predictions and reports all use these; experts on demand and what crosses a bus are in `way.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tiered.plan.inputs import ComputeRate, ExpertShape, Machine, ModelShape
from tiered.plan.kv import CachePlan
from tiered.units import PAGE_TOKENS

_ROUNDED: Final = 2 / 3
"""Rows of an expert are counted in whole numbers: one where it could be nearly one and a half."""
HALFWAY: Final = 0.75
"""Tokens that a sequence holds on average while it runs, as a share of those that it holds at its end."""


@dataclass(frozen=True)
class Computing:
    """Seconds of computing, and those of them in which experts compute."""

    seconds: float
    expert_seconds: float = 0.0

    def __add__(self, other: "Computing") -> "Computing":
        return Computing(self.seconds + other.seconds, self.expert_seconds + other.expert_seconds)


def pass_seconds(
    read_seconds: float, compute_seconds: float, expert_read_seconds: float = 0.0, expert_compute_seconds: float = 0.0
) -> float:
    """Seconds of a pass, or of several: all reading and all computing overlap, but while experts are read that their
    router has just chosen nothing else computes. `expert_...` are parts of the first two."""
    waited = max(expert_read_seconds, expert_compute_seconds)
    return max(read_seconds, compute_seconds - expert_compute_seconds + waited)


def linear_computing(
    model: ModelShape,
    machine: Machine,
    tokens: int,
    logits: int,
    most_rows: int,
    layers: Callable[[int], Computing] | None = None,
) -> Computing:
    """Seconds of everything but attention for `tokens` tokens in micro-batches of at most `most_rows`, of which
    `logits` go through the head. `layers` is `layers_computing` of both, where that remembers what it has said. The
    machine's rate must be known."""
    assert machine.linear is not None
    full, rest = divmod(tokens, max(1, most_rows))
    total = Computing(machine.linear.seconds(logits, model.head_weights) if logits else 0.0)
    for rows, times in ((most_rows, full), (rest, 1)):
        if rows and times:
            found = layers_computing(model, machine, rows) if layers is None else layers(rows)
            total += Computing(found.seconds * times, found.expert_seconds * times)
    return total


def beside_seconds(model: ModelShape, machine: Machine, rows: int) -> float:
    """Seconds of a layer, on average, for one micro-batch, beside its linear layers, experts and attention: norms,
    activations, new keys and values, and what it takes to have them done."""
    return _work_seconds(machine, model.operations, rows * model.elements) / max(1, model.layers)


def expert_seconds(experts: ExpertShape, machine: Machine, rows: int) -> float:
    """Seconds of an expert that computes `rows` rows. The machine's rate must be known."""
    assert machine.linear is not None
    beside = _work_seconds(machine, experts.operations, rows * experts.elements)
    return machine.linear.seconds(rows, experts.weights) + beside


def _work_seconds(machine: Machine, operations: int, elements: int) -> float:
    return operations * machine.operation_seconds + elements * machine.element_seconds


def slowed(machine: Machine, seconds: float, read_nbytes: float) -> float:
    """Seconds in which `seconds` are computed while `read_nbytes` are read: readers want processors, too."""
    most = read_nbytes * machine.reading_seconds
    share = machine.reading_seconds * (machine.disk_bytes_per_second or 0.0)
    # What computes for a shorter time than the disk reads is slowed by what is read in that time.
    return seconds + (min(most, seconds * share / (1 - share)) if share < 1 else most)


def layers_computing(model: ModelShape, machine: Machine, rows: int) -> Computing:
    """Seconds of the layers for one micro-batch, without attention."""
    assert machine.linear is not None
    dense, experts, seconds = model.weights - model.head_weights, model.experts, 0.0
    if experts is not None:
        dense -= experts.total * experts.weights
        each = expert_seconds(experts, machine, experts.rows_each(rows))
        seconds = experts.layers * experts.distinct(rows) * each
    beside = model.layers * beside_seconds(model, machine, rows)
    return Computing(seconds + machine.linear.seconds(rows, dense) + beside, seconds)


def least_token_seconds(model: ModelShape, machine: Machine) -> float:
    """Seconds of the products of a token in the best company there is, without the head. Rates must be known."""
    dense, experts, seconds = model.weights - model.head_weights, model.experts, 0.0
    assert machine.linear is not None
    if experts is not None:
        dense -= experts.total * experts.weights
        each = least_row_seconds(machine.linear, experts.weights)
        seconds = _ROUNDED * experts.layers * experts.chosen * each
    return seconds + least_row_seconds(machine.linear, dense)


def least_row_seconds(rate: ComputeRate, weights: int, most: float = math.inf) -> float:
    """The least seconds of one of at most `most` rows, whatever others go through the weights beside them: between the
    rows that were measured, seconds are linear, so one of the ends is the least."""
    counts = rate.rows if most == math.inf else (*rate.rows, int(most))
    return min(rate.seconds(rows, weights) / min(rows, most) for rows in counts)


def decode_computing(model: ModelShape, machine: Machine, count: int, context: float, most_rows: int) -> Computing:
    """Seconds that a pass over `count` decoding sequences computes, each with `context` tokens before it."""
    attention = decode_attention_seconds(model, machine, count, context)
    return linear_computing(model, machine, count, count, most_rows) + Computing(attention)


def decode_attention_seconds(model: ModelShape, machine: Machine, count: int, context: float) -> float:
    """Seconds of attention by `count` queries, each of a sequence with `context` tokens before it; 0 where the rate is
    not known."""
    seen, each = seen_tokens(model, context), machine.attention_seconds or 0.0
    seconds = seen * each
    if machine.recent_attention_seconds is not None:
        # The page that is being filled is half full on average.
        recent = min(seen, kept_layers(model) * (context if context < PAGE_TOKENS else PAGE_TOKENS / 2))
        seconds += recent * (machine.recent_attention_seconds - each)
    return seconds * count


def store_seconds(model: ModelShape, machine: Machine, start: int, stop: int, passes: int = 1) -> float:
    """Seconds of quantizing the pages that a prompt fills with its tokens from `start` to `stop` in so many passes."""
    stored = (len(group.layers) * stored_tokens(start, stop, group.window, passes) for group in model.groups)
    return machine.store_seconds * sum(stored)


def stored_tokens(start: int, stop: int, window: int, passes: int = 1) -> int:
    """Tokens of the pages that one sequence fills from `start` to `stop` in a layer: in one with a window no more than
    the next query sees."""
    pages = stop // PAGE_TOKENS - start // PAGE_TOKENS
    return PAGE_TOKENS * (min(pages, passes * (window // PAGE_TOKENS + 1)) if window else pages)


def kept_layers(model: ModelShape) -> int:
    """Layers that keep keys and values."""
    return sum(len(group.layers) for group in model.groups)


def seen_tokens(model: ModelShape, context: float) -> float:
    """Tokens that a query sees with `context` before it, summed over layers."""
    return sum(len(group.layers) * min(context, group.window or context) for group in model.groups)


def prompt_attention_seconds(model: ModelShape, machine: Machine, pairs: float) -> float:
    """Seconds of a prompt's attention over `pairs` pairs of a query and a key; as decoding's where no rate of its own
    is known."""
    flops = machine.prompt_attention_flops
    if flops is None:
        return pairs * (machine.attention_seconds or 0.0)
    # A query times a key, and a weight times a value: each a multiply-add per channel.
    return 2 * pairs * model.heads * sum(model.kv.widths) / flops if model.kv else 0.0


def prompt_pairs(model: ModelShape, prompt: int) -> float:
    """Pairs of a query and a key that it sees, of a prompt of `prompt` tokens, summed over layers."""
    pairs = 0.0
    for group in model.groups:
        window = min(prompt, group.window or prompt)
        # Queries see 1, 2, ... tokens until the window is full, then always as many.
        pairs += len(group.layers) * (window * (window + 1) / 2 + (prompt - window) * window)
    return pairs


def kv_block_nbytes(cache: CachePlan, tokens: float, sequences: float = 1) -> float:
    """Bytes of the KV blocks, in all layers, that a pass reads of `sequences` sequences of `tokens` tokens each; a
    layer with a window reads no more than that."""
    kept = (layers * min(tokens, window or tokens) * nbytes for layers, window, nbytes in cache.layer_nbytes)
    return sequences * sum(kept) / PAGE_TOKENS


def kv_written_nbytes(cache: CachePlan, tokens: float) -> float:
    """Bytes that `tokens` new tokens add to the KV blocks, in all layers: windows bound what is read, not this."""
    return tokens / PAGE_TOKENS * sum(layers * nbytes for layers, _, nbytes in cache.layer_nbytes)
