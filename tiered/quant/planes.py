"""16-bit floats with their exponents coded: the reference, in numpy, of what the native library does in one pass.

Of trained weights the exponents carry some 2.6 bits, all other bits are noise. A value's bits, rotated left by one, are
its exponent, its mantissa and its sign. The low byte is stored as it is; of the high byte the exponent's bits are the
symbol (bf16: all 8, fp16: 5) and the others are stored as they are. Each frame has a table of its ten most frequent
symbols: 0 to 2 are two bits, 3 to 9 these two bits set and three more, and all five set stand for one of the others,
whose high byte is among the escapes. Frames are independent, so that threads share them out; a frame that would not
shrink holds its values as they are. `tiered/kernels/native/planes.h` says where in a frame everything lies.
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from tiered.errors import StoreError
from tiered.units import KIB

FRAME_NBYTES: Final = 256 * KIB
"""Bytes of values in a frame: small beside a chunk, whose last frame may leave a gap, and large beside its table."""
HEADER_NBYTES: Final = 32
PLANE_DTYPES: Final = {torch.bfloat16: 0, torch.float16: 3}
"""What can be coded, and how many bits of the high byte are no exponent."""
_SYMBOLS: Final = 10

Bytes = NDArray[np.uint8]


def encode_frame(values: Bytes, dtype: torch.dtype) -> Bytes:
    """The frame of the bytes of some values."""
    extra, words = PLANE_DTYPES[dtype], values.view(np.uint16)
    rotated = words << 1 | words >> 15
    high, low = (rotated >> 8).astype(np.uint8), rotated.astype(np.uint8)
    order = np.argsort(-np.bincount(high >> extra, minlength=256), kind="stable")[:_SYMBOLS]
    codes = np.full(256, _SYMBOLS, np.uint8)
    codes[order] = np.arange(_SYMBOLS)
    code = codes[high >> extra]
    longer, escaped = code[code > 2] - 3, high[code == _SYMBOLS]
    fill = -len(words) % 64
    first = [np.minimum(code, 3) >> bit for bit in range(2)] + [high >> bit for bit in range(extra)]
    bits = np.stack([_packed(np.pad(bit, (0, fill))).reshape(-1, 8) for bit in first], axis=1)
    room = 64 * (len(longer) // 64 + 2)
    more = [_packed(np.pad(longer >> bit, (0, room - len(longer)))) for bit in range(3)]
    table = np.pad((order << extra).astype(np.uint8), (0, 16 - _SYMBOLS))
    numbers = np.array([1, len(longer), len(escaped), 0], "<u4").view(np.uint8)
    coded = np.concatenate([table, numbers, np.pad(low, (0, fill)), bits.reshape(-1), *more, escaped])
    plain = HEADER_NBYTES + len(values)
    return coded if len(coded) < plain else np.concatenate([np.zeros(HEADER_NBYTES, np.uint8), values])


def decode_frame(frame: Bytes, out: Bytes, dtype: torch.dtype, name: str = "tensor") -> None:
    """Fill `out` with the bytes of the frame's values. Raises StoreError, which names `name`, where it is damaged."""
    extra, count = PLANE_DTYPES[dtype], len(out) // 2
    groups = -(-count // 64)
    kind, longer, escapes = (int(n) for n in _taken(frame, 16, 12, name).view("<u4"))
    position = HEADER_NBYTES
    if kind == 0:
        out[:] = _taken(frame, position, len(out), name)
        return
    bits_nbytes, more_nbytes = groups * (2 + extra) * 8, longer // 64 * 8 + 16
    # Before anything is made of them: damaged numbers may claim any size.
    if kind != 1 or position + 64 * groups + bits_nbytes + 3 * more_nbytes + escapes > len(frame):
        raise damaged_frame(name)
    low = frame[position : position + count]
    position += 64 * groups
    words = frame[position : position + bits_nbytes].reshape(groups, 2 + extra, 8)
    first = [_unpacked(words[:, bit].reshape(-1), count) for bit in range(2 + extra)]
    position += bits_nbytes
    code = first[0] + 2 * first[1]
    is_longer = code == 3
    if np.count_nonzero(is_longer) != longer:
        raise damaged_frame(name)
    for bit in range(3):
        code[is_longer] += _unpacked(frame[position : position + more_nbytes], longer) << bit
        position += more_nbytes
    high = frame[:16][code]
    for bit in range(extra):
        high |= first[2 + bit] << bit
    is_escaped = code == _SYMBOLS
    if np.count_nonzero(is_escaped) != escapes:
        raise damaged_frame(name)
    high[is_escaped] = frame[position : position + escapes]
    rotated = high.astype(np.uint16) << 8 | low
    out.view(np.uint16)[:] = rotated >> 1 | rotated << 15


def damaged_frame(name: str) -> StoreError:
    """The error where the numbers of a frame of `name` do not fit its size or its codes."""
    return StoreError(f"{name}: a damaged frame of exponents; run 'tiered verify'")


def _taken(frame: Bytes, start: int, nbytes: int, name: str) -> Bytes:
    if start + nbytes > len(frame):
        raise damaged_frame(name)
    return frame[start : start + nbytes]


def _packed(values: Bytes) -> Bytes:
    """The lowest bits of `values`, the first in the lowest bit of the first byte."""
    return np.packbits(values & 1, bitorder="little")


def _unpacked(packed: Bytes, count: int) -> Bytes:
    return np.unpackbits(packed, count=count, bitorder="little")
