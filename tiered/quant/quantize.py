"""Weights to codes and back, with arithmetic that any language can repeat bit for bit.

`quantize` takes a linear weight [out, in] and a scheme, and returns q, scale and zero; `convert/` calls it.
`dequantize` is the reference that every kernel is tested against.

The arithmetic, per group of `group_size` weights. All of it is IEEE binary32, each operation rounded on its
own (nothing contracted into a fused multiply-add, except where the product is exact, as noted); `round` goes
to the nearest integer and halves to even; n = 2**bits - 1:

    low, high = min(0, w...), max(0, w...)      the range includes 0, which is therefore exact
    for f in CLIP_FACTORS                       only 1.0 for "minmax" and at 8 bits
        lo, hi  = low * f, high * f
        scale   = float32(float16((hi - lo) / n))           rounded to nearest even
                  2**-24, the least float16, where that gives 0 though hi > lo
        inverse = 1 / scale                                 0 where hi == lo, all weights being zero
        zero    = min(round(-lo * inverse), n)
        r       = clamp(round(w * inverse), -zero, n - zero)
        e       = w - r * scale                             r * scale is exact: 9 bits times 11 bits
        error   = sum of e * e, as a tree: halves of the group are added element by element
                  (0 with g/2, 1 with g/2 + 1, ...) until one number is left
    the f of the least error wins, the earlier one on a tie; then  q = r + zero

Since 1.0 is the first factor, clipping never loses to min/max in any group. Dequantizing,
scale * (q - zero) is exact in float32 and is rounded once, to the dtype asked for.

A codebook's codes are those of the entries nearest to w / scale; `codebook.py` says how scales are chosen. Checkpoints
that come in such a form are taken over as they are: this is for random weights and tests.
"""

from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from tiered.errors import CheckpointError, ConfigError
from tiered.quant.codebook import widened_scales
from tiered.quant.pack import pack_int4, unpack_int4
from tiered.quant.schemes import CodebookScheme, Scheme

# Measured at 4 bits on Gaussian and t-tailed weights and on a trained OPT, groups of 32 to 128: this grid
# gains 0.2 to 0.5 dB over min/max, and narrowing further than 0.85 adds < 0.001 dB. Narrowing the ends
# separately (49 pairs), trying zero +- 1 or refitting the scale by least squares adds 0.01 to 0.03 dB: not
# worth the arithmetic.
CLIP_FACTORS: Final = tuple((40 - step) / 40 for step in range(7))  # 1.0 down to 0.85

# Work proceeds in panels of whole rows: a handful of temporaries of this size live at once. This is
# the size at which they stay in a core's cache; no result depends on it.
PANEL_BYTES: Final = 2 << 20

_PACKED: Final = torch.contiguous_format  # casting and transposing at once is twice as fast as in two steps
_LEAST_SCALE: Final = 2.0**-24
_GREATEST_SCALE: Final = 65504.0


class QuantizedTensor(NamedTuple):
    """A quantized weight: the tensors stored as NAME.q, NAME.scale and NAME.zero."""

    q: Tensor  # u8 [out, in] at 8 bits, [out, in / 2] at 4
    scale: Tensor  # fp16, or what the codebook has, [out, in / group_size]
    zero: Tensor  # u8 [out, in / group_size]; [out, 0] where the scheme has none


def quantize(
    weight: Tensor, scheme: Scheme, *, clip: Literal["mse", "minmax"] = "mse", name: str = "weight"
) -> QuantizedTensor:
    """Quantize `weight` [out, in] of any floating dtype; `name` is what errors call it.

    `clip="mse"` narrows each group's range to where its squared error is least; "minmax" keeps all of it, as codebooks
    always do.
    Temporary memory is a few PANEL_BYTES whatever the number of rows. Raises ConfigError where the shape does
    not fit the scheme, CheckpointError where a weight is not finite or a scale would not fit fp16.
    """
    if clip not in ("mse", "minmax"):
        raise ConfigError(f"clip {clip!r}: expected mse or minmax")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ConfigError(
            f"{name}: expected a floating-point tensor [out, in], found {weight.dtype} {list(weight.shape)}"
        )
    weight = weight.detach()  # a Parameter does not allow operations in place
    rows, columns = weight.shape
    q = torch.empty(scheme.q_shape(rows, columns), dtype=torch.uint8)
    scale = torch.empty(scheme.scale_shape(rows, columns), dtype=scheme.scale_dtype)
    zero = torch.empty(scheme.zero_shape(rows, columns), dtype=torch.uint8)
    # At 8 bits clipping buys next to nothing (measured: < 0.05 dB): the steps are so fine that cutting off
    # even one weight soon costs more than a finer step returns.
    factors = CLIP_FACTORS if clip == "mse" and scheme.bits == 4 else CLIP_FACTORS[:1]
    step = _panel_rows(columns)
    for start in range(0, rows, step):
        panel = slice(start, min(start + step, rows))
        # Groups become columns: what belongs to a group is then one row of numbers, and every operation runs
        # along contiguous memory instead of broadcasting over short runs.
        groups = weight[panel].reshape(-1, scheme.group_size).t().to(torch.float32, memory_format=_PACKED)
        if isinstance(scheme, CodebookScheme):
            codes, panel_scale = _look_up_groups(groups, scheme)
        else:
            codes, panel_scale, panel_zero = _quantize_groups(groups, scheme, factors)
            zero[panel] = panel_zero.view(-1, zero.shape[1])
        if not widened_scales(panel_scale).isfinite().all():
            raise out_of_range(weight, scheme, name)
        codes = codes.t().to(torch.uint8, memory_format=_PACKED).reshape(-1, columns)
        q[panel] = pack_int4(codes, scheme.group_size) if scheme.bits == 4 else codes
        scale[panel] = panel_scale.view(-1, scale.shape[1])
    return QuantizedTensor(q, scale, zero)


