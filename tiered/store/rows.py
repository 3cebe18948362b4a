"""A table whose rows are read one by one: each row is one record, with all that it takes to use it and to test it.

    record = scales | codes | zeros | checksum          of a row that is quantized
             numbers | checksum                         of any other

Records have one size, a multiple of 4 bytes, and lie end to end. The checksum is the low half of xxh3_64 over what
comes before it, with the row's number as seed: neither damage nor another row passes for it, and testing one row reads
no other.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Final

import torch
import xxhash

from tiered.quant import QuantizedTensor, QuantizedWeight, Scheme
from tiered.store.format import DTYPE_NAMES, DTYPES
from tiered.units import round_up

ROWS: Final = "rows"
"""Suffix of the tensor of records, and the name of the part."""
_CHECK_NBYTES: Final = 4
_CHECK_MASK: Final = (1 << 8 * _CHECK_NBYTES) - 1


@dataclass(frozen=True)
class RowLayout:
    """What a record holds: `width` numbers in the codes of `scheme`, or, where that is None, as `dtype`."""

    width: int
    scheme: Scheme | None
    dtype: torch.dtype = torch.uint8

    def __post_init__(self) -> None:
        if self.scheme is not None and self.dtype != torch.uint8:
            raise ValueError(f"rows of {self.scheme.name} in {self.dtype}, expected U8")
        _ = self.nbytes  # raises for a width that the scheme cannot hold

    @classmethod
    def parse(cls, name: str, width: int, scheme: Scheme | None) -> "RowLayout":
        """The layout that a block's metadata calls `name`, the dtype of what is in a record. Raises KeyError,
        ValueError or ConfigError."""
        return cls(width, scheme, DTYPES[name])

    @property
    def name(self) -> str:
        return DTYPE_NAMES[self.dtype]

    @cached_property
    def _stops(self) -> tuple[int, ...]:
        """Where in a record each part ends."""
        if self.scheme is None:
            return (self.width * self.dtype.itemsize,)
        # Scales come first, so that they are aligned.
        columns = self.scheme.scale_shape, self.scheme.q_shape, self.scheme.zero_shape
        scale, codes, zeros = (shape(1, self.width)[1] for shape in columns)
        return tuple(accumulate((scale * self.scheme.scale_dtype.itemsize, codes, zeros)))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one record."""
        return round_up(self._stops[-1], _CHECK_NBYTES) + _CHECK_NBYTES

    def pack(self, row: torch.Tensor | QuantizedTensor, first: int) -> torch.Tensor:
        """Records uint8 [rows, nbytes] of the rows from number `first` on, which are [rows, width] or their codes."""
        parts = [row] if isinstance(row, torch.Tensor) else [row.scale, row.q, row.zero]
        records = torch.zeros(len(parts[0]), self.nbytes, dtype=torch.uint8)
        start = 0
        for part, stop in zip(parts, self._stops, strict=True):
            records[:, start:stop] = part.view(torch.uint8)
            start = stop
        data = memoryview(records.numpy()).cast("B")  # type: ignore[arg-type]  # numpy's stubs lack the buffer protocol
        for number in range(len(records)):
            record = data[number * self.nbytes : (number + 1) * self.nbytes]
            record[-_CHECK_NBYTES:] = self._checksum(record, first + number).to_bytes(_CHECK_NBYTES, "little")
        return records

    def is_good(self, record: memoryview, row: int) -> bool:
        """Whether the bytes `record` are those of row number `row`."""
        return self._checksum(record, row) == int.from_bytes(record[-_CHECK_NBYTES:], "little")

    def view(self, records: torch.Tensor) -> torch.Tensor | QuantizedWeight:
        """The rows of `records` uint8 [rows, nbytes]: numbers [rows, width], or their codes. Nothing is copied."""
        if self.scheme is None:
            return records[:, : self._stops[0]].view(self.dtype)
        scale, codes, zero = self._stops
        q, zeros = records[:, scale:codes], records[:, codes:zero]
        return QuantizedWeight(QuantizedTensor(q, records[:, :scale].view(self.scheme.scale_dtype), zeros), self.scheme)

    @staticmethod
    def _checksum(record: memoryview, row: int) -> int:
        return xxhash.xxh3_64_intdigest(record[:-_CHECK_NBYTES], row) & _CHECK_MASK
