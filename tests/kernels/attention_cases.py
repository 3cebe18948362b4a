"""Attention calls for tests: random caches in every format, in scattered pages, and what they come to in float64."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tiered.kernels import AttentionCall, BlockTable, CacheFormat, Kernels, Pages, Plane
from tiered.kernels.attention import PAGE_TOKENS
from tiered.units import round_up

TOLERANCE = 3e-3
"""Relative error, of which rounding to bf16 alone takes 1.7e-3."""


_GAP_NBYTES = 24


def scatter(kind: CacheFormat, parts: Sequence[torch.Tensor], generator: torch.Generator) -> Pages:
    """Pages of codes, and where they are quantized of scales and zeros, each [sequences, pages, heads, tokens, width]:
    blocks in any order, apart from each other, as their parts are, by numbers that would show."""
    planes, position = [], 0
    for part in parts:
        _, _, heads, tokens, width = part.shape
        start = round_up(position + _GAP_NBYTES, 8)
        planes.append(Plane(part.dtype, width, tokens * width, width, start))
        position = start + heads * tokens * width * part.dtype.itemsize
    sequences, pages = parts[0].shape[:2]
    count, nbytes = sequences * pages, round_up(position + _GAP_NBYTES, 8)
    # 0x7d7d is 2e37 as bf16, and 125 a code unlike most.
    memory = torch.full((count * nbytes,), 0x7D, dtype=torch.uint8)
    offsets = (torch.randperm(count, generator=generator) * nbytes).view(sequences, pages)
    for plane, part in zip(planes, parts, strict=True):
        for sequence, page in itertools.product(range(sequences), range(pages)):
            target = plane.of(memory, int(offsets[sequence, page]), *part.shape[2:4])
            target.copy_(part[sequence, page])
    return Pages(kind, BlockTable(memory, offsets), *planes)


def random_pages(
    kind: CacheFormat, sequences: int, heads: int, slots: int, head_dim: int, generator: torch.Generator
) -> Pages:
    """A cache of random numbers of about 1."""
    lead = (sequences, -(-slots // PAGE_TOKENS), heads)
    if kind is CacheFormat.BF16:
        return scatter(kind, [torch.randn(*lead, PAGE_TOKENS, head_dim, generator=generator).bfloat16()], generator)
    width = head_dim * kind.bits // 8
    codes = torch.randint(0, 256, (*lead, PAGE_TOKENS, width), generator=generator, dtype=torch.uint8)
    groups = head_dim // math.gcd(head_dim, PAGE_TOKENS)
    side = (*lead, 1, head_dim) if kind.per_channel else (*lead, PAGE_TOKENS, groups)
    middle = 2**kind.bits // 2
    scale = (0.5 + torch.rand(side, generator=generator)) * 1.7 / middle
    zero = middle + torch.randint(-middle // 4, middle // 4 + 1, side, generator=generator)
    return scatter(kind, [codes, scale.half(), zero.to(torch.uint8)], generator)


def without(pages: Pages, page: int) -> Pages:
    """`pages`, of which every sequence lacks one."""
    offsets = pages.table.offsets.clone()
    offsets[:, page] = -1
    return replace(pages, table=replace(pages.table, offsets=offsets))


@dataclass(frozen=True)
class Shape:
    sequences: int
    q_len: int
    q_heads: int
    kv_heads: int
    slots: int
    head_dim: int


def random_call(
    shape: Shape,
    keys: CacheFormat = CacheFormat.BF16,
    values: CacheFormat = CacheFormat.BF16,
    seed: int = 0,
    **more: Any,
) -> AttentionCall:
    """Queries at the end of caches of `shape.slots` slots, or as `more` says."""
    generator = torch.Generator().manual_seed(seed)
    s = shape
    # Not contiguous, as transformers hands them over.
    query = torch.randn(s.sequences, s.q_heads, s.q_len, s.head_dim, generator=generator).bfloat16().transpose(1, 2)
    fields: dict[str, Any] = {
        "first": torch.zeros(s.sequences, dtype=torch.int64),
        "count": torch.full((s.sequences,), s.slots),
        "scaling": s.head_dim**-0.5,
    }
    return AttentionCall(
        query=query,
        kv_heads=s.kv_heads,
        keys=random_pages(keys, s.sequences, s.kv_heads, s.slots, s.head_dim, generator),
        values=random_pages(values, s.sequences, s.kv_heads, s.slots, s.head_dim, generator),
        **(fields | more),
    )


def rows_of(call: AttentionCall, start: int, stop: int) -> AttentionCall:
    """The queries start..stop of a call whose sequences have all their queries at the same slots."""
    left = call.query.shape[1] - stop
    return replace(
        call,
        query=call.query[:, start:stop],
        count=call.count if not call.causal else call.count - left,
        mask=None if call.mask is None else call.mask[:, start:stop],
    )


def dense(pages: Pages, sequence: int, slots: int, heads: int, head_dim: int) -> torch.Tensor:
    """[heads, slots, head_dim] in float64."""
    parts = [
        pages.widen(
            sequence, start // PAGE_TOKENS, (heads, min(PAGE_TOKENS, slots - start), head_dim), False, torch.float64
        )
        for start in range(0, slots, PAGE_TOKENS)
    ]
    return torch.cat(parts, dim=1)


def truth(call: AttentionCall) -> torch.Tensor:
    """The result in float64, by softmax over whole rows of scores."""
    sequences, q_len, q_heads, head_dim = call.query.shape
    out = torch.zeros(call.query.shape, dtype=torch.float64)
    group = q_heads // call.kv_heads
    for s in range(sequences):
        slots = int(call.count[s])
        k = dense(call.keys, s, slots, call.kv_heads, head_dim).repeat_interleave(group, 0)
        v = dense(call.values, s, slots, call.kv_heads, head_dim).repeat_interleave(group, 0)
        scores = call.query[s].double().transpose(0, 1) @ k.mT * call.scaling  # [q_heads, q_len, slots]
        if call.softcap:
            scores = torch.tanh(scores / call.softcap) * call.softcap
        own, slot = torch.arange(slots - q_len, slots)[:, None], torch.arange(slots)
        seen = slot >= call.first[s]  # [q_len, slots] by broadcasting
        if call.causal:
            seen = seen & (slot <= own)
        if call.window:
            seen = seen & (slot > own - call.window)
        if call.mask is not None:
            seen = seen & call.mask[s % len(call.mask), :, :slots].bool()
        scores = scores.masked_fill(~seen, -math.inf)
        if call.bias is not None:
            bias = call.bias.double().expand(sequences, q_heads, q_len, -1)[s, :, :, :slots]
            scores = scores + bias.masked_fill(bias < -1e30, -math.inf)
        if call.sinks is not None:
            scores = torch.cat([scores, call.sinks.double().view(-1, 1, 1).expand(-1, q_len, 1)], dim=-1)
        none = (scores[..., :slots] == -math.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(none, 0), dim=-1)[..., :slots].masked_fill(none, 0)
        out[s] = (weights @ v).transpose(0, 1)
    return out


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def attend(name: str, call: AttentionCall, threads: int = 2) -> torch.Tensor:
    with Kernels(threads, name=name) as kernels:
        return kernels.attention(call)
