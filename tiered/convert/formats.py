"""How published checkpoints keep quantized weights: rows of each format as codes, or as numbers.

In: the tensors that hold one weight between them, and a function that reads rectangles of these. Out: a `Format`, which
says what weight it is and reads rows of it. `published.py` makes these, `quantized_reader.py` reads them.

A format's rows are those of the weight's matrix [rows, in].
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from tiered.convert.source import StoredTensor
from tiered.kernels import CodedRows, repacked, room_in
from tiered.quant import CodebookScheme, GroupScheme, QuantizedTensor, pack_int4
from tiered.quant.codebook import widened_scales
from tiered.quant.published import Packing, published_codes
from tiered.quant.schemes import GROUP_SIZES

_COUNTED: Final = {bits: torch.arange(1 << bits, dtype=torch.float32) for bits in (4, 8)}
_FEW_CODES: Final = 1 << 16
"""That are one to a byte at a time."""
_PAIRS: Final = 2
"""As the size of a group: the codes of neighbours share a byte."""


class Read(Protocol):
    """Reads a rectangle of one of the weight's tensors; a vector is one row."""

    def __call__(self, part: str, rows: range | None = None, columns: range | None = None) -> Tensor: ...


class Format(Protocol):
    """One weight of a checkpoint in the form that it has there."""

    @property
    def stored(self) -> StoredTensor:
        """What it looks like."""

    def codes(self, read: Read, rows: range, out: Tensor | None = None) -> QuantizedTensor:
        """These rows as `stored.scheme` lays them out, with scales in the source's dtype. The codes are in the memory
        `out`, u8, if that is large enough; they do not refer to what was read where it is given."""

    def coded(self, read: Read, rows: range, out: Tensor | None = None) -> CodedRows:
        """What these rows stand for: numbers that are not made yet. Codes that do not lie in the checkpoint as they
        are wanted are put in order in the memory `out`, u8, if that is large enough."""


