"""An `AttentionCall` as the native kernel takes it: tk_attention_args of tiered_kernels.h. Called by `kernels.py`."""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import replace
from typing import Final

import torch

from tiered.kernels.attention import AttentionCall, BlockTable, CacheFormat, Pages, Plane
from tiered.kernels.library import Level

MOST_HEAD_DIM: Final = 576
HEAD_DIM_MULTIPLE: Final = 8
_SHARED_HEADS: Final = 16
"""Heads of an item of work that share every key: more save little, and are fewer items."""
_LEAST_HEADS: Final = 4
"""Fewer read the keys more often than they save time."""


class _Table(ctypes.Structure):
    _fields_ = (("base", c_void_p), ("offsets", c_void_p))


class _Plane(ctypes.Structure):
    _fields_ = (("start", c_int64), ("head_stride", c_int64), ("token_stride", c_int64))


class _Pages(ctypes.Structure):
    _fields_ = (
        ("format", c_int32),
        ("blocks", _Table),
        ("codes", _Plane),
        ("scale", _Plane),
        ("zero", _Plane),
        ("recent", _Table),
        ("exact", _Plane),
    )


class AttentionArguments(ctypes.Structure):
    """tk_attention_args."""

    _fields_ = (
        ("sequences", c_int64),
        ("q_len", c_int64),
        ("q_heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("q", c_void_p),
        ("q_stride", c_int64 * 3),
        ("out", c_void_p),
        ("out_stride", c_int64 * 3),
        ("first", c_void_p),
        ("count", c_void_p),
        ("table_stride", c_int64),
        ("k", _Pages),
        ("v", _Pages),
        ("scaling", c_float),
        ("softcap", c_float),
        ("causal", c_int32),
        ("window", c_int64),
        ("mask", c_void_p),
        ("mask_stride", c_int64 * 2),
        ("bias", c_void_p),
        ("bias_stride", c_int64 * 3),
        ("sinks", c_void_p),
    )


def serves(level: Level | None, query: torch.Tensor) -> bool:
    """Whether the native kernel takes such queries [.., head_dim]."""
    head_dim = query.shape[-1]
    fits = 0 < head_dim <= MOST_HEAD_DIM and head_dim % HEAD_DIM_MULTIPLE == 0
    return level is not None and query.dtype == torch.bfloat16 and query.device.type == "cpu" and fits


def shared_out(call: AttentionCall) -> tuple[AttentionCall, int]:
    """The same attention as more sequences of fewer heads, and how many of each: a sequence's key head is an item of
    work, and of queries that decode with one key head there would be no more items than sequences."""
    _, q_len, heads, _ = call.query.shape
    if q_len > 1 or call.kv_heads > 1 or any(each is not None for each in (call.mask, call.bias, call.sinks)):
        return call, 1
    most = min(_SHARED_HEADS, heads // 2)
    pieces = next((n for n in range(2, heads + 1) if heads % n == 0 and heads // n <= most), 1)
    if pieces == 1 or heads // pieces < _LEAST_HEADS:
        return call, 1
    query = call.query.unflatten(2, (pieces, -1)).transpose(1, 2).flatten(0, 1)
    first, count = (each.repeat_interleave(pieces) for each in (call.first, call.count))
    keys, values = (_repeated(pages, pieces) for pages in (call.keys, call.values))
    return replace(call, query=query, keys=keys, values=values, first=first, count=count), pieces


def _repeated(pages: Pages, times: int) -> Pages:
    """The pages of every sequence so many times."""
    table = replace(pages.table, offsets=pages.table.offsets.repeat_interleave(times, 0))
    return replace(pages, table=table, recent=None if pages.recent is None else _repeated(pages.recent, times))


class NativeCall:
    """The arguments of one call, and all memory they point to; `out`, of the query's shape, is written."""

    def __init__(self, call: AttentionCall, out: torch.Tensor) -> None:
        self._kept: list[torch.Tensor] = []
        query = call.query if call.query.stride(-1) == 1 else call.query.contiguous()
        self._kept.append(query)
        sequences, q_len, q_heads, head_dim = query.shape
        self.arguments = arguments = AttentionArguments()
        arguments.sequences, arguments.q_len, arguments.q_heads = sequences, q_len, q_heads
        arguments.kv_heads, arguments.head_dim = call.kv_heads, head_dim
        arguments.q, arguments.q_stride = query.data_ptr(), query.stride()[:3]
        arguments.out, arguments.out_stride = out.data_ptr(), out.stride()[:3]
        arguments.first, arguments.count = self._pointer(call.first.long()), self._pointer(call.count.long())
        arguments.table_stride = call.keys.table.offsets.shape[1]
        arguments.k, arguments.v = self._pages(call.keys), self._pages(call.values)
        arguments.scaling, arguments.softcap = call.scaling, call.softcap
        arguments.causal, arguments.window = call.causal, call.window
        if call.mask is not None:
            mask = _along_slots(call.mask.view(torch.uint8) if call.mask.dtype == torch.bool else call.mask)
            assert mask.dtype == torch.uint8
            arguments.mask, arguments.mask_stride = self._keep(mask), _shared_strides(mask)
        if call.bias is not None:
            bias = _along_slots(call.bias.float())
            arguments.bias, arguments.bias_stride = self._keep(bias), _shared_strides(bias)
        if call.sinks is not None:
            arguments.sinks = self._pointer(call.sinks.float())

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _pointer(self, tensor: torch.Tensor) -> int:
        return self._keep(tensor.contiguous())

    def _pages(self, pages: Pages) -> _Pages:
        codes = torch.bfloat16 if pages.format is CacheFormat.BF16 else torch.uint8
        made = _Pages(pages.format, self._table(pages.table), _plane(pages.codes, codes))
        if pages.scale is not None and pages.zero is not None:
            made.scale, made.zero = _plane(pages.scale, torch.float16), _plane(pages.zero, torch.uint8)
        if pages.recent is not None:
            made.recent, made.exact = self._table(pages.recent.table), _plane(pages.recent.codes, torch.bfloat16)
        return made

    def _table(self, table: BlockTable) -> _Table:
        return _Table(self._keep(table.memory), self._pointer(table.offsets))


def _plane(plane: Plane, dtype: torch.dtype) -> _Plane:
    assert plane.dtype == dtype, f"expected a plane of {dtype}, found {plane.dtype}"
    return _Plane(plane.start, plane.head_stride, plane.token_stride)


def _along_slots(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with its last dimension in one piece."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _shared_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of all dimensions but the last; 0 where one element serves all."""
    pairs = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return tuple(0 if size == 1 else stride for size, stride in pairs)
