"""Computing straight from stored weights: native kernels, and the torch reference that they are tested against."""

from tiered.kernels.attention import (
    AttentionCall,
    BlockTable,
    CacheFormat,
    Pages,
    Plane,
    contiguous_pages,
)
from tiered.kernels.attention_torch import attention_reference
from tiered.kernels.cancel import CancelFlag
from tiered.kernels.device_kernels import (
    DEVICE_KERNEL_NAMES,
    DeviceKernels,
    device_dtype,
    device_scratch_nbytes,
    triton_refusal,
)
from tiered.kernels.kernels import KERNEL_NAMES, Kernels, Mode, packed_row_nbytes, scratch_nbytes
from tiered.kernels.layers import LayerKernels
from tiered.kernels.library import Level, Library, load_library
from tiered.kernels.planes import decode_planes, encode_planes
from tiered.kernels.published import CodedRows, read_rows, repacked, room_in

__all__ = [
    "DEVICE_KERNEL_NAMES",
    "KERNEL_NAMES",
    "AttentionCall",
    "BlockTable",
    "CacheFormat",
    "CancelFlag",
    "CodedRows",
    "DeviceKernels",
    "Kernels",
    "LayerKernels",
    "Level",
    "Library",
    "Mode",
    "Pages",
    "Plane",
    "attention_reference",
    "contiguous_pages",
    "decode_planes",
    "device_dtype",
    "device_scratch_nbytes",
    "encode_planes",
    "load_library",
    "packed_row_nbytes",
    "read_rows",
    "repacked",
    "room_in",
    "scratch_nbytes",
    "triton_refusal",
]
