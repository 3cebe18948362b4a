"""Attention of prompts by torch's fused kernels (`scaled_dot_product_attention`), over what the pages hold.

A few heads at a time have all their keys and values gathered in one piece, in the queries' own dtype, and the kernel
takes as many queries as there are, or as a mask for them has room for. It adds in an order of its own, which depends on
how many queries and keys there are: only `Mode.FAST` uses it. What it does not express (windows, caps, sinks, masks and
biases), `attention_torch.py` computes.
"""

from collections.abc import Iterator
from typing import Final

import torch
from torch.nn import functional

from tiered.kernels.attention import PAGE_TOKENS, AttentionCall
from tiered.kernels.attention_pages import PageSource, Tile
from tiered.kernels.attention_torch import piece_nbytes
from tiered.kernels.cancel import CancelFlag

_MOST_HEAD_DIM: Final = 256
_HEAD_DIM_UNIT: Final = 8
"""Other heads have no fused kernel on CUDA devices, and torch would hold all scores in memory."""
_MASK_NBYTES: Final = 5
"""Of a query and a key: a boolean, and what is added to the score."""
_NOBODYS: Final = -PAGE_TOKENS
"""The slot of queries that have no page of their own."""


def serves_fused(call: AttentionCall) -> bool:
    """Whether `attention_fused` computes this call: several causal queries of each sequence, and nothing but that."""
    _, q_len, _, head_dim = call.query.shape
    if q_len <= 1 or not len(call.count):
        return False
    most, least = int(call.count.max()), int(call.count.min())
    is_plain = not call.softcap and call.mask is None and call.bias is None and call.sinks is None
    sees_all = call.causal and (not call.window or most <= call.window) and int(call.first.max()) <= least - q_len
    has_kernel = call.query.device.type != "cuda" or (head_dim <= _MOST_HEAD_DIM and not head_dim % _HEAD_DIM_UNIT)
    return is_plain and sees_all and has_kernel and _heads_at_once(call, most) > 0


def attention_fused(call: AttentionCall, cancel: CancelFlag | None = None) -> torch.Tensor:
    """[sequences, q_len, q_heads, head_dim] in the query's dtype. Scratch is bounded as that of `attention_reference`.
    Raises InterruptedRun once `cancel` is set."""
    out = torch.empty(call.query.shape, dtype=call.query.dtype, device=call.query.device)
    at_once = _heads_at_once(call, int(call.count.max()))
    for first in range(0, call.kv_heads, at_once):
        heads = range(first, min(call.kv_heads, first + at_once))
        for sequence in range(len(call.query)):
            if cancel is not None:
                cancel.check()
            _Heads(call, sequence, heads).attend(out[sequence])
    return out


def _heads_at_once(call: AttentionCall, slots: int) -> int:
    """How many heads of keys have room at a time, with the queries that share them; 0: not even one."""
    _, q_len, q_heads, head_dim = call.query.shape
    width = head_dim * call.query.dtype.itemsize
    slots = -(-slots // PAGE_TOKENS) * PAGE_TOKENS
    return piece_nbytes(call.query.device) // (max(slots, q_len * q_heads // call.kv_heads) * width)


class _Heads:
    """Keys and values of some heads of a sequence, and the queries that share them."""

    def __init__(self, call: AttentionCall, sequence: int, heads: range) -> None:
        _, q_len, q_heads, head_dim = call.query.shape
        self._scaling, self._heads, self._group = call.scaling, heads, q_heads // call.kv_heads
        self._sequence, self._q_len = sequence, q_len
        self._first, self._count = int(call.first[sequence]), int(call.count[sequence])
        self._pages = range(self._first // PAGE_TOKENS, -(-self._count // PAGE_TOKENS))
        self._sources = [
            PageSource(pages, len(heads), head_dim, call.query.dtype, heads.start) for pages in (call.keys, call.values)
        ]
        self._keys, self._values = (self._gather(source, _NOBODYS, self._pages) for source in self._sources)
        # [kv_heads, group, queries, head_dim]
        self._queries = self._of_heads(call.query[sequence])
        self._is_paged = call.keys.recent is not None or call.values.recent is not None
        """Whether queries read their own page otherwise than those of later pages."""

    def attend(self, out: torch.Tensor) -> None:
        """Write results to `out` [queries, q_heads, head_dim]."""
        out = self._of_heads(out)
        for start, stop in self._pieces():
            if not self._is_paged:
                out[:, :, start:stop] = self._attend(start, stop)
                continue
            slot = self._slot(start)
            page = slot // PAGE_TOKENS
            own = slice((page - self._pages.start) * PAGE_TOKENS, (page - self._pages.start + 1) * PAGE_TOKENS)
            for states, source in zip((self._keys, self._values), self._sources, strict=True):
                states[:, own] = self._gather(source, slot, range(page, page + 1))
            out[:, :, start:stop] = self._attend(start, stop)
            for states, source in zip((self._keys, self._values), self._sources, strict=True):
                states[:, own] = self._gather(source, _NOBODYS, range(page, page + 1))

    def _attend(self, start: int, stop: int) -> torch.Tensor:
        """[kv_heads, group, stop - start, head_dim] of queries start..stop."""
        base, end = self._pages.start * PAGE_TOKENS, self._slot(stop)
        seen = slice(self._first - base, end - base)
        keys, values = (states[:, None, seen].expand(-1, self._group, -1, -1) for states in (self._keys, self._values))
        mask = None
        if self._slot(start) > self._first:
            own = torch.arange(self._slot(start), end, device=keys.device)
            mask = torch.arange(self._first, end, device=keys.device) <= own[:, None]
        queries = self._queries[:, :, start:stop]
        return functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=self._scaling
        )

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Queries that are computed together: those of a page where each page has its own, as many as a mask has room
        for where there is one, and else all."""
        start = 0
        if not self._is_paged and self._slot(0) == self._first:
            yield 0, self._q_len
            return
        most = max(1, piece_nbytes(self._keys.device) // (_MASK_NBYTES * (self._count - self._first)))
        while start < self._q_len:
            left = PAGE_TOKENS - self._slot(start) % PAGE_TOKENS if self._is_paged else self._q_len
            stop = min(self._q_len, start + most, start + left)
            yield start, stop
            start = stop

    def _slot(self, query: int) -> int:
        return self._count - self._q_len + query

    def _gather(self, source: PageSource, slot: int, pages: range) -> torch.Tensor:
        """[kv_heads, slots, head_dim] of `pages` for queries at `slot`."""
        tile = Tile(self._sequence, 0, self._q_len, slot, self._first, self._count)
        return source.gather([tile], pages.start, pages.stop)[0]

    def _of_heads(self, rows: torch.Tensor) -> torch.Tensor:
        """What of `rows` [queries, q_heads, head_dim] belongs to these heads: [kv_heads, group, queries, head_dim]."""
        of_all: torch.Tensor = rows.unflatten(1, (-1, self._group))
        return of_all[:, self._heads.start : self._heads.stop].permute(1, 2, 0, 3)