@dataclass(frozen=True)
class Group:
    """Rows of a weight as unsigned codes: what `codes` and `coded` of integer formats are made from."""

    words: Tensor
    """The codes of these rows as `packing` and `bits` say; `skipped` rows before them and some after them may be in
    the same words."""
    packing: Packing
    bits: int
    scale: Tensor  # [rows, groups]
    zero: Tensor  # [rows, groups], integers
    skipped: int = 0

    def in_groups(self, group_size: int, out: Tensor | None = None) -> Tensor:
        """The codes in 4 bits, planar in groups of `group_size`, or in 8 bits: u8 [rows, in * bits / 8], as
        `repacked` says."""
        if self.bits == 2:  # of which nothing holds so many in a byte
            q = self._widened_to_nibbles(group_size, out)
        else:
            q = repacked(self.words, self.packing, self.bits, group_size, out)
        return q[self.skipped :][: len(self.scale)]

    def _widened_to_nibbles(self, group_size: int, out: Tensor | None) -> Tensor:
        """Codes of 2 bits in 4, a few rows at a time: torch's temporaries are several bytes for each."""
        words = self.words if self.packing == "columns" else self.words.t()
        rows, in_ = words.shape[1], self.words.numel() * self.words.itemsize * 4 // max(1, words.shape[1])
        q = room_in(out, (rows, in_ // 2), torch.uint8)
        step = max(1, _FEW_CODES // max(1, in_))
        for start in range(0, rows, step):
            some = words[:, start : start + step]
            codes = published_codes(some if self.packing == "columns" else some.t(), self.packing, 2)
            q[start : start + step] = pack_int4(codes, group_size)
        return q


@dataclass(frozen=True)
class Integers:
    """Integers in groups of `group_size` along `in`, with scales and zeros; `unpack` reads them.

    `group_of` [in] is the group of each column where columns are not in the order of their groups (act-order), which
    no scheme of a store holds.
    """

    stored: StoredTensor
    unpack: Callable[[Read, range], Group]
    group_of: Tensor | None = None

    def codes(self, read: Read, rows: range, out: Tensor | None = None) -> QuantizedTensor:
        scheme, found = self.stored.scheme, self.unpack(read, rows)
        assert isinstance(scheme, GroupScheme)
        repeats = self.stored.shape[1] // scheme.group_size // found.scale.shape[1]
        scale, zero = (each.repeat_interleave(repeats, 1) for each in (found.scale, found.zero))
        return QuantizedTensor(found.in_groups(scheme.group_size, out), scale, zero.to(torch.uint8))

    def coded(self, read: Read, rows: range, out: Tensor | None = None) -> CodedRows:
        found, in_ = self.unpack(read, rows), self.stored.shape[1]
        groups = in_ // found.scale.shape[1] if self.group_of is None else self.group_of
        table = _COUNTED[max(found.bits, 4)]
        return CodedRows(found.in_groups(_PAIRS, out), table, found.scale.float(), found.zero.float(), groups)


@dataclass(frozen=True)
class Table:
    """Nibbles that are looked up in `table`, float32 [16], and multiplied by a scale for each group of values.

    `unpack` reads them, u8 [rows, in / 2], packed as `packing` says, and scales [rows, groups], of a floating dtype or
    exponents (`E8M0`).
    """

    stored: StoredTensor
    unpack: Callable[[Read, range], tuple[Tensor, Tensor]]
    table: Tensor
    packing: Packing = "rows"

    def codes(self, read: Read, rows: range, out: Tensor | None = None) -> QuantizedTensor:
        scheme, (q, scale) = self.stored.scheme, self.unpack(read, rows)
        assert isinstance(scheme, CodebookScheme)
        scale = scale.repeat_interleave(2 * q.shape[1] // scheme.group_size // scale.shape[1], 1)
        q = repacked(q, self.packing, 4, scheme.group_size, out)
        return QuantizedTensor(q, scale, torch.empty(len(q), 0, dtype=torch.uint8))

    def coded(self, read: Read, rows: range, out: Tensor | None = None) -> CodedRows:
        q, scale = self.unpack(read, rows)
        q = q if self.packing == "rows" else repacked(q, self.packing, 4, _PAIRS, out)
        return CodedRows(q, self.table, widened_scales(scale), None, self.stored.shape[-1] // scale.shape[1])


@dataclass(frozen=True)
class Floats:
    """Floats of 8 bits in `weight`, each rectangle of `block` (rows, columns) multiplied by one of the scales in
    `scale`, a matrix, or one number after the other. No scheme of a store holds them."""

    stored: StoredTensor
    weight: str
    scale: str
    block: tuple[int, int]
    is_vector: bool = False

    def codes(self, read: Read, rows: range, out: Tensor | None = None) -> QuantizedTensor:
        raise AssertionError("no scheme holds them")

    def coded(self, read: Read, rows: range, out: Tensor | None = None) -> CodedRows:
        height = self.stored.shape[-2]
        blocks = -(-height // self.block[0])  # of each matrix of a stack; the last one may be cut
        row = torch.arange(rows.start, rows.stop)
        places = row // height * blocks + row % height // self.block[0]
        first, stop = int(places[0]), int(places[-1]) + 1
        scales = read(self.scale).reshape(-1, 1)[first:stop] if self.is_vector else read(self.scale, range(first, stop))
        # A byte is an exponent.
        scales = scales.float() if scales.dtype != torch.uint8 else widened_scales(scales)
        weight = read(self.weight, rows)
        codes = weight.view(torch.uint8)
        return CodedRows(codes, _float_table(weight.dtype), scales[places - first], None, self.block[1])


@functools.cache
def _float_table(dtype: torch.dtype) -> Tensor:
    """The numbers that the 256 codes of a float of 8 bits stand for, float32."""
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()


def group_scheme(bits: int, group_size: int) -> GroupScheme | None:
    """The scheme whose groups a group of `group_size` codes consists of; None where there is none."""
    fitting = [size for size in GROUP_SIZES if group_size % size == 0]
    return GroupScheme(max(bits, 4), max(fitting)) if fitting and bits in (2, 4, 8) else None
