"""Frames of 16-bit floats with coded exponents, made and read by the native library, or by numpy where there is none.

In: bytes. Out: bytes, the same either way. Called by `convert/`, which makes frames, and by the threads of
`io/disk.py`.
"""

import ctypes
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from tiered.kernels.library import Dtype, Library, Status, load_library
from tiered.quant.planes import HEADER_NBYTES, damaged_frame, decode_frame, encode_frame

_DTYPES: Final = {torch.bfloat16: Dtype.BF16, torch.float16: Dtype.F16}


def encode_planes(values: memoryview, dtype: torch.dtype) -> memoryview:
    """The frame of the bytes of some values of `dtype`, bfloat16 or float16."""
    source, library = np.frombuffer(values, np.uint8), load_library()
    if not isinstance(library, Library):
        return encode_frame(source, dtype).data
    frame = np.empty(HEADER_NBYTES + len(source), np.uint8)
    nbytes = library.tk_encode_planes(
        _DTYPES[dtype], source.ctypes.data, len(source) // 2, frame.ctypes.data, len(frame)
    )
    assert nbytes > 0, (dtype, len(source))
    return frame[:nbytes].data


def decode_planes(
    frames: memoryview, sizes: Sequence[int], frame_nbytes: int, out: memoryview, dtype: torch.dtype, name: str
) -> None:
    """Fill `out` with the values of `frames`, of `sizes` bytes and end to end; each but the last has `frame_nbytes` of
    them. The caller has checked that the sizes add up. Raises StoreError, which names `name`, where a frame is damaged.
    """
    source, target, library = np.frombuffer(frames, np.uint8), np.frombuffer(out, np.uint8), load_library()
    if not isinstance(library, Library):
        start = 0
        for number, size in enumerate(sizes):
            decode_frame(source[start : start + size], target[number * frame_nbytes :][:frame_nbytes], dtype, name)
            start += size
        return
    status = library.tk_decode_planes(
        _DTYPES[dtype],
        source.ctypes.data,
        (ctypes.c_int64 * len(sizes))(*sizes),
        len(sizes),
        frame_nbytes // 2,
        target.ctypes.data,
        len(target) // 2,
    )
    if status != Status.OK:
        raise damaged_frame(name)