def dequantize(
    q: Tensor,
    scale: Tensor,
    zero: Tensor,
    scheme: Scheme,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """The weight [out, in] that the codes stand for, computed in float32, then cast to `dtype`: scale * (q - zero), or
    scale * values[q].

    A panel of rows is dequantized by passing the same rows of all three: q[a:b], scale[a:b], zero[a:b]. Where `out` is
    given, the result is written to it, in its dtype.
    """
    rows = q.shape[0]
    columns = scale.shape[-1] * scheme.group_size
    shape = (rows, columns)
    expected = [scheme.q_shape(*shape), scheme.scale_shape(*shape), scheme.zero_shape(*shape)]
    found = [tuple(q.shape), tuple(scale.shape), tuple(zero.shape)]
    if found != expected or scale.dtype != scheme.scale_dtype:
        raise ConfigError(
            f"{scheme.name} q, scale, zero: expected shapes {expected} and scales of {scheme.scale_dtype}, "
            f"found {found} and {scale.dtype}"
        )
    weight = torch.empty(rows, columns, dtype=dtype, device=q.device) if out is None else out
    step = _panel_rows(columns)
    for start in range(0, rows, step):
        panel = slice(start, min(start + step, rows))
        codes = unpack_int4(q[panel], scheme.group_size) if scheme.bits == 4 else q[panel]
        codes = codes.reshape(-1, scale.shape[1], scheme.group_size)
        if isinstance(scheme, CodebookScheme):
            values = scheme.values.table(q.device)[codes.to(torch.int32)]
        else:
            values = codes.to(torch.float32)
            values -= zero[panel].to(torch.float32).unsqueeze(-1)
        values *= widened_scales(scale[panel]).unsqueeze(-1)
        weight[panel] = values.flatten(1)
    return weight


def _panel_rows(columns: int) -> int:
    return max(1, PANEL_BYTES // (4 * columns))


def _quantize_groups(groups: Tensor, scheme: Scheme, factors: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero, all float32, of the columns of `groups` [group, n]; a scale that is not finite
    means that a weight was not, or that its group spans too much."""
    max_code = (1 << scheme.bits) - 1
    factor = torch.tensor(factors, dtype=torch.float32).unsqueeze(1)
    low = groups.amin(0).clamp(max=0) * factor  # [factor, n]
    high = groups.amax(0).clamp(min=0) * factor
    scale = ((high - low) / max_code).to(torch.float16).to(torch.float32)
    empty = high == low
    scale = torch.where(empty, scale, scale.clamp(min=_LEAST_SCALE))
    inverse = torch.where(empty, 0.0, scale.reciprocal())
    zero = (-low).mul_(inverse).round_().clamp_(max=max_code)

    scratch = torch.empty_like(groups)
    best = torch.zeros(1, groups.shape[1], dtype=torch.int64)
    if len(factors) > 1:
        least = torch.full_like(scale[0], torch.inf)
        error = torch.empty_like(least)
        for index in range(len(factors)):  # torch's argmin along the outer axis is ten times slower
            levels = _round_to_levels(groups, inverse[index], zero[index], max_code, scratch)
            _squared_error(groups, levels, scale[index], error)
            best[0, error < least] = index
            torch.minimum(least, error, out=least)
    scale, zero, inverse = (choice.gather(0, best).squeeze(0) for choice in (scale, zero, inverse))
    return _round_to_levels(groups, inverse, zero, max_code, scratch).add_(zero), scale, zero


def _look_up_groups(groups: Tensor, scheme: CodebookScheme) -> tuple[Tensor, Tensor]:
    """Codes, u8, and scales of the columns of `groups` [group, n]; a group of zeros has the code of the least value."""
    scale = scheme.values.scales(groups)
    wide = widened_scales(scale)
    return scheme.values.nearest(groups * torch.where(wide == 0, 0.0, wide.reciprocal())), scale


def _round_to_levels(groups: Tensor, inverse: Tensor, zero: Tensor, max_code: int, out: Tensor) -> Tensor:
    """q - zero of every weight, into `out` [group, n]."""
    torch.mul(groups, inverse, out=out)
    out.round_()
    return torch.clamp(out, -zero, max_code - zero, out=out)


def _squared_error(groups: Tensor, levels: Tensor, scale: Tensor, out: Tensor) -> None:
    """Each column's squared error, added as a tree, into `out` [n]; overwrites `levels`."""
    error = torch.addcmul(groups, levels, scale, value=-1, out=levels)
    error.mul_(error)
    while error.shape[0] > 2:
        low, high = error.chunk(2)
        error = low.add_(high)
    torch.add(error[0], error[1], out=out)


def out_of_range(weight: Tensor, scheme: Scheme, name: str) -> CheckpointError:
    """What is wrong with a weight that gave a scale which is not finite."""
    step = _panel_rows(weight.shape[1])
    bad = 0
    widest = 0.0
    for start in range(0, weight.shape[0], step):
        panel = weight[start : start + step].to(torch.float32)
        bad += int((~panel.isfinite()).sum())
        widest = max(widest, float(panel.abs().max()))
    if bad:
        return CheckpointError(
            f"{name}: expected finite weights, found {bad:,} of {weight.numel():,} that are NaN or infinite; "
            f"check the source checkpoint"
        )
    looked_up = scheme.values.values if isinstance(scheme, CodebookScheme) else ((1 << scheme.bits) - 1,)
    steps = max(map(abs, looked_up))
    return CheckpointError(
        f"{name}: expected groups that span at most {_GREATEST_SCALE * steps:,.0f}, so that their "
        f"scales fit fp16, found a weight of magnitude {widest:,.0f}; keep this tensor 16-bit"
    )
