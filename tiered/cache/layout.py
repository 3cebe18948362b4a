"""How keys and values lie in the KV cache: records of one page each, and the tables by which attention finds them.

A *record* is the keys and values of one page (64 tokens) of one sequence in one layer, for all its key heads:

    keys: codes [heads, 64, ..], scale, zero | values: codes [heads, 64, ..], scale, zero | up to a multiple of 4096

Records lie at multiples of `record_nbytes` in flat uint8 memory, one stretch of it per layer. In 16 bits a record
holds the compute dtype and is written token by token (`dense`); in 8 and 4 bits it is written once, when its page is
complete (`store`).

    tables = layout.tables(offsets)                                  # byte offsets, which serve many layers
    keys, values = tables.pages(memory, (new_keys, new_values))      # in each layer, from its own memory
"""

from dataclasses import dataclass
from typing import Final, Self

import torch

from tiered.cache.quantize import QuantizedPages, group_size, quantize_keys, quantize_values
from tiered.errors import ConfigError
from tiered.kernels.attention import PAGE_TOKENS, CacheFormat, Pages, Plane
from tiered.plan.kv import PART_ALIGNMENT, KVShape, record_nbytes
from tiered.units import PAGE, round_up

_FORMATS: Final = {
    16: (CacheFormat.BF16, CacheFormat.BF16),
    8: (CacheFormat.INT8_CHANNEL, CacheFormat.INT8),
    4: (CacheFormat.INT4_CHANNEL, CacheFormat.INT4),
}
_PIECE_ELEMENTS: Final = 1 << 19
"""Keys or values that are quantized at a time, at least one page: their float32 copies stay small and near."""


