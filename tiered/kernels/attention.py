"""Attention over a KV cache in pages: how a call is described, and its reference in plain torch.

In: queries, and where the keys and values of their sequences lie. Out: for each query, the weighted sum of the values
of the keys it sees. Called through `Kernels.attention`; the native kernel takes the same `AttentionCall`
(`attention_native.py`). The reference computes what the native kernel does not take, and tests compare with it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import torch

from tiered.errors import ConfigError
from tiered.kernels.cancel import CancelFlag
from tiered.units import PAGE_TOKENS as PAGE_TOKENS

INVISIBLE: Final = -1e30
"""A bias below this means "not seen": masks made of numbers hold the least number of their dtype there."""
_PIECE_PAGES: Final = 16
"""Pages that the reference widens at a time."""


class CacheFormat(IntEnum):
    """How pages hold keys or values. Codes stand for scale * (code - zero), as those of weights do."""

    BF16 = 0
    INT8 = 1
    """Scale and zero per token and group of gcd(head_dim, 64) channels."""
    INT4 = 2
    """The same; a group's nibbles are planar, as those of weights are."""
    INT8_CHANNEL = 3
    """Keys only. Scale and zero per channel, for all tokens of a page."""
    INT4_CHANNEL = 4

    @property
    def bits(self) -> int:
        return {CacheFormat.BF16: 16, CacheFormat.INT8: 8, CacheFormat.INT8_CHANNEL: 8}.get(self, 4)

    @property
    def per_channel(self) -> bool:
        return self in (CacheFormat.INT8_CHANNEL, CacheFormat.INT4_CHANNEL)


@dataclass(frozen=True)
class Plane:
    """Codes, scales or zeros in a KV block: [heads, tokens, width] of `dtype`, `start` bytes after the block's begin.

    Strides are in elements.
    """

    dtype: torch.dtype
    width: int
    head_stride: int
    token_stride: int
    start: int = 0

    def of(self, memory: torch.Tensor, offset: int, heads: int, tokens: int) -> torch.Tensor:
        """[heads, tokens, width]: this part of the block that begins `offset` bytes into `memory`."""
        numbers = memory.view(self.dtype)
        begin = numbers.storage_offset() + (offset + self.start) // self.dtype.itemsize
        return numbers.as_strided((heads, tokens, self.width), (self.head_stride, self.token_stride, 1), begin)


@dataclass(frozen=True, eq=False)
class BlockTable:
    """Where the KV blocks of a batch begin, somewhere in the memory of one tensor, whose own shape means nothing."""

    memory: torch.Tensor
    offsets: torch.Tensor
    """[sequences, pages] int64: bytes from the beginning of `memory` to the block of each page; -1: there is none."""


