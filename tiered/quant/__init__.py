"""Quantized weights as pure functions: schemes, packing, reference arithmetic, zstd, synthetic weights."""

from tiered.quant.pack import pack_int4, unpack_int4
from tiered.quant.quantize import QuantizedTensor, dequantize, quantize
from tiered.quant.schemes import GroupScheme, folded
from tiered.quant.synthetic import SyntheticPool
from tiered.quant.weight import QuantizedWeight
from tiered.quant.zstd import compress, decompress_frame, decompress_into, pays

__all__ = [
    "GroupScheme",
    "QuantizedTensor",
    "QuantizedWeight",
    "SyntheticPool",
    "compress",
    "decompress_frame",
    "decompress_into",
    "dequantize",
    "folded",
    "pack_int4",
    "pays",
    "quantize",
    "unpack_int4",
]
