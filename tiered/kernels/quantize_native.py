"""The arguments of native quantization: tk_quantize of tiered_kernels.h. Called by `kernels.py`."""

from typing import Final, Literal

import torch

from tiered.kernels.library import Dtype
from tiered.kernels.published import room_in
from tiered.quant import GroupScheme, QuantizedTensor, Scheme

DTYPES: Final = {torch.bfloat16: Dtype.BF16, torch.float32: Dtype.F32, torch.float16: Dtype.F16}
"""Dtypes of weights that the native kernel takes; the others go through torch."""


def serves(weight: torch.Tensor, scheme: Scheme, clip: str) -> bool:
    """Whether the native kernel takes `weight`. It takes no wrong arguments, so the reference raises their errors."""
    if not isinstance(scheme, GroupScheme) or clip not in ("mse", "minmax"):
        return False
    if weight.dim() != 2 or weight.dtype not in DTYPES or weight.device.type != "cpu":
        return False
    rows, columns = weight.shape
    return scheme.accepts(rows, columns) and weight.stride(1) == 1 and (rows == 1 or weight.stride(0) >= columns)


def empty_codes(weight: torch.Tensor, scheme: Scheme, out: torch.Tensor | None = None) -> QuantizedTensor:
    """Uninitialized codes, scales and zeros for the result, in the memory `out`, u8, if that is large enough."""
    parts, done = [], 0
    for dtype, shape in scheme.parts(*weight.shape).values():
        parts.append(room_in(None if out is None else out[done:], shape, dtype))
        done += parts[-1].nbytes
    return QuantizedTensor(*parts)


def arguments(
    weight: torch.Tensor, scheme: Scheme, clip: Literal["mse", "minmax"], codes: QuantizedTensor
) -> tuple[int, ...]:
    """tk_quantize's arguments between the context and the cancel flag."""
    rows, columns = weight.shape
    what = (weight.data_ptr(), DTYPES[weight.dtype], rows, columns, weight.stride(0))
    how = (scheme.bits, scheme.group_size, int(clip == "mse"))
    return (*what, *how, codes.q.data_ptr(), codes.scale.data_ptr(), codes.zero.data_ptr())
