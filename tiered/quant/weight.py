"""A quantized weight together with its scheme: what a block hands to a kernel."""

from dataclasses import dataclass

from torch import Tensor, dtype

from tiered.quant.quantize import QuantizedTensor, dequantize
from tiered.quant.schemes import GroupScheme


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A linear weight [out, in] as codes; the tensors are views of a block's memory."""

    codes: QuantizedTensor
    scheme: GroupScheme

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight it stands for."""
        rows, groups = self.codes.scale.shape
        return rows, groups * self.scheme.group_size

    def rows(self, start: int, stop: int, dtype: dtype) -> Tensor:
        """Rows start..stop, dequantized: [stop - start, in] of `dtype`."""
        part = slice(start, stop)
        q, scale, zero = self.codes
        return dequantize(q[part], scale[part], zero[part], self.scheme, dtype)
