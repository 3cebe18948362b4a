"""Linear layers in plain torch: the reference for the native kernels, and the fallback where those cannot serve.

Weights are used where they lie. What has to be widened (quantized codes, or another dtype than x) is widened in
panels of rows, so scratch is bounded whatever the layer's size, and a panel's end is a place to stop.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch.nn import functional

from tiered.kernels.cancel import CancelFlag
from tiered.quant import QuantizedWeight

PANEL_WEIGHTS: Final = 1 << 20
"""Weights widened at a time: 4 MiB as float32, which stays in the second-level cache of a server core."""
_PANEL_STEPS_NBYTES: Final = 16
"""Bytes per weight of all temporaries while a panel is widened (codes, float32 product, result)."""
DENSE_PANEL_NBYTES: Final = 64 << 20
"""Bytes multiplied at a time where nothing needs widening: a few milliseconds between looks at the cancel flag."""


def scratch_nbytes() -> int:
    """An upper bound on what `linear` allocates besides its result."""
    return PANEL_WEIGHTS * _PANEL_STEPS_NBYTES


def linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None = None,
    cancel: CancelFlag | None = None,
    dequantize: Callable[[QuantizedWeight, int, int, torch.dtype], torch.Tensor] = QuantizedWeight.rows,
) -> torch.Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out]: [..., out] in x's dtype.

    `weight` may be of another dtype than x, or quantized. Raises InterruptedRun once `cancel` is set. `dequantize`
    makes panels as `QuantizedWeight.rows` does, and may be faster.
    """
    out, in_ = weight.shape
    widen = isinstance(weight, QuantizedWeight) or weight.dtype != x.dtype
    rows = max(1, PANEL_WEIGHTS // in_) if widen else max(1, DENSE_PANEL_NBYTES // (in_ * x.element_size()))

    def panel(start: int, stop: int) -> torch.Tensor:
        if isinstance(weight, QuantizedWeight):
            return dequantize(weight, start, stop, x.dtype)
        return weight[start:stop].to(x.dtype)

    if rows >= out:
        return functional.linear(x, panel(0, out), bias)
    y = x.new_empty((*x.shape[:-1], out))
    for start in range(0, out, rows):
        if cancel is not None:
            cancel.check()
        stop = min(start + rows, out)
        part = bias[start:stop] if bias is not None else None
        y[..., start:stop] = functional.linear(x, panel(start, stop), part)
    return y
