"""Two 4-bit codes to a byte and back: pure functions over u8 tensors.

Nibbles are group-planar: of each group's `group_size / 2` bytes the low nibbles hold values
0 .. group_size/2 - 1 and the high nibbles the rest, both in order. So one wide load yields two runs of
consecutive weights with one mask and one shift, and any slice of whole groups unpacks on its own.
"""

import torch
from torch import Tensor

from tiered.errors import ConfigError


def pack_int4(codes: Tensor, group_size: int) -> Tensor:
    """u8 [out, in / 2] from u8 codes [out, in], each of which must be below 16."""
    _check(codes, group_size, "codes")
    rows, columns = codes.shape
    groups = codes.reshape(rows, columns // group_size, 2, group_size // 2)
    return (groups[:, :, 1] << 4).bitwise_or_(groups[:, :, 0]).view(rows, columns // 2)


def unpack_int4(packed: Tensor, group_size: int) -> Tensor:
    """u8 codes [out, in] from u8 [out, in / 2]; the inverse of `pack_int4`."""
    _check(packed, group_size // 2, "packed codes")
    half = group_size // 2
    rows, nbytes = packed.shape
    groups = packed.reshape(rows, nbytes // half, half)
    codes = packed.new_empty(rows, nbytes // half, 2, half)
    torch.bitwise_and(groups, 15, out=codes[:, :, 0])
    torch.bitwise_right_shift(groups, 4, out=codes[:, :, 1])
    return codes.view(rows, nbytes * 2)


def _check(tensor: Tensor, multiple: int, what: str) -> None:
    if tensor.dtype != torch.uint8 or tensor.dim() != 2 or tensor.shape[1] % multiple:
        raise ConfigError(
            f"{what}: expected u8 [rows, multiple of {multiple}], found {tensor.dtype} {list(tensor.shape)}"
        )
