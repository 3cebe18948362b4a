"""A quantized weight together with its scheme: what a block hands to a kernel."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, dtype

from tiered.quant.quantize import QuantizedTensor, dequantize
from tiered.quant.schemes import Scheme


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A linear weight [out, in] as codes; the tensors are views of a block's memory. A stack has its matrices' rows."""

    codes: QuantizedTensor
    scheme: Scheme
    prepared: dict[str, Any] = field(default_factory=dict, repr=False)
    """What a kernel has prepared for this weight, by the kernel's name, so that it need not be made for every token."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight it stands for."""
        rows, groups = self.codes.scale.shape
        return rows, groups * self.scheme.group_size

    def part(self, start: int, stop: int) -> "QuantizedWeight":
        """Rows start..stop, still quantized. Nothing is copied."""
        q, scale, zero = self.codes
        return QuantizedWeight(QuantizedTensor(q[start:stop], scale[start:stop], zero[start:stop]), self.scheme)

    def rows(self, start: int, stop: int, dtype: dtype) -> Tensor:
        """Rows start..stop, dequantized: [stop - start, in] of `dtype`."""
        q, scale, zero = self.part(start, stop).codes
        return dequantize(q, scale, zero, self.scheme, dtype)
