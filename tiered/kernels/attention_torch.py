"""Attention over pages in plain torch, on the device where the pages lie.

Computes what the native kernel does not take, and everything on a device. Queries go tile by tile, their keys piece by
piece; a piece's pages are gathered at once, and its share of the softmax is added to those before it. Offsets of pages
are looked at on the host alone, so nothing waits for a device.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
_HOST_PIECE_NBYTES: Final = 2 << 20
"""The same on the processor, where it stays in the caches."""
_PIECES_AT_ONCE: Final = 7
"""Temporaries of that size that are alive together: three while keys or values are put together, four of scores."""


def attention_nbytes(where: torch.device) -> int:
    """An upper bound on what `attention_reference` allocates besides its result; masks and biases not counted."""
    return piece_nbytes(where) * _PIECES_AT_ONCE


def attention_reference(call: AttentionCall, cancel: CancelFlag | None = None, *, fixed: bool = False) -> torch.Tensor:
    """[sequences, q_len, q_heads, head_dim] in the query's dtype; 0 for queries that see no key.

    Computed in float32, or float64 for such queries. Scratch is bounded, whatever the context. With `fixed` all
    products have one shape, and a query's place in them follows from its slot: its result is the same bits whatever
    else is asked for in the call, and however a prompt is cut. Raises InterruptedRun once `cancel` is set.
    """
    out = torch.zeros(call.query.shape, dtype=call.query.dtype, device=call.query.device)
    attention = _Attention(call, fixed, cancel)
    for tiles in attention.batches():
        attention.attend(tiles, out)
    return out


class _Attention:
    """One call: what is the same for all its tiles.

    Tiles are computed several at a time: those of one sequence with the same keys and values, or one query each of
    several sequences. Of fixed shape, they share only what is computed number by number, and have products and sums of
    their own.
    """

    def __init__(self, call: AttentionCall, fixed: bool, cancel: CancelFlag | None) -> None:
        self._call, self._fixed, self._cancel = call, fixed, cancel
        self._dtype = torch.float64 if call.query.dtype == torch.float64 else torch.float32
        _, q_len, q_heads, head_dim = call.query.shape
        self._is_decoding = q_len == 1
        self._tile = _FIXED_QUERIES if fixed else 1 if self._is_decoding else PAGE_TOKENS
        keys_nbytes = call.kv_heads * head_dim * PAGE_TOKENS * self._dtype.itemsize
        scores_nbytes = q_heads * self._tile * PAGE_TOKENS * self._dtype.itemsize
        page_nbytes = max(keys_nbytes, scores_nbytes)
        piece = piece_nbytes(call.query.device)
        self._pages = min(_PIECE_PAGES, max(1, piece // page_nbytes))
        """Pages of a piece."""
        longest = -(-int(call.count.max()) // PAGE_TOKENS) if len(call.count) else 0
        pages = self._pages if fixed else max(1, min(self._pages, longest))
        tile_nbytes = page_nbytes if self._is_decoding else scores_nbytes
        self._tiles_at_once = max(1, piece // (tile_nbytes * pages))
        self._keys = PageSource(call.keys, call.kv_heads, head_dim, self._dtype)
        self._values = PageSource(call.values, call.kv_heads, head_dim, self._dtype)

    def batches(self) -> Iterator[Sequence[Tile]]:
        """Tiles that are computed together."""
        tiles = [tile for sequence in range(len(self._call.query)) for tile in self._tiles(sequence)]
        for _, group in itertools.groupby(tiles, key=lambda tile: self._is_decoding or tile.sequence):
            run = list(group)
            for start in range(0, len(run), self._tiles_at_once):
                yield run[start : start + self._tiles_at_once]

    def attend(self, tiles: Sequence[Tile], out: torch.Tensor) -> None:
        """Write the results of `tiles` to `out`."""
        call = self._call
        rows = _Rows.of(call, tiles, self._tile if self._fixed else 0)
        # [tiles, kv_heads, group * queries, head_dim]
        q = call.query[rows.sequence[:, None], rows.query].to(self._dtype).mul_(call.scaling)
        q = q.unflatten(2, (call.kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        most = q.new_full((*q.shape[:3], 1), -math.inf)
        total, summed = torch.zeros_like(most), torch.zeros_like(q)
        for start, stop in self._pieces(tiles):
            if self._cancel is not None:
                self._cancel.check()
            scores = self._product(q, self._keys, tiles, start, stop)
            if call.softcap:
                scores.div_(call.softcap).tanh_().mul_(call.softcap)
            if not self._sees_all(tiles, start, stop):
                _hide(call, scores, rows, start * PAGE_TOKENS, stop * PAGE_TOKENS)
            raised = torch.maximum(most, scores.amax(-1, keepdim=True))
            safe = raised.masked_fill(raised == -math.inf, 0)
            weights, kept = scores.sub_(safe).exp_(), torch.exp(most - safe)
            most, total = raised, (total * kept).add_(self._sums(weights))
            summed = (summed * kept).add_(self._product(weights, self._values, tiles, start, stop))
        queries = rows.query.shape[1]
        if call.sinks is not None:
            sinks = call.sinks.to(self._dtype).view(call.kv_heads, -1, 1).repeat_interleave(queries, 1)
            total = torch.where(total == 0, 0, total + torch.exp(sinks - most))
        # Not "> 0": NaN stays NaN, instead of being taken for a query that sees no key.
        summed = torch.where(total == 0, 0, summed / total)
        # [tiles, queries, q_heads, head_dim]
        rows.put(summed.unflatten(2, (-1, queries)).permute(0, 3, 1, 2, 4).flatten(2, 3), out)

    def _tiles(self, sequence: int) -> Iterator[Tile]:
        call, q_len = self._call, self._call.query.shape[1]
        first, count, start = int(call.first[sequence]), int(call.count[sequence]), 0
        while start < q_len:
            slot = count - q_len + start
            stop = min(q_len, start + self._tile - slot % self._tile)
            seen = max(first, slot - call.window + 1) if call.window else first
            yield Tile(sequence, start, stop, slot, seen, min(count, slot + stop - start) if call.causal else count)
            start = stop

    def _pieces(self, tiles: Sequence[Tile]) -> Iterator[tuple[int, int]]:
        """Ranges of pages; of fixed shape they are the same whatever the tiles' first slots."""
        seen = [tile for tile in tiles if tile.first < tile.end]
        if not seen:
            return
        first = min(tile.first for tile in seen) // PAGE_TOKENS
        end = max(-(-tile.end // PAGE_TOKENS) for tile in seen)
        for start in range(first // self._pages * self._pages if self._fixed else first, end, self._pages):
            yield start, start + self._pages if self._fixed else min(end, start + self._pages)

    def _sees_all(self, tiles: Sequence[Tile], start: int, stop: int) -> bool:
        """Whether every query sees every slot of these pages."""
        call = self._call
        if call.mask is not None or call.bias is not None or call.window:
            return False
        last = stop * PAGE_TOKENS - 1
        return all(
            tile.first <= start * PAGE_TOKENS and last <= (tile.slot if call.causal else tile.end - 1) for tile in tiles
        )

    def _product(
        self, factor: torch.Tensor, source: PageSource, tiles: Sequence[Tile], start: int, stop: int
    ) -> torch.Tensor:
        """`factor` [tiles, kv_heads, rows, ..] times the pages' keys, transposed, or values."""
        is_keys = source is self._keys
        states = None
        if self._is_decoding:
            states = source.gather(tiles, start, stop, clean=not is_keys)
            if not self._fixed:
                return factor @ (states.mT if is_keys else states)
        elif not source.differs(tiles, start, stop):
            # Sequence by sequence, all see the same.
            first, end = min(tile.first for tile in tiles), max(tile.end for tile in tiles)
            states = source.gather([replace(tiles[0], first=first, end=end)], start, stop, clean=not is_keys)
            states = states.expand(len(tiles), -1, -1, -1)
        width = (stop - start) * PAGE_TOKENS if is_keys else self._call.query.shape[3]
        out = factor.new_empty((*factor.shape[:3], width))
        for number, tile in enumerate(tiles):
            if states is None:
                of_tile = source.gather([tile], start, stop, clean=not is_keys)[0]
            else:
                of_tile = states[number]
            torch.bmm(factor[number], of_tile.mT if is_keys else of_tile, out=out[number])
        return out

    def _sums(self, weights: torch.Tensor) -> torch.Tensor:
        """[tiles, kv_heads, rows, 1]: sums over slots."""
        if not self._fixed:
            return weights.sum(-1, keepdim=True)
        out = weights.new_empty((*weights.shape[:3], 1))
        for number, of_tile in enumerate(weights):
            torch.sum(of_tile, -1, keepdim=True, out=out[number])
        return out


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
    count: torch.Tensor
    """[tiles]: of the sequence, as in the call."""
    own: torch.Tensor
    """[tiles, rows]: the slot of each query."""
    query: torch.Tensor
    """[tiles, rows]: its number in the call."""

    @classmethod
    def of(cls, call: AttentionCall, tiles: Sequence[Tile], fixed: int) -> "_Rows":
        q_len, device = call.query.shape[1], call.query.device
        before = [tile.slot % fixed if fixed else 0 for tile in tiles]
        length = fixed or max(tile.stop - tile.start for tile in tiles)
        first, count = call.first.tolist(), call.count.tolist()
        numbers = [
            (tile.sequence, first[tile.sequence], count[tile.sequence], tile.slot - skipped)
            for tile, skipped in zip(tiles, before, strict=True)
        ]
        sequence, firsts, counts, begin = sent(numbers, device).T.contiguous()
        own = begin[:, None] + torch.arange(length, device=device)
        query = (own - (counts[:, None] - q_len)).clamp_(0, q_len - 1)
        return cls(tiles, before, sequence, firsts, counts, own, query)

    def put(self, found: torch.Tensor, out: torch.Tensor) -> None:
        """Write results [tiles, rows, q_heads, head_dim] of the queries to `out`."""
        found = found.to(out.dtype)
        if len(self.tiles) > 1 and out.shape[1] == 1:
            rows = sent(self.before, out.device)
            out[self.sequence, 0] = found[torch.arange(len(rows), device=out.device), rows]
            return
        for tile, of_tile, skipped in zip(self.tiles, found, self.before, strict=True):
            out[tile.sequence, tile.start : tile.stop] = of_tile[skipped : skipped + tile.stop - tile.start]


def _hide(call: AttentionCall, scores: torch.Tensor, rows: _Rows, low: int, high: int) -> None:
    """Add biases to scores [tiles, kv_heads, group * queries, slots] of slots low..high; -inf where one is not seen."""
    slot, own = torch.arange(low, high, device=scores.device), rows.own[..., None]
    # [tiles, queries, slots]
    seen = (slot >= rows.first[:, None, None]) & (slot < rows.count[:, None, None])
    if call.causal:
        seen = seen & (slot <= own)
    if call.window:
        seen = seen & (slot > own - call.window)
    if call.mask is not None:
        mask = call.mask[(rows.sequence % len(call.mask))[:, None], rows.query, low:high].bool()
        seen = seen & functional.pad(mask, (0, len(slot) - mask.shape[-1]))
    # [tiles, kv_heads, group, queries, slots]
    seen, by_query = seen[:, None, None], scores.unflatten(2, (-1, rows.query.shape[1]))
    if call.bias is not None:
        query = rows.query % call.bias.shape[2]
        bias = call.bias[(rows.sequence % len(call.bias))[:, None], :, query, low:high]
        bias = functional.pad(bias, (0, len(slot) - bias.shape[-1])).transpose(1, 2)
        bias = bias[:, None] if bias.shape[1] == 1 else bias.unflatten(1, (call.kv_heads, -1))
        by_query.add_(bias)
        seen = seen & (bias >= INVISIBLE)
    by_query.masked_fill_(~seen, -math.inf)


def piece_nbytes(where: torch.device) -> int:
    """Bytes of widened keys, or of scores, that are computed with at a time."""
    return _HOST_PIECE_NBYTES if where.type == "cpu" else _PIECE_NBYTES
