"""The arguments of native quantization: tk_quantize of tiered_kernels.h. Called by `kernels.py`."""

import ctypes
from typing import Final, Literal

import torch

from tiered.kernels.library import Dtype, LookupArgument
from tiered.kernels.published import CodedRows, room_in
from tiered.quant import GroupScheme, QuantizedTensor, Scheme

DTYPES: Final = {torch.bfloat16: Dtype.BF16, torch.float32: Dtype.F32, torch.float16: Dtype.F16}
"""Dtypes of weights that the native kernel takes; the others go through torch."""
_LEAST_RUN: Final = 16
"""Columns that share a scale, at least, where the native kernel looks codes up; more are a power of two."""


def serves(weight: torch.Tensor | CodedRows, scheme: Scheme, clip: str) -> bool:
    """Whether the native kernel takes `weight`. It takes no wrong arguments, so the reference raises their errors."""
    if not isinstance(scheme, GroupScheme) or clip not in ("mse", "minmax"):
        return False
    if isinstance(weight, CodedRows):
        group, count = weight.groups, weight.scale.shape[1]
        fits = isinstance(group, int) and (count == 1 or (group >= _LEAST_RUN and group.bit_count() == 1))
        return fits and weight.codes.stride(1) == 1 and scheme.accepts(*weight.shape)
    if weight.dim() != 2 or weight.dtype not in DTYPES or weight.device.type != "cpu":
        return False
    rows, columns = weight.shape
    return scheme.accepts(rows, columns) and weight.stride(1) == 1 and (rows == 1 or weight.stride(0) >= columns)


def empty_codes(rows: int, columns: int, scheme: Scheme, out: torch.Tensor | None = None) -> QuantizedTensor:
    """Uninitialized codes, scales and zeros for the result, in the memory `out`, u8, if that is large enough."""
    parts, done = [], 0
    for dtype, shape in scheme.parts(rows, columns).values():
        parts.append(room_in(None if out is None else out[done:], shape, dtype))
        done += parts[-1].nbytes
    return QuantizedTensor(*parts)


class QuantizeCall:
    """tk_quantize's arguments for one call; what they point to lives as long as this does."""

    def __init__(
        self,
        weight: torch.Tensor | CodedRows,
        scheme: Scheme,
        clip: Literal["mse", "minmax"],
        codes: QuantizedTensor,
    ) -> None:
        lookup = None
        if isinstance(weight, CodedRows):
            parts = [weight.table, weight.scale, *([] if weight.zero is None else [weight.zero])]
            self._kept = [part.float().contiguous() for part in parts]
            table, scale, *zero = (part.data_ptr() for part in self._kept)
            assert isinstance(weight.groups, int)
            argument = LookupArgument(table, scale, zero[0] if zero else None, weight.scale.shape[1], weight.groups)
            lookup, values = ctypes.byref(argument), weight.codes
            dtype = Dtype.CODE4 if len(weight.table) == 16 else Dtype.CODE8
        else:
            values, dtype = weight, DTYPES[weight.dtype]
        rows, columns = weight.shape
        what = (values.data_ptr(), dtype, rows, columns, values.stride(0) * (columns // values.shape[1]))
        how = (scheme.bits, scheme.group_size, int(clip == "mse"))
        self.arguments: Final = (*what, *how, *(part.data_ptr() for part in codes), lookup)
        """Those between the context and the cancel flag."""