class PageLayout:
    """Records of a model's KV cache in 16, 8 or 4 bits. Raises ConfigError where there are no such records."""

    def __init__(self, shape: KVShape, bits: int, tokens: int = PAGE_TOKENS) -> None:
        """`tokens`: slots of a page that are ever filled, where no sequence is as long as a page. 16 bits only."""
        slots = tokens if bits == 16 else PAGE_TOKENS
        self.record_nbytes = record_nbytes(shape, bits, slots)
        self.shape, self.bits = shape, bits
        self.keys_format, self.values_format = _FORMATS[bits]
        self._keys = _Parts.of(shape, self.keys_format, 0, slots)
        self._values = _Parts.of(shape, self.values_format, self._keys.stop, slots)
        assert self._values.stop <= self.record_nbytes < self._values.stop + PAGE

    def tables(self, offsets: torch.Tensor) -> "Tables":
        """The pages of a batch, for all layers whose records lie alike.

        `offsets` [sequences, pages] int64: the byte at which each record begins; -1 where there is none.
        """
        return Tables(_PagesTable.of(self._keys, offsets), _PagesTable.of(self._values, offsets))

    def dense(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [records, heads, 64, head_dim] of all records in `memory`, in place. 16 bits only."""
        assert self.bits == 16, "these records are quantized; a complete page is stored at once"
        records = memory.view(-1, self.record_nbytes)
        return self._keys.codes.every(records), self._values.codes.every(records)

    def store(self, memory: torch.Tensor, offsets: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write complete pages, keys and values [pages, heads, 64, head_dim], to the records at `offsets` [pages]."""
        expected = (len(offsets), self.shape.heads, PAGE_TOKENS, self.shape.head_dim)
        for states in (keys, values):
            if states.shape != expected:
                raise ConfigError(f"KV cache: pages {list(states.shape)}, expected {list(expected)}")
        starts: list[int] = offsets.tolist()
        if self.bits == 16:
            self._keys.codes.write(memory, starts, keys)
            self._values.codes.write(memory, starts, values)
            return
        step = max(1, _PIECE_ELEMENTS // (self.shape.heads * PAGE_TOKENS * self.shape.head_dim))
        for i in range(0, len(starts), step):
            rows = slice(i, i + step)
            self._keys.write(memory, starts[rows], quantize_keys(keys[rows], self.bits))
            self._values.write(memory, starts[rows], quantize_values(values[rows], self.bits))


@dataclass(frozen=True, eq=False)
class Tables:
    """Where the pages of a batch are, from the beginning of whichever layer's memory is given."""

    keys: "_PagesTable"
    values: "_PagesTable"

    def pages(self, memory: torch.Tensor, recent: tuple[Plane, Plane] | None = None) -> tuple[Pages, Pages]:
        """Keys and values as attention takes them.

        `memory`: the layer's records, uint8. `recent`: keys and values of pages that are read as they were computed,
        for the same sequences and pages (see `Pages.recent`).
        """
        new_keys, new_values = recent or (None, None)
        return self.keys.pages(memory, new_keys), self.values.pages(memory, new_values)


@dataclass(frozen=True)
class _Part:
    """Codes, scales or zeros in a record: [heads, tokens, width] of `dtype` from byte `start` on."""

    start: int
    size: tuple[int, int, int]
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        heads, tokens, width = self.size
        return self.start + heads * tokens * width * self.dtype.itemsize

    def every(self, records: torch.Tensor) -> torch.Tensor:
        """[records, heads, tokens, width]: this part of all records, uint8 [records, record_nbytes]."""
        return records[:, self.start : self.stop].view(self.dtype).view(-1, *self.size)

    def write(self, memory: torch.Tensor, offsets: list[int], states: torch.Tensor) -> None:
        """Write states [pages, heads, tokens, width] to the records at `offsets`."""
        for offset, page in zip(offsets, states, strict=True):
            memory[offset + self.start : offset + self.stop].view(self.dtype).view(self.size).copy_(page)


@dataclass(frozen=True)
class _Parts:
    """What a record holds of keys, or of values; scales and zeros where they are quantized."""

    format: CacheFormat
    codes: _Part
    scale: _Part | None = None
    zero: _Part | None = None

    @classmethod
    def of(cls, shape: KVShape, kind: CacheFormat, start: int, slots: int = PAGE_TOKENS) -> Self:
        """The parts from byte `start` of the record on."""
        start = round_up(start, PART_ALIGNMENT)
        if kind is CacheFormat.BF16:
            return cls(kind, _Part(start, (shape.heads, slots, shape.head_dim), getattr(torch, shape.dtype)))
        codes = _Part(start, (shape.heads, PAGE_TOKENS, shape.head_dim * kind.bits // 8), torch.uint8)
        groups = shape.head_dim // group_size(shape.head_dim)
        side = (shape.heads, 1, shape.head_dim) if kind.per_channel else (shape.heads, PAGE_TOKENS, groups)
        scale = _Part(round_up(codes.stop, PART_ALIGNMENT), side, torch.float16)
        return cls(kind, codes, scale, _Part(round_up(scale.stop, PART_ALIGNMENT), side, torch.uint8))

    @property
    def stop(self) -> int:
        return self.codes.stop if self.zero is None else self.zero.stop

    def write(self, memory: torch.Tensor, offsets: list[int], pages: QuantizedPages) -> None:
        assert self.scale is not None and self.zero is not None
        self.codes.write(memory, offsets, pages.codes)
        self.scale.write(memory, offsets, pages.scale)
        self.zero.write(memory, offsets, pages.zero)


@dataclass(frozen=True, eq=False)
class _PagesTable:
    """`Pages` whose memory is not known yet."""

    format: CacheFormat
    planes: tuple["_PlaneTable", ...]
    """Codes and, where they are quantized, scales and zeros."""

    @classmethod
    def of(cls, parts: _Parts, offsets: torch.Tensor) -> Self:
        missing = offsets < 0
        gaps = missing if bool(missing.any()) else None
        wanted = (parts.codes, parts.scale, parts.zero)
        return cls(parts.format, tuple(_PlaneTable.of(part, offsets, gaps) for part in wanted if part is not None))

    def pages(self, memory: torch.Tensor, recent: Plane | None) -> Pages:
        codes, *sides = [table.plane(memory) for table in self.planes]
        scale, zero = sides or (None, None)
        return Pages(self.format, codes, scale, zero, recent)


@dataclass(frozen=True, eq=False)
class _PlaneTable:
    """A `Plane` whose memory is not known yet."""

    dtype: torch.dtype
    offsets: torch.Tensor
    head_stride: int
    token_stride: int
    has_gaps: bool

    @classmethod
    def of(cls, part: _Part, offsets: torch.Tensor, gaps: torch.Tensor | None) -> Self:
        elements = (offsets + part.start) // part.dtype.itemsize
        if gaps is not None:
            elements.masked_fill_(gaps, -1)
        _, tokens, width = part.size
        return cls(part.dtype, elements, tokens * width, width, gaps is not None)

    def plane(self, memory: torch.Tensor) -> Plane:
        return Plane(memory.view(self.dtype), self.offsets, self.head_stride, self.token_stride, self.has_gaps)
