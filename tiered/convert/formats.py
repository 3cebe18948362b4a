"""How published checkpoints keep quantized weights: rows of each format as codes, or as numbers.

In: the tensors that hold one weight between them, and a function that reads rectangles of these. Out: a `Format`, which
says what weight it is and reads rows of it. `published.py` makes these, `quantized_reader.py` reads them.

A format's rows are those of the weight's matrix [rows, in]; its numbers are float32, each rounded once, as by
`dequantize`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from tiered.convert.source import StoredTensor
from tiered.quant import CodebookScheme, GroupScheme, QuantizedTensor, pack_int4
from tiered.quant.codebook import widened_scales
from tiered.quant.schemes import GROUP_SIZES

_COUNTED: Final = torch.arange(16, dtype=torch.float32)


class Read(Protocol):
    """Reads a rectangle of one of the weight's tensors; a vector is one row."""

    def __call__(self, part: str, rows: range | None = None, columns: range | None = None) -> Tensor: ...


class Format(Protocol):
    """One weight of a checkpoint in the form that it has there."""

    @property
    def stored(self) -> StoredTensor:
        """What it looks like."""

    def codes(self, read: Read, rows: range) -> QuantizedTensor:
        """These rows as `stored.scheme` lays them out, with scales in the source's dtype."""

    def numbers(self, read: Read, rows: range) -> Tensor:
        """These rows in float32 [rows, in]."""


@dataclass(frozen=True)
class Group:
    """Rows of a weight as unsigned codes: what `codes` and `numbers` of integer formats are made from."""

    q: Tensor  # u8 [rows, in * bits / 8], the first code of a byte in its lowest bits
    bits: int  # that each code takes there
    scale: Tensor  # [rows, groups]
    zero: Tensor  # [rows, groups], integers


@dataclass(frozen=True)
class Integers:
    """Integers in groups of `group_size` along `in`, with scales and zeros; `unpack` reads them.

    `group_of` [in] is the group of each column where columns are not in the order of their groups (act-order), which
    no scheme of a store holds.
    """

    stored: StoredTensor
    unpack: Callable[[Read, range], Group]
    group_of: Tensor | None = None

    def codes(self, read: Read, rows: range) -> QuantizedTensor:
        scheme, found = self.stored.scheme, self.unpack(read, rows)
        assert isinstance(scheme, GroupScheme)
        if found.bits == scheme.bits:
            q = found.q if scheme.bits == 8 else planar(found.q, scheme.group_size)
        else:
            q = pack_int4(unpacked(found.q, found.bits), scheme.group_size)
        repeats = self.stored.shape[1] // scheme.group_size // found.scale.shape[1]
        scale, zero = (each.repeat_interleave(repeats, 1) for each in (found.scale, found.zero))
        return QuantizedTensor(q, scale, zero.to(torch.uint8))

    def numbers(self, read: Read, rows: range) -> Tensor:
        found = self.unpack(read, rows)
        scale, zero = found.scale.float(), found.zero.float()
        q = looked_up(found.q, _COUNTED) if found.bits == 4 else unpacked(found.q, found.bits).float()
        if self.group_of is not None:
            return q.sub_(zero[:, self.group_of]).mul_(scale[:, self.group_of])
        groups = q.view(*scale.shape, -1)
        return groups.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).flatten(1)