@dataclass(frozen=True, eq=False)
class Pages:
    """Keys or values of a batch: page j of a sequence holds its slots 64 j to 64 j + 63, all pages in the same way."""

    format: CacheFormat
    table: BlockTable
    codes: Plane
    """bf16; or u8, [head_dim] codes or [head_dim / 2] pairs of nibbles per token."""
    scale: Plane | None = None
    """fp16 [groups] per token, or [head_dim] per page."""
    zero: Plane | None = None
    """u8, of the same shape."""
    recent: "Pages | None" = field(default=None, kw_only=True)
    """Pages as they were computed. A query whose own slot is in one of these pages reads the page from here; so do all
    queries where `table` has no block of the page."""

    def widen(
        self, sequence: int, page: int, shape: tuple[int, int, int], own: bool, dtype: torch.dtype
    ) -> torch.Tensor:
        """Keys or values of a page as `dtype`, of `shape` [heads, tokens, head_dim].

        `own`: the query's own slot is in this page.
        """
        heads, tokens, width = shape
        memory, offset = self.table.memory, int(self.table.offsets[sequence, page])
        if self.recent is not None and (own or offset < 0) and int(self.recent.table.offsets[sequence, page]) >= 0:
            return self.recent.widen(sequence, page, shape, False, dtype)
        assert offset >= 0, f"sequence {sequence}: page {page} is missing"
        codes = self.codes.of(memory, offset, heads, tokens)
        if self.format is CacheFormat.BF16:
            return codes.to(dtype)
        group = math.gcd(width, PAGE_TOKENS)
        if self.format.bits == 4:
            halves = codes.unflatten(-1, (-1, group // 2))
            codes = torch.cat([halves & 15, halves >> 4], dim=-1).flatten(-2)
        assert self.scale is not None and self.zero is not None
        rows = 1 if self.format.per_channel else tokens
        scale, zero = self.scale.of(memory, offset, heads, rows), self.zero.of(memory, offset, heads, rows)
        if not self.format.per_channel:
            scale, zero = scale.repeat_interleave(group, -1), zero.repeat_interleave(group, -1)
        widened: torch.Tensor = (codes.to(dtype) - zero.to(dtype)) * scale.to(dtype)
        return widened


def contiguous_pages(states: torch.Tensor) -> Pages:
    """The pages of keys or values [sequences, heads, slots, head_dim] that lie in one piece."""
    if states.stride(-1) != 1:
        raise ConfigError("attention: keys and values must be contiguous along head_dim")
    sequences, _, slots, head_dim = states.shape
    pages = -(-slots // PAGE_TOKENS)
    starts = torch.arange(sequences)[:, None] * states.stride(0)
    offsets = (starts + torch.arange(pages) * (PAGE_TOKENS * states.stride(2))) * states.element_size()
    plane = Plane(states.dtype, head_dim, states.stride(1), states.stride(2))
    return Pages(CacheFormat.BF16, BlockTable(states, offsets), plane)


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention: queries of a batch, and what each may see."""

    query: torch.Tensor
    """[sequences, q_len, q_heads, head_dim], with any strides."""
    kv_heads: int
    keys: Pages
    values: Pages
    first: torch.Tensor
    """[sequences] int64. A sequence's keys are its slots first to count - 1: left padding comes before."""
    count: torch.Tensor
    """[sequences] int64. Query i is at slot count - q_len + i."""
    scaling: float
    causal: bool = True
    """A query sees no slot after its own."""
    window: int = 0
    """A query sees no slot that is so many or more before its own; 0: no such bound."""
    softcap: float = 0.0
    """Scores are capped to softcap * tanh(score / softcap); 0: they are not capped."""
    mask: torch.Tensor | None = None
    """bool or u8 [sequences or 1, q_len, slots], false where a query does not see a slot."""
    bias: torch.Tensor | None = None
    """float32 [sequences or 1, q_heads or 1, q_len or 1, slots], added to scores."""
    sinks: torch.Tensor | None = None
    """[q_heads]: scores of a key whose value is 0, which every query sees."""

    def __post_init__(self) -> None:
        sequences, q_len, q_heads, _ = self.query.shape
        if q_heads % self.kv_heads:
            raise ConfigError(f"attention: {q_heads} query heads do not share {self.kv_heads} key heads evenly")
        if self.first.shape != (sequences,) or self.count.shape != (sequences,):
            raise ConfigError(f"attention: first and count must be [{sequences}]")
        masked = self.mask is not None or self.bias is not None
        slots = int(self.count.max()) if masked and sequences else 0
        for name, tensor, expected in (
            ("mask", self.mask, (sequences, q_len, slots)),
            ("bias", self.bias, (sequences, q_heads, q_len, slots)),
        ):
            if tensor is None:
                continue
            fits = tensor.ndim == len(expected) and tensor.shape[-1] >= slots
            fits = fits and all(
                found in (1, wanted) for found, wanted in zip(tensor.shape, expected[:-1], strict=False)
            )
            if not fits:
                raise ConfigError(f"attention: {name} {list(tensor.shape)}, expected {list(expected)}")
        if self.sinks is not None and self.sinks.shape != (q_heads,):
            raise ConfigError(f"attention: sinks {list(self.sinks.shape)}, expected [{q_heads}]")
        if self.values.format.per_channel:
            raise ConfigError("attention: only keys are quantized per channel")


def attention_reference(call: AttentionCall, cancel: CancelFlag | None = None) -> torch.Tensor:
    """[sequences, q_len, q_heads, head_dim] in the query's dtype; 0 for queries that see no key.

    Computed in float32, or float64 for such queries. Scratch is a few pages and their scores, whatever the context.
    Raises InterruptedRun once `cancel` is set.
    """
    out = torch.zeros(call.query.shape, dtype=call.query.dtype)
    for sequence in range(call.query.shape[0]):
        for start, stop in _query_pieces(call, sequence):
            out[sequence, start:stop] = _attend(call, sequence, start, stop, cancel).to(out.dtype)
    return out


def _query_pieces(call: AttentionCall, sequence: int) -> Iterator[tuple[int, int]]:
    """Ranges of queries whose own slots are in one page: they read the same pages, and their scores take little."""
    q_len = call.query.shape[1]
    first = int(call.count[sequence]) - q_len
    start = 0
    while start < q_len:
        stop = min(q_len, start + PAGE_TOKENS - (first + start) % PAGE_TOKENS)
        yield start, stop
        start = stop


def _attend(call: AttentionCall, sequence: int, start: int, stop: int, cancel: CancelFlag | None) -> torch.Tensor:
    """[queries, q_heads, head_dim] of queries start..stop of a sequence, unrounded."""
    dtype = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    # [kv_heads, group * queries, head_dim]
    q = call.query[sequence, start:stop].to(dtype).unflatten(1, (call.kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    most = q.new_full((*q.shape[:2], 1), -math.inf)
    total, out = torch.zeros_like(most), torch.zeros_like(q)
    slot = int(call.count[sequence]) - call.query.shape[1] + start
    begin = int(call.first[sequence])
    if call.window:
        begin = max(begin, slot - call.window + 1)
    end = min(int(call.count[sequence]), slot + stop - start) if call.causal else int(call.count[sequence])
    for piece in range(begin // PAGE_TOKENS, -(-end // PAGE_TOKENS), _PIECE_PAGES):
        if cancel is not None:
            cancel.check()
        low, high = max(begin, piece * PAGE_TOKENS), min(end, (piece + _PIECE_PAGES) * PAGE_TOKENS)
        own = slot // PAGE_TOKENS
        keys = _gather(call.keys, call, sequence, piece, high, own, dtype)[:, low - piece * PAGE_TOKENS :]
        scores = _scores(call, q @ keys.mT, sequence, (start, stop), (low, high))
        raised = torch.maximum(most, scores.amax(-1, keepdim=True))
        safe = raised.masked_fill(raised == -math.inf, 0)
        weights, kept = torch.exp(scores - safe), torch.exp(most - safe)
        values = _gather(call.values, call, sequence, piece, high, own, dtype)[:, low - piece * PAGE_TOKENS :]
        most, total = raised, total * kept + weights.sum(-1, keepdim=True)
        out = out * kept + weights @ values
    if call.sinks is not None:
        sinks = call.sinks.to(dtype).view(call.kv_heads, -1, 1).repeat_interleave(stop - start, 1)
        total = torch.where(total == 0, 0, total + torch.exp(sinks - most))
    # Not "> 0": NaN stays NaN, instead of being taken for a query that sees no key.
    out = torch.where(total == 0, 0, out / total)
    heads_last: torch.Tensor = out.unflatten(1, (-1, stop - start)).permute(2, 0, 1, 3).flatten(1, 2)
    return heads_last


def _gather(
    pages: Pages, call: AttentionCall, sequence: int, piece: int, stop: int, own: int, dtype: torch.dtype
) -> torch.Tensor:
    """[kv_heads, tokens, head_dim] of the slots from page `piece` on, up to `stop`."""
    parts = []
    for page in range(piece, -(-stop // PAGE_TOKENS)):
        tokens = min(PAGE_TOKENS, stop - page * PAGE_TOKENS)
        shape = (call.kv_heads, tokens, call.query.shape[3])
        parts.append(pages.widen(sequence, page, shape, page == own, dtype))
    return torch.cat(parts, dim=1)


def _scores(
    call: AttentionCall, products: torch.Tensor, sequence: int, queries: tuple[int, int], slots: tuple[int, int]
) -> torch.Tensor:
    """[kv_heads, group * queries, slots]: products scaled, capped and biased; -inf where a slot is not seen."""
    (start, stop), (low, high) = queries, slots
    # [kv_heads, group, queries, slots]
    scores = (products * call.scaling).unflatten(1, (-1, stop - start))
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    own = torch.arange(start, stop)[:, None] + (int(call.count[sequence]) - call.query.shape[1])
    slot = torch.arange(low, high)
    seen = (slot <= own) if call.causal else torch.ones(stop - start, high - low, dtype=torch.bool)
    if call.window:
        seen = seen & (slot > own - call.window)
    if call.mask is not None:
        seen = seen & call.mask[sequence % call.mask.shape[0], start:stop, low:high].bool()
    if call.bias is not None:
        bias = call.bias[sequence % call.bias.shape[0], ..., low:high]
        bias = bias if bias.shape[1] == 1 else bias[:, start:stop]
        bias = bias if bias.shape[0] == 1 else bias.unflatten(0, (call.kv_heads, -1))
        scores, seen = scores + bias, seen & (bias >= INVISIBLE)
    hidden: torch.Tensor = scores.masked_fill(~seen, -math.inf).flatten(1, 2)
    return hidden
