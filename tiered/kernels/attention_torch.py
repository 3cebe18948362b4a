"""Attention over pages in plain torch, on the device where the pages lie.

Computes what the native kernel does not take, and everything on a device. Queries go tile by tile, their keys piece by
piece; a piece's pages are gathered at once, and its share of the softmax is added to those before it. Offsets of pages
are looked at on the host alone, so nothing waits for a device.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional

from tiered.kernels.attention import INVISIBLE, PAGE_TOKENS, AttentionCall
from tiered.kernels.attention_pages import PageSource, Tile, sent
from tiered.kernels.cancel import CancelFlag

_FIXED_QUERIES: Final = 32
"""Queries of a tile of fixed shape: few rows are wasted on one query, and a prompt still takes few tiles."""
_PIECE_PAGES: Final = 16
_PIECE_NBYTES: Final = 8 << 20
"""Of widened keys, or of scores, at a time: at most, unless one page of one tile takes more."""
_PIECES_AT_ONCE: Final = 7
"""Temporaries of that size that are alive together: three while keys or values are put together, four of scores."""


def attention_nbytes() -> int:
    """An upper bound on what `attention_reference` allocates besides its result; masks and biases not counted."""
    return _PIECE_NBYTES * _PIECES_AT_ONCE


def attention_reference(
    call: AttentionCall, cancel: CancelFlag | None = None, *, fixed: bool = False, batch: bool = False
) -> torch.Tensor:
    """[sequences, q_len, q_heads, head_dim] in the query's dtype; 0 for queries that see no key.

    Computed in float32, or float64 for such queries. Scratch is bounded, whatever the context. With `fixed` all
    products have one shape, and a query's place in them follows from its slot: its result is the same bits whatever
    else is asked for in the call, and however a prompt is cut. With `batch` tiles of several sequences are computed
    together as far as memory allows. Raises InterruptedRun once `cancel` is set.
    """
    out = torch.zeros(call.query.shape, dtype=call.query.dtype, device=call.query.device)
    attention = _Attention(call, fixed, cancel)
    for tiles in _together(list(_tiles(call, attention.tile_queries)), attention.tiles_at_once if batch else 1):
        attention.attend(tiles, out)
    return out


def _tiles(call: AttentionCall, queries: int) -> Iterator[Tile]:
    q_len = call.query.shape[1]
    for sequence, (first, count) in enumerate(zip(call.first.tolist(), call.count.tolist(), strict=True)):
        start = 0
        while start < q_len:
            slot = count - q_len + start
            stop = min(q_len, start + queries - slot % queries)
            seen = max(first, slot - call.window + 1) if call.window else first
            yield Tile(sequence, start, stop, slot, seen, min(count, slot + stop - start) if call.causal else count)
            start = stop


def _together(tiles: Sequence[Tile], most: int) -> Iterator[Sequence[Tile]]:
    """Runs of at most so many tiles."""
    for start in range(0, len(tiles), most):
        yield tiles[start : start + most]


class _Attention:
    """One call: what is the same for all its tiles."""

    def __init__(self, call: AttentionCall, fixed: bool, cancel: CancelFlag | None) -> None:
        self._call, self._fixed, self._cancel = call, fixed, cancel
        self._dtype = torch.float64 if call.query.dtype == torch.float64 else torch.float32
        _, q_len, q_heads, head_dim = call.query.shape
        self.tile_queries = _FIXED_QUERIES if fixed else 1 if q_len == 1 else PAGE_TOKENS
        row_nbytes = max(call.kv_heads * head_dim, q_heads * self.tile_queries) * self._dtype.itemsize
        self._pages = min(_PIECE_PAGES, max(1, _PIECE_NBYTES // (row_nbytes * PAGE_TOKENS)))
        """Pages of a piece."""
        longest = -(-int(call.count.max()) // PAGE_TOKENS) if len(call.count) else 0
        used = max(1, min(self._pages, longest))
        self.tiles_at_once = max(1, _PIECE_NBYTES // (row_nbytes * PAGE_TOKENS * used))
        self._keys, self._values = (
            PageSource(pages, call.kv_heads, head_dim, self._dtype) for pages in (call.keys, call.values)
        )

    def attend(self, tiles: Sequence[Tile], out: torch.Tensor) -> None:
        """Write the results of `tiles` to `out`."""
        call = self._call
        rows = _Rows.of(call, tiles, self.tile_queries if self._fixed else 0)
        # [tiles * kv_heads, group * queries, head_dim]
        q = call.query[rows.sequence[:, None], rows.query].to(self._dtype)
        q = q.unflatten(2, (call.kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)
        most = q.new_full((*q.shape[:2], 1), -math.inf)
        total, summed = torch.zeros_like(most), torch.zeros_like(q)
        for start, stop in self._pieces(tiles):
            if self._cancel is not None:
                self._cancel.check()
            slot = torch.arange(start * PAGE_TOKENS, stop * PAGE_TOKENS, device=q.device)
            products = q @ self._keys.gather(tiles, start, stop).mT
            scores = _scores(call, products, rows, (start * PAGE_TOKENS, stop * PAGE_TOKENS), slot)
            raised = torch.maximum(most, scores.amax(-1, keepdim=True))
            safe = raised.masked_fill(raised == -math.inf, 0)
            weights, kept = scores.sub_(safe).exp_(), torch.exp(most - safe)
            most, total = raised, (total * kept).add_(weights.sum(-1, keepdim=True))
            values = self._values.gather(tiles, start, stop)
            # What nobody sees may be anything, and 0 times NaN is NaN.
            unseen = (slot < rows.first[:, None]) | (slot >= rows.end[:, None])
            values.unflatten(0, (len(tiles), -1)).masked_fill_(unseen[:, None, :, None], 0)
            summed = (summed * kept).add_(weights @ values)
        if call.sinks is not None:
            sinks = call.sinks.to(self._dtype).view(call.kv_heads, -1, 1).repeat_interleave(len(rows.query[0]), 1)
            total = torch.where(total == 0, 0, total + torch.exp(sinks.repeat(len(tiles), 1, 1) - most))
        # Not "> 0": NaN stays NaN, instead of being taken for a query that sees no key.
        summed = torch.where(total == 0, 0, summed / total)
        # [tiles, queries, q_heads, head_dim]
        found = summed.unflatten(0, (len(tiles), -1)).unflatten(2, (-1, len(rows.query[0])))
        rows.put(found.permute(0, 3, 1, 2, 4).flatten(2, 3), out)

    def _pieces(self, tiles: Sequence[Tile]) -> Iterator[tuple[int, int]]:
        """Ranges of pages; of fixed shape they are the same whatever the tiles' first slots."""
        seen = [tile for tile in tiles if tile.first < tile.end]
        if not seen:
            return
        first = min(tile.first for tile in seen) // PAGE_TOKENS
        end = max(-(-tile.end // PAGE_TOKENS) for tile in seen)
        for start in range(first // self._pages * self._pages if self._fixed else first, end, self._pages):
            yield start, start + self._pages if self._fixed else min(end, start + self._pages)


@dataclass(frozen=True, eq=False)
class _Rows:
    """The queries of some tiles as rows of equally many, numbers of the call at the device; some rows may be nobody's.

    In tiles of fixed shape a query is in the row of its slot.
    """

    tiles: Sequence[Tile]
    before: Sequence[int]
    """Rows of each tile before its first query."""
    sequence: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor
    low: torch.Tensor
    """[tiles]: the sequences' own `first`, and `count`."""
    count: torch.Tensor
    own: torch.Tensor
    """[tiles, rows]: the slot of each query."""
    query: torch.Tensor
    """[tiles, rows]: its number in the call."""

    @classmethod
    def of(cls, call: AttentionCall, tiles: Sequence[Tile], fixed: int) -> "_Rows":
        q_len, device = call.query.shape[1], call.query.device
        before = [tile.slot % fixed if fixed else 0 for tile in tiles]
        length = fixed or max(tile.stop - tile.start for tile in tiles)
        low, count = call.first.tolist(), call.count.tolist()
        numbers = [
            (t.sequence, t.first, t.end, low[t.sequence], count[t.sequence], t.slot - skipped)
            for t, skipped in zip(tiles, before, strict=True)
        ]
        sequence, first, end, lows, counts, begin = sent(numbers, device).T.contiguous()
        own = begin[:, None] + torch.arange(length, device=device)
        query = (own - (counts[:, None] - q_len)).clamp_(0, q_len - 1)
        return cls(tiles, before, sequence, first, end, lows, counts, own, query)

    def put(self, found: torch.Tensor, out: torch.Tensor) -> None:
        """Write results [tiles, rows, q_heads, head_dim] of the queries to `out`."""
        found = found.to(out.dtype)
        if len(self.tiles) > 1 and out.shape[1] == 1:
            out[self.sequence] = found
            return
        for tile, rows, skipped in zip(self.tiles, found, self.before, strict=True):
            out[tile.sequence, tile.start : tile.stop] = rows[skipped : skipped + tile.stop - tile.start]


def _scores(
    call: AttentionCall, products: torch.Tensor, rows: _Rows, slots: tuple[int, int], slot: torch.Tensor
) -> torch.Tensor:
    """[tiles * kv_heads, group * queries, slots]: products scaled, capped and biased; -inf where a slot is not seen."""
    tiles, length = rows.own.shape
    # [tiles, kv_heads, group, queries, slots]
    scores = products.mul_(call.scaling).unflatten(0, (tiles, -1)).unflatten(2, (-1, length))
    if call.softcap:
        scores.div_(call.softcap).tanh_().mul_(call.softcap)
    own = rows.own[..., None]
    # [tiles, queries, slots]
    seen = (slot >= rows.low[:, None, None]) & (slot < rows.count[:, None, None])
    if call.causal:
        seen = seen & (slot <= own)
    if call.window:
        seen = seen & (slot > own - call.window)
    if call.mask is not None:
        mask = call.mask[(rows.sequence % len(call.mask))[:, None], rows.query, slots[0] : slots[1]].bool()
        seen = seen & functional.pad(mask, (0, len(slot) - mask.shape[-1]))
    seen = seen[:, None, None]
    if call.bias is not None:
        query = rows.query % call.bias.shape[2]
        bias = call.bias[(rows.sequence % len(call.bias))[:, None], :, query, slots[0] : slots[1]]
        # [tiles, 1 or kv_heads, 1 or group, queries, slots]
        bias = functional.pad(bias, (0, len(slot) - bias.shape[-1])).transpose(1, 2)
        bias = bias[:, None] if bias.shape[1] == 1 else bias.unflatten(1, (call.kv_heads, -1))
        scores, seen = scores.add_(bias), seen & (bias >= INVISIBLE)
    hidden: torch.Tensor = scores.masked_fill_(~seen, -math.inf)
    return hidden.flatten(2, 3).flatten(0, 1)