@dataclass(frozen=True)
class Table:
    """Nibbles that are looked up in `table`, float32 [16], and multiplied by a scale for each group of values.

    `unpack` reads them, u8 [rows, in / 2], the first of a byte in its lowest bits, and scales [rows, groups], of a
    floating dtype or exponents (`E8M0`).
    """

    stored: StoredTensor
    unpack: Callable[[Read, range], tuple[Tensor, Tensor]]
    table: Tensor

    def codes(self, read: Read, rows: range) -> QuantizedTensor:
        scheme, (q, scale) = self.stored.scheme, self.unpack(read, rows)
        assert isinstance(scheme, CodebookScheme)
        scale = scale.repeat_interleave(2 * q.shape[1] // scheme.group_size // scale.shape[1], 1)
        return QuantizedTensor(planar(q, scheme.group_size), scale, torch.empty(len(q), 0, dtype=torch.uint8))

    def numbers(self, read: Read, rows: range) -> Tensor:
        q, scale = self.unpack(read, rows)
        groups = looked_up(q, self.table).view(*scale.shape, -1)
        return groups.mul_(widened_scales(scale).unsqueeze(-1)).flatten(1)


@dataclass(frozen=True)
class Floats:
    """Floats of 8 bits in `weight`, each rectangle of `block` (rows, columns) multiplied by one of the scales in
    `scale`, a matrix, or one number after the other. No scheme of a store holds them."""

    stored: StoredTensor
    weight: str
    scale: str
    block: tuple[int, int]
    is_vector: bool = False

    def codes(self, read: Read, rows: range) -> QuantizedTensor:
        raise AssertionError("no scheme holds them")

    def numbers(self, read: Read, rows: range) -> Tensor:
        height, width = self.stored.shape[-2:]
        blocks = -(-height // self.block[0])  # of each matrix of a stack; the last one may be cut
        places = torch.tensor([row // height * blocks + row % height // self.block[0] for row in rows])
        first, stop = int(places[0]), int(places[-1]) + 1
        scales = read(self.scale).reshape(-1, 1)[first:stop] if self.is_vector else read(self.scale, range(first, stop))
        # A byte is an exponent.
        scales = scales.float() if scales.dtype != torch.uint8 else widened_scales(scales)
        each, weight = scales[places - first], read(self.weight, rows)
        # Looked up: torch takes five times as long to widen each by itself.
        table = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(weight.dtype).float()
        values = looked_up(weight.view(torch.uint8), table)
        if width % self.block[1]:
            return values.mul_(each.repeat_interleave(self.block[1], 1)[:, :width])
        return values.view(*each.shape, -1).mul_(each.unsqueeze(-1)).flatten(1)


def group_scheme(bits: int, group_size: int) -> GroupScheme | None:
    """The scheme whose groups a group of `group_size` codes consists of; None where there is none."""
    fitting = [size for size in GROUP_SIZES if group_size % size == 0]
    return GroupScheme(max(bits, 4), max(fitting)) if fitting and bits in (2, 4, 8) else None


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """u8 codes [rows, n * 32 / bits] of words i32 [rows, n], or of bytes, that hold several each, the lowest first."""
    parts = packed.view(torch.uint8)
    if bits == 8:
        return parts
    mask = (1 << bits) - 1
    codes = torch.empty(*parts.shape, 8 // bits, dtype=torch.uint8)
    for place in range(8 // bits):
        torch.bitwise_and(parts >> (bits * place), mask, out=codes[..., place])
    return codes.flatten(1)


def planar(pairs: Tensor, group_size: int) -> Tensor:
    """What `pack_int4` makes of the codes in `pairs`, u8 [rows, in / 2], the first of a byte in its lowest bits.

    A byte of the first half of a group and the one as far into its second half are two bytes of the result, with the
    two nibbles in the middle changed over: 16 bits at a time that is several times as fast as code by code.
    """
    halves = pairs.view(-1, 2, group_size // 4)
    first, second = (halves[:, half].to(torch.int16) for half in range(2))
    both = second.bitwise_left_shift_(8).bitwise_or_(first)
    found = both & ~0x0FF0
    found |= (both & 0x0F00) >> 4
    found |= (both & 0x00F0) << 4
    return found.view(torch.uint8).view(pairs.shape)


def looked_up(codes: Tensor, table: Tensor) -> Tensor:
    """The values in `table`, float32, of codes u8 [rows, n]: one for each byte if it has 256, for each nibble, the
    lowest first, if it has 16."""
    if len(table) == 16:
        # Two at a time.
        entries = torch.stack((table.repeat(16), table.repeat_interleave(16)), 1).view(torch.int64).view(-1)
    else:
        entries = table
    found = entries.index_select(0, codes.reshape(-1).int())
    return found.view(torch.float32).view(len(codes), -1)
