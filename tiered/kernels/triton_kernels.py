"""Kernels for CUDA devices, in Triton. Importing this imports Triton, so `device_kernels.py` does so only to serve.

Weights are read as they lie on disk: 4-bit codes planar within a group, or 8-bit ones, a scale (fp16) and a zero (u8)
per group; of a codebook scales of its own, and its 16 values, in float32, in the place of zeros. In products the rows
of the weight are the first operand's, so that few rows of activations are padded to 16 and no further. Codes less
zeros, and the values of mxfp4 and iq4nl, are exact in 16 bits, and those of nf4 as precise as 16-bit weights; scales go
on sums in float32: weights are never rounded again.

A kernel computes an element of the result from one row of the weight and one of the activations, group after group, in
a tile of one shape: so the result does not depend on what else is computed.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl

from tiered.quant import CodebookScheme, QuantizedWeight


@triton.jit
def _halves(q, row, inside, k, g, in_features, bits: tl.constexpr, group: tl.constexpr, dtype: tl.constexpr):
    """The codes of group `g` of rows `row` as `dtype`, its first half and its second: [rows, group / 2] each."""
    half: tl.constexpr = group // 2
    if bits == 4:
        codes = tl.load(q + row[:, None] * (in_features // 2) + g * half + k[None, :], mask=inside[:, None], other=0)
        low, high = (codes & 15).to(dtype), (codes >> 4).to(dtype)
    else:
        at = q + row[:, None] * in_features + g * group + k[None, :]
        low = tl.load(at, mask=inside[:, None], other=0).to(dtype)
        high = tl.load(at + half, mask=inside[:, None], other=0).to(dtype)
    return low, high


@triton.jit
def _unscaled(low, high, zero, at, inside):
    """What both halves' codes stand for before they are scaled, in float32. `at`: the group's place, by row."""
    if zero.dtype.element_ty == tl.float32:
        return tl.load(zero + low.to(tl.int32)), tl.load(zero + high.to(tl.int32))
    else:
        z = tl.load(zero + at, mask=inside, other=0).to(low.dtype)[:, None]
        return (low - z).to(tl.float32), (high - z).to(tl.float32)


@triton.jit
def _scales(scale, at, inside):
    """Scales in float32; a byte is an exponent."""
    s = tl.load(scale + at, mask=inside, other=0)
    if scale.dtype.element_ty == tl.uint8:
        exponent = s.to(tl.int32)
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
        return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:
        return s.to(tl.float32)


@triton.jit
def dequantize_kernel(
    q, scale, zero, y, rows, in_features, bits: tl.constexpr, group: tl.constexpr, tile_out: tl.constexpr
):
    """y [rows, in] = scale * (q - zero) or scale * value in float32, rounded once. A program: `tile_out` rows of a
    group."""
    half: tl.constexpr = group // 2
    row = tl.program_id(0) * tile_out + tl.arange(0, tile_out)
    inside = row < rows
    row = row.to(tl.int64)
    g, k = tl.program_id(1), tl.arange(0, half)
    at = row * (in_features // group) + g
    s = _scales(scale, at, inside)
    low, high = _halves(q, row, inside, k, g, in_features, bits, group, tl.int32)
    low, high = _unscaled(low, high, zero, at, inside)
    to = y + row[:, None] * in_features + g * group + k[None, :]
    tl.store(to, (low * s[:, None]).to(y.dtype.element_ty), mask=inside[:, None])
    tl.store(to + half, (high * s[:, None]).to(y.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x, q, scale, zero, bias, y, rows, out, in_features, x_stride, y_stride,
    has_bias: tl.constexpr, bits: tl.constexpr, group: tl.constexpr,
    tile_rows: tl.constexpr, tile_out: tl.constexpr, dot: tl.constexpr,
):  # fmt: skip
    """y [rows, out] = x [rows, in] times the weight, plus bias [out]. A program: `tile_out` rows of the weight times
    `tile_rows` rows of x, multiplied as `dot`."""
    half: tl.constexpr = group // 2
    row_tiles = tl.cdiv(rows, tile_rows)
    # Programs next to each other read the same weights.
    o = (tl.program_id(0) // row_tiles) * tile_out + tl.arange(0, tile_out)
    m = (tl.program_id(0) % row_tiles) * tile_rows + tl.arange(0, tile_rows)
    is_out, is_row = o < out, m < rows
    o, m = o.to(tl.int64), m.to(tl.int64)
    k = tl.arange(0, half)
    groups = in_features // group
    total = tl.zeros([tile_out, tile_rows], dtype=tl.float32)
    for g in range(0, groups):
        s = _scales(scale, o * groups + g, is_out)
        low, high = _halves(q, o, is_out, k, g, in_features, bits, group, tl.int16)
        low, high = _unscaled(low, high, zero, o * groups + g, is_out)
        of = x + m[None, :] * x_stride + g * group + k[:, None]
        x_low = tl.load(of, mask=is_row[None, :], other=0.0).to(dot)
        x_high = tl.load(of + half, mask=is_row[None, :], other=0.0).to(dot)
        part = tl.dot(low.to(dot), x_low, input_precision="ieee")
        part = tl.dot(high.to(dot), x_high, part, input_precision="ieee")
        total += part * s[:, None]
    if has_bias:
        total += tl.load(bias + o, mask=is_out, other=0.0).to(tl.float32)[:, None]
    to = y + m[None, :] * y_stride + o[:, None]
    tl.store(to, total.to(y.dtype.element_ty), mask=is_out[:, None] & is_row[None, :])


@triton.jit
def linear_by_sums_kernel(
    x, q, scale, zero, bias, y, out, in_features, x_stride, y_stride,
    has_bias: tl.constexpr, bits: tl.constexpr, group: tl.constexpr, tile_out: tl.constexpr,
):  # fmt: skip
    """The same without a matrix product, for devices whose tensor cores Triton does not use. A program: `tile_out` rows
    of the weight times one row of x."""
    half: tl.constexpr = group // 2
    o = tl.program_id(0) * tile_out + tl.arange(0, tile_out)
    is_out = o < out
    o, m = o.to(tl.int64), tl.program_id(1).to(tl.int64)
    k = tl.arange(0, half)
    groups = in_features // group
    total = tl.zeros([tile_out, half], dtype=tl.float32)
    for g in range(0, groups):
        s = _scales(scale, o * groups + g, is_out)
        low, high = _halves(q, o, is_out, k, g, in_features, bits, group, tl.int16)
        low, high = _unscaled(low, high, zero, o * groups + g, is_out)
        of = x + m * x_stride + g * group + k
        x_low, x_high = tl.load(of).to(tl.float32), tl.load(of + half).to(tl.float32)
        part = low * x_low[None, :]
        part += high * x_high[None, :]
        total += part * s[:, None]
    found = tl.sum(total, axis=1)
    if has_bias:
        found += tl.load(bias + o, mask=is_out, other=0.0).to(tl.float32)
    tl.store(y + m * y_stride + o, found.to(y.dtype.element_ty), mask=is_out)


@triton.jit(do_not_specialize=["rows"])
def linear_int8_kernel(
    x, x_scale, q, scale, zero, bias, y, rows, out, in_features, y_stride,
    has_bias: tl.constexpr, group: tl.constexpr, tile_rows: tl.constexpr, tile_out: tl.constexpr,
):  # fmt: skip
    """The same for 8-bit weights and activations in int8 [rows, in], with scales [rows, in / group]: integer products.

    Codes of weights are made signed by subtracting 128; what that and the zeros are too much is the sum of a group's
    activations, by which it is taken back.
    """
    row_tiles = tl.cdiv(rows, tile_rows)
    o = (tl.program_id(0) // row_tiles) * tile_out + tl.arange(0, tile_out)
    m = (tl.program_id(0) % row_tiles) * tile_rows + tl.arange(0, tile_rows)
    is_out, is_row = o < out, m < rows
    o, m = o.to(tl.int64), m.to(tl.int64)
    k = tl.arange(0, group)
    groups = in_features // group
    total = tl.zeros([tile_out, tile_rows], dtype=tl.float32)
    for g in range(0, groups):
        s = tl.load(scale + o * groups + g, mask=is_out, other=0.0).to(tl.float32)
        z = tl.load(zero + o * groups + g, mask=is_out, other=0).to(tl.int32)
        t = tl.load(x_scale + m * groups + g, mask=is_row, other=0.0)
        at = q + o[:, None] * in_features + g * group + k[None, :]
        codes = (tl.load(at, mask=is_out[:, None], other=0) ^ 128).to(tl.int8, bitcast=True)
        of = x + m[None, :] * in_features + g * group + k[:, None]
        values = tl.load(of, mask=is_row[None, :], other=0)
        summed = tl.sum(values.to(tl.int32), axis=0)
        part = tl.dot(codes, values) + (128 - z)[:, None] * summed[None, :]
        total += part.to(tl.float32) * (s[:, None] * t[None, :])
    if has_bias:
        total += tl.load(bias + o, mask=is_out, other=0.0).to(tl.float32)[:, None]
    to = y + m[None, :] * y_stride + o[:, None]
    tl.store(to, total.to(y.dtype.element_ty), mask=is_out[:, None] & is_row[None, :])


@dataclass(frozen=True)
class Tiling:
    """How much one program computes, and by how many threads."""

    out: int
    """Rows of the weight."""
    rows: int = 1
    """Rows of activations."""
    warps: int = 4
    stages: int = 3
    """Loads that are under way while one is computed with."""


DEQUANTIZE: Final = Tiling(64)
LINEAR: Final = Tiling(64, 64)
"""For any number of rows: weights are unpacked once for 64 of them, and padding one to 64 takes less than reading."""
LINEAR_FEW: Final = Tiling(64, 16)
"""Where few rows need not have the bits of many."""
SUMS: Final = Tiling(4)
_DTYPES: Final = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def dequantize(weight: QuantizedWeight, out: torch.Tensor) -> None:
    """Fill `out` with what `weight.rows` returns, bit for bit."""
    rows, in_ = weight.shape
    grid = triton.cdiv(rows, DEQUANTIZE.out), in_ // weight.scheme.group_size
    scheme = {"bits": weight.scheme.bits, "group": weight.scheme.group_size}
    dequantize_kernel[grid](*_parts(weight), out, rows, in_, **scheme, tile_out=DEQUANTIZE.out, **_threads(DEQUANTIZE))


def linear(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, y: torch.Tensor, tiling: Tiling
) -> None:
    """Write the product for 16-bit x [rows, in] to y [rows, out]."""
    constants = _constants(weight, bias, tiling) | {"bits": weight.scheme.bits, "dot": _DTYPES[x.dtype]}
    sizes = len(x), *weight.shape, _stride(x), y.stride(0)
    linear_kernel[_tiles(tiling, x, y)](x, *_parts(weight), _or(bias, y), y, *sizes, **constants, **_threads(tiling))


def linear_by_sums(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """The same without matrix products, for very few rows."""
    constants = _constants(weight, bias, SUMS) | {"bits": weight.scheme.bits}
    del constants["tile_rows"]
    sizes = *weight.shape, _stride(x), y.stride(0)
    grid = triton.cdiv(y.shape[1], SUMS.out), len(x)
    linear_by_sums_kernel[grid](x, *_parts(weight), _or(bias, y), y, *sizes, **constants, **_threads(SUMS))


def linear_int8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    tiling: Tiling,
) -> None:
    """The same for activations in int8, in one piece, with their scales."""
    constants = _constants(weight, bias, tiling)
    sizes = len(x), *weight.shape, y.stride(0)
    pointers = x, x_scale, *weight.codes, _or(bias, y), y
    linear_int8_kernel[_tiles(tiling, x, y)](*pointers, *sizes, **constants, **_threads(tiling))


def _parts(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, and zeros or a codebook's values."""
    q, scale, zero = weight.codes
    return q, scale, weight.scheme.values.table(q.device) if isinstance(weight.scheme, CodebookScheme) else zero


def _constants(weight: QuantizedWeight, bias: torch.Tensor | None, tiling: Tiling) -> dict[str, Any]:
    of_tile = {"tile_rows": tiling.rows, "tile_out": tiling.out}
    return {"has_bias": bias is not None, "group": weight.scheme.group_size} | of_tile


def _tiles(tiling: Tiling, x: torch.Tensor, y: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(y.shape[1], tiling.out) * triton.cdiv(len(x), tiling.rows),)


def _stride(x: torch.Tensor) -> int:
    """From row to row; for a single row what several would have, so that the same binary serves it."""
    return x.stride(0) if len(x) > 1 else x.shape[1]


def _threads(tiling: Tiling) -> dict[str, int]:
    return {"num_warps": tiling.warps, "num_stages": tiling.stages}


def _or(bias: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """Some pointer, which is not used where there is no bias."""
    return other if bias is None else bias
