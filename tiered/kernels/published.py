"""Codes of published checkpoints put in the order of a store, or made numbers, by the native library, or by torch where
there is none; and rows of a file that lie far apart.

In: tensors as checkpoints have them. Out: the same bits either way (`tiered/quant/published.py`). Called by `convert/`,
from several threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Final, get_args

import torch
from torch import Tensor

from tiered.kernels.library import Library, Status, load_library
from tiered.quant import published

_GROUPS: Final = (2, 32, 64, 128)
_PACKINGS: Final = {name: number for number, name in enumerate(get_args(published.Packing))}
"""The numbers of tk_packing (tiered_kernels.h)."""


def room_in(out: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor, in the memory `out`, u8, if that is large enough."""
    nbytes = prod(shape) * dtype.itemsize
    if out is None or out.numel() < nbytes:
        return torch.empty(tuple(shape), dtype=dtype)
    return out[:nbytes].view(dtype).view(tuple(shape))


def repacked(data: Tensor, packing: published.Packing, bits: int, group_size: int, out: Tensor | None = None) -> Tensor:
    """The codes, of 4 or 8 bits, as a store has them, u8 [rows, in * bits / 8]: of 4 bits planar in groups of
    `group_size`; where that is 2, neighbours share a byte. In the memory `out`, u8, if that is given and large enough;
    without it, they may be `data`'s own."""
    if packing == "rows" and (bits == 8 or group_size == 2):
        return _moved(data.view(torch.uint8), out)  # as they lie
    library, (height, width) = load_library(), data.shape
    rows = {"columns": width, "awq": 8 * width}.get(packing, height)
    in_ = {"columns": height * 32 // bits, "awq": height}.get(packing, width * data.itemsize * 8 // bits)
    is_whole = in_ % max(group_size, 16) == 0 if bits == 4 else in_ % 4 == 0
    is_words = data.dtype == torch.int32 if packing in ("columns", "awq") else True
    fits = is_whole and is_words and bits in (4, 8) and group_size in _GROUPS and data.stride(1) == 1
    if not isinstance(library, Library) or not fits or (packing == "awq" and bits != 4):
        return _moved(published.repacked(data, packing, bits, group_size), out)
    q = room_in(out, (rows, in_ * bits // 8), torch.uint8)
    stride = data.stride(0) * data.itemsize
    status = library.tk_repack(data.data_ptr(), stride, _PACKINGS[packing], rows, in_, bits, group_size, q.data_ptr())
    assert status == Status.OK, (data.shape, packing, bits, group_size)
    return q


@dataclass(frozen=True)
class CodedRows:
    """Rows of numbers as the codes that stand for them, which `widened` makes numbers, and `Kernels.quantize` others.

    Raises ValueError where scales and zeros have other rows, or other groups than all columns have.
    """

    codes: Tensor
    """u8 [rows, in] where `table` has 256 values, [rows, in / 2] where it has 16, the first code in the low nibble."""
    table: Tensor
    scale: Tensor  # float32 [rows, n]
    zero: Tensor | None  # float32 [rows, n]
    groups: int | Tensor
    """How many columns share a scale, the last ones perhaps fewer; or i64 [in], which of the n each column has."""

    def __post_init__(self) -> None:
        rows, columns = self.shape
        count = self.scale.shape[1] if isinstance(self.groups, Tensor) else -(-columns // self.groups)
        if self.scale.shape != (rows, count) or (self.zero is not None and self.zero.shape != self.scale.shape):
            raise ValueError(
                f"expected scales and zeros of {rows} rows and {count} groups, found {list(self.scale.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, in) of the numbers."""
        return self.codes.shape[0], self.codes.shape[1] * (2 if len(self.table) == 16 else 1)

    def rows(self, rows: slice) -> "CodedRows":
        """Some of the rows."""
        zero = None if self.zero is None else self.zero[rows]
        return replace(self, codes=self.codes[rows], scale=self.scale[rows], zero=zero)

    def numbers(self, out: Tensor | None = None) -> Tensor:
        """float32 [rows, in], in the memory `out`, u8, if that is large enough."""
        return widened(self.codes, self.table, self.scale, self.zero, self.groups, out)


def widened(
    codes: Tensor,
    table: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    groups: int | Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """(table[code] - zero) * scale in float32 [rows, in], each operation rounded on its own.

    `codes` u8 [rows, in] where `table` has 256 values, [rows, in / 2] where it has 16, the first code in the low
    nibble. `scale` and `zero` float32 [rows, n]. `groups`: how many columns share a number of them, the last ones
    perhaps fewer; or i64 [in], which of the n each column has. In the memory `out`, u8, if that is large enough.

    Raises ValueError where `scale` and `zero` have other rows, or other groups than all columns have. Where a number in
    `groups` is beyond the n: ValueError, too, or torch's IndexError where the native library does not compute.
    """
    library, bits = load_library(), 8 if len(table) == 256 else 4
    if not isinstance(library, Library) or (bits == 4 and isinstance(groups, int) and groups % 2):
        return _moved(published.widened(codes, table, scale, zero, groups), out)
    in_ = codes.shape[1] * 8 // bits
    if len(scale) != len(codes) or (zero is not None and zero.shape != scale.shape):
        raise ValueError(f"expected scales and zeros of {len(codes)} rows, found {list(scale.shape)}")
    parts = [part.contiguous() for part in (codes, table.float(), scale.float())]
    zeros = None if zero is None else zero.float().contiguous()
    group_of = None if isinstance(groups, int) else groups.int().contiguous()
    found = room_in(out, (len(codes), in_), torch.float32)
    status = library.tk_widen(
        parts[0].data_ptr(),
        bits,
        parts[1].data_ptr(),
        len(codes),
        in_,
        parts[2].data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        groups if isinstance(groups, int) else 0,
        scale.shape[1],
        None if group_of is None else group_of.data_ptr(),
        found.data_ptr(),
    )
    if status != Status.OK:
        raise ValueError(f"expected scales and zeros for all groups of {in_} columns, found {list(scale.shape)}")
    return found


def _moved(found: Tensor, out: Tensor | None) -> Tensor:
    return found if out is None else room_in(out, found.shape, found.dtype).copy_(found)


def read_rows(fd: int, offset: int, stride: int, nbytes: int, out: Tensor) -> int:
    """Read as many pieces of `nbytes`, `stride` bytes apart in a file, as fill `out` u8. Returns how many are whole:
    none without the native library, and those before the first that cannot be read. The caller reads the others."""
    library = load_library()
    if not isinstance(library, Library):
        return 0
    return int(library.tk_read_rows(fd, offset, stride, out.numel() // nbytes, nbytes, out.data_ptr()))
