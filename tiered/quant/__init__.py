"""Quantized weights as pure functions: schemes, packing, reference arithmetic, coded exponents, synthetic weights."""

from tiered.quant.pack import pack_int4, unpack_int4
from tiered.quant.planes import PLANE_DTYPES
from tiered.quant.quantize import QuantizedTensor, dequantize, quantize
from tiered.quant.schemes import GroupScheme, folded
from tiered.quant.synthetic import SyntheticPool
from tiered.quant.weight import QuantizedWeight

__all__ = [
    "PLANE_DTYPES",
    "GroupScheme",
    "QuantizedTensor",
    "QuantizedWeight",
    "SyntheticPool",
    "dequantize",
    "folded",
    "pack_int4",
    "quantize",
    "unpack_int4",
]
