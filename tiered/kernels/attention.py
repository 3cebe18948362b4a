"""Attention over a KV cache in pages: how a call is described.

In: queries, and where the keys and values of their sequences lie. Out: for each query, the weighted sum of the values
of the keys it sees. Called through `Kernels.attention`: the native kernel (`attention_native.py`) and plain torch, on
any device (`attention_torch.py`), take the same `AttentionCall`.
"""

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import torch

from tiered.errors import ConfigError
from tiered.units import PAGE_TOKENS as PAGE_TOKENS

INVISIBLE: Final = -1e30
"""A bias below this means "not seen": masks made of numbers hold the least number of their dtype there."""


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
        heads, tokens, _ = shape
        memory, offset = self.table.memory, int(self.table.offsets[sequence, page])
        if self.recent is not None and (own or offset < 0) and int(self.recent.table.offsets[sequence, page]) >= 0:
            return self.recent.widen(sequence, page, shape, False, dtype)
        assert offset >= 0, f"sequence {sequence}: page {page} is missing"
        codes = self.codes.of(memory, offset, heads, tokens)
        if self.scale is None or self.zero is None:
            return widen_codes(self.format, codes, None, None, dtype)
        rows = 1 if self.format.per_channel else tokens
        scale, zero = self.scale.of(memory, offset, heads, rows), self.zero.of(memory, offset, heads, rows)
        return widen_codes(self.format, codes, scale, zero, dtype)


def widen_codes(
    kind: CacheFormat,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Keys or values [.., tokens, head_dim] as `dtype`, of the planes of a page or, stacked, of several."""
    if kind is CacheFormat.BF16:
        return codes.to(dtype)
    assert scale is not None and zero is not None
    group = math.gcd(codes.shape[-1] * 8 // kind.bits, PAGE_TOKENS)
    if kind.bits == 4:
        halves = codes.unflatten(-1, (-1, group // 2))
        codes = torch.cat([halves & 15, halves >> 4], dim=-1).flatten(-2)
    numbers = codes.to(dtype)
    if kind.per_channel:
        return numbers.sub_(zero).mul_(scale)
    numbers.unflatten(-1, (-1, group)).sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
    return numbers


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
