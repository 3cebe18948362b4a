"""Codes as published checkpoints pack them: the reference, in torch, of what the native library does in one pass.

A packing says where the codes of a weight [rows, in] are; codes of less than 8 bits share bytes, and those of a row
are consecutive in its words, but in AWQ's.

    rows             [rows, in * bits / 32] words, or bytes, the first code in the lowest bits
    rows_high_first  [rows, in / 2] bytes, the first nibble in the high half
    columns          [in * bits / 32, rows] words of 32 bits, the first code in the lowest bits
    awq              [in, rows / 8] words, a nibble of each of 8 rows: of 0, 2, 4, 6, 1, 3, 5, 7, the lowest first
"""

from typing import Final, Literal

import torch
from torch import Tensor

from tiered.quant.pack import pack_int4

Packing = Literal["rows", "rows_high_first", "columns", "awq"]
"""In the order of the native library's numbers (tk_packing)."""

_AWQ_ROWS: Final = (0, 2, 4, 6, 1, 3, 5, 7)


def published_codes(data: Tensor, packing: Packing, bits: int) -> Tensor:
    """u8 [rows, in], one code in a byte; `bits` is 2, 4 or 8. Of "awq", rows are a multiple of 8."""
    if packing == "awq":
        parts = data.t().contiguous().view(torch.uint8).view(*data.t().shape, 4)
        codes = torch.empty(len(parts), 8, parts.shape[1], dtype=torch.uint8)
        for nibble, row in enumerate(_AWQ_ROWS):
            torch.bitwise_and(parts[..., nibble // 2] >> (4 * (nibble % 2)), 15, out=codes[:, row])
        return codes.flatten(0, 1)
    parts = (data.t().contiguous() if packing == "columns" else data).view(torch.uint8)
    if bits == 8:
        return parts
    places = range(0, 8, bits) if packing != "rows_high_first" else (4, 0)
    return torch.stack([(parts >> place) & ((1 << bits) - 1) for place in places], -1).flatten(1)


def repacked(data: Tensor, packing: Packing, bits: int, group_size: int) -> Tensor:
    """The codes, of 4 or 8 bits, as a store has them, u8 [rows, in * bits / 8]: of 4 bits planar in groups of
    `group_size`; where that is 2, neighbours share a byte."""
    codes = published_codes(data, packing, bits)
    return codes if bits == 8 else pack_int4(codes, group_size)


def widened(codes: Tensor, table: Tensor, scale: Tensor, zero: Tensor | None, groups: int | Tensor) -> Tensor:
    """(table[code] - zero) * scale in float32 [rows, in], each operation rounded on its own.

    `codes` u8 [rows, in] where `table` has 256 values, [rows, in / 2] where it has 16, the first code in the low
    nibble. `scale` and `zero` float32 [rows, n]. `groups`: how many columns share a number of them, the last ones
    perhaps fewer; or i64 [in], which of the n each column has.
    """
    if len(table) == 16:
        codes = published_codes(codes, "rows", 4)
    values = table[codes.int()]
    if isinstance(groups, int):
        groups = torch.arange(codes.shape[1]) // groups
    if zero is not None:
        values.sub_(zero[:, groups])
    return values.mul_(scale[:, groups])
