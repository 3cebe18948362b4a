"""Quantized weights as pure functions: schemes, packing, reference arithmetic, coded exponents, synthetic weights."""

from tiered.quant.codebook import CODEBOOKS, E8M0
from tiered.quant.pack import pack_int4, unpack_int4
from tiered.quant.planes import PLANE_DTYPES
from tiered.quant.quantize import QuantizedTensor, dequantize, quantize
from tiered.quant.schemes import CodebookScheme, GroupScheme, Scheme, folded
from tiered.quant.synthetic import SyntheticPool
from tiered.quant.weight import QuantizedWeight

__all__ = [
    "CODEBOOKS",
    "E8M0",
    "PLANE_DTYPES",
    "CodebookScheme",
    "GroupScheme",
    "QuantizedTensor",
    "QuantizedWeight",
    "Scheme",
    "SyntheticPool",
    "dequantize",
    "folded",
    "pack_int4",
    "quantize",
    "unpack_int4",
]
