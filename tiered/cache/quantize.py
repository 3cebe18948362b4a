"""Complete pages of keys and values in 8 or 4 bits, in plain torch.

In: states [pages, heads, 64, head_dim]. Out: codes, scales and zeros as `Kernels.attention` reads them, each standing
for scale * (code - zero). Keys have one scale per channel of a page, because some channels are far larger than others,
whatever the token. Values have one per token and group of gcd(head_dim, 64) channels. Called by `layout.py`, once per
page: what is quantized is never quantized again.

A page's numbers depend on that page alone, bit for bit: every step is one correctly rounded operation per element, or
a minimum or maximum.
"""

import math
from dataclasses import dataclass
from typing import Final

import torch

from tiered.kernels.attention import PAGE_TOKENS

_LARGEST_SCALE: Final = 65504.0
_SMALLEST_SCALE: Final = 2.0**-24
_LARGEST_ZERO: Final = 255


@dataclass(frozen=True, eq=False)
class QuantizedPages:
    """Pages of keys or values in 8 or 4 bits."""

    codes: torch.Tensor
    """u8 [pages, heads, 64, head_dim]; in 4 bits [pages, heads, 64, head_dim / 2], nibbles planar within a group."""
    scale: torch.Tensor
    """fp16 [pages, heads, 1, head_dim] for keys, [pages, heads, 64, groups] for values; may be negative."""
    zero: torch.Tensor
    """u8, of the same shape as `scale`."""


def group_size(head_dim: int) -> int:
    """Channels of a token's values that share a scale, and channels whose nibbles are packed together."""
    return math.gcd(head_dim, PAGE_TOKENS)


def quantize_keys(keys: torch.Tensor, bits: int) -> QuantizedPages:
    """Keys [pages, heads, 64, head_dim] of any float dtype, per channel over a page's tokens."""
    states = keys.float()
    scale, zero = _grid(states.amin(-2, keepdim=True), states.amax(-2, keepdim=True), bits)
    return QuantizedPages(_codes(states, scale, zero, bits), scale, zero)


def quantize_values(values: torch.Tensor, bits: int) -> QuantizedPages:
    """Values [pages, heads, 64, head_dim] of any float dtype, per token in groups of channels."""
    states = values.float().unflatten(-1, (-1, group_size(values.shape[-1])))
    scale, zero = _grid(states.amin(-1, keepdim=True), states.amax(-1, keepdim=True), bits)
    codes = _codes(states, scale, zero, bits, flatten=True)
    return QuantizedPages(codes, scale.squeeze(-1), zero.squeeze(-1))


def _grid(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (fp16) and zeros (u8) whose codes cover low..high, float32 of any shape.

    A zero cannot be negative, so codes reach further below 0 than above: where the range lies more above, the scale
    is negative, which mirrors it. A range too far from 0 for any zero is widened towards 0. Beyond what fp16 scales
    can express, states are cut off; NaN makes the scale NaN.
    """
    most = 2**bits - 1
    limit = _LARGEST_SCALE * most / 2
    low, high = low.clamp(-limit, limit), high.clamp(-limit, limit)
    # In terms of the mirrored range: it ends `far` below 0 and `near` above.
    far, near = torch.maximum(high, -low), torch.minimum(high, -low)
    exact = torch.maximum((far + near) / most, far / _LARGEST_ZERO).clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
    scale = exact.half()
    # Up to the next fp16, so that the range is covered even where scales are subnormal and have few digits.
    scale.view(torch.int16).add_(scale.float() < exact)
    zero = (far / scale.float() + 0.5).clamp_(max=_LARGEST_ZERO).to(torch.uint8)
    return torch.where(high > -low, -scale, scale), zero


def _codes(
    states: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, flatten: bool = False
) -> torch.Tensor:
    """u8 codes [.., head_dim] of states, in 4 bits pairs [.., head_dim / 2]; `flatten`: states are [.., groups, n]."""
    codes = states * scale.float().reciprocal_()
    # Conversion cuts off the fraction, and codes below 0 become 0: adding a half rounds to nearest.
    codes = codes.add_(zero.float() + 0.5).clamp_(0, 2**bits - 0.5).to(torch.uint8)
    if flatten:
        codes = codes.flatten(-2)
    if bits == 8:
        return codes
    halves = codes.unflatten(-1, (-1, 2, group_size(codes.shape[-1]) // 2))
    return torch.add(halves[..., 0, :], halves[..., 1, :], alpha=16).flatten(-2)
