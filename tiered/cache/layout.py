"""How keys and values lie in the KV cache: KV blocks of one page each, and how attention finds them.

A *KV block*, or block here, is the keys and values of one page (64 tokens) of one sequence in one layer, for all key
heads:

    keys: codes [heads, 64, ..], scale, zero | values: codes [heads, 64, ..], scale, zero | up to a multiple of 4096

Blocks lie at multiples of `block_nbytes` in flat uint8 memory, one stretch of it per layer. In 16 bits a block
holds the compute dtype and is written token by token (`dense`); in 8 and 4 bits it is written once, when its page is
complete (`store`). Codes, scales and zeros are at the same place in every block. So offsets of blocks are all that
attention needs, and they are the same for all layers that keep the same tokens:

    keys, values = layout.pages(BlockTable(memory, offsets), recent)
"""

from dataclasses import dataclass
from typing import Final, Self

import torch

from tiered.cache.quantize import QuantizedPages, group_size, quantize_keys, quantize_values
from tiered.errors import ConfigError
from tiered.kernels.attention import PAGE_TOKENS, BlockTable, CacheFormat, Pages, Plane
from tiered.plan.kv import PART_ALIGNMENT, KVShape, block_nbytes
from tiered.units import PAGE, round_up

_FORMATS: Final = {
    16: (CacheFormat.BF16, CacheFormat.BF16),
    8: (CacheFormat.INT8_CHANNEL, CacheFormat.INT8),
    4: (CacheFormat.INT4_CHANNEL, CacheFormat.INT4),
}
_PIECE_ELEMENTS: Final = 1 << 19
"""Numbers that are quantized at a time, at least one page: their float32 copies stay small, and in the caches."""


class PageLayout:
    """How the KV blocks of a model lie in memory. Raises ConfigError where `block_nbytes` does."""

    def __init__(self, shape: KVShape, bits: int, tokens: int = PAGE_TOKENS) -> None:
        """`bits`: 16, 8 or 4. `tokens`: slots of a page of 16 bits, fewer than 64 where no sequence fills a page."""
        slots = tokens if bits == 16 else PAGE_TOKENS
        self.block_nbytes = block_nbytes(shape, bits, slots)
        self.shape, self.bits = shape, bits
        self.keys_format, self.values_format = _FORMATS[bits]
        if not shape.value_dim:
            # What are values too has scales per token, as values have.
            self.keys_format = self.values_format
        self.dtype: torch.dtype = getattr(torch, shape.dtype)
        """Of states that are not quantized."""
        self._keys = _Parts.of(shape, shape.head_dim, self.keys_format, 0, slots)
        self._values = self._keys
        if shape.value_dim:
            self._values = _Parts.of(shape, shape.value_dim, self.values_format, self._keys.stop, slots)
        assert self._values.stop <= self.block_nbytes < self._values.stop + PAGE

    def pages(self, table: BlockTable, recent: tuple[Pages, Pages] | None = None) -> tuple[Pages, Pages]:
        """Keys and values in the blocks of `table`, as attention takes them.

        `recent`: keys and values of the pages that are read as they were computed (see `Pages.recent`).
        """
        new_keys, new_values = recent or (None, None)
        return self._keys.pages(table, new_keys), self._values.pages(table, new_values)

    def dense(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [blocks, heads, 64, head_dim] and values [blocks, heads, 64, value_dim] of all blocks in `memory`, in
        place. 16 bits only."""
        assert self.bits == 16, "these blocks are quantized; a complete page is stored at once"
        blocks = memory.view(-1, self.block_nbytes)
        keys = self._keys.codes.every(blocks)
        return keys, self._values.codes.every(blocks) if self.shape.value_dim else keys[..., :0]

    def store(self, memory: torch.Tensor, offsets: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write complete pages to the blocks at `offsets` [pages]: keys [pages, heads, 64, head_dim] and values
        [pages, heads, 64, value_dim]."""
        for states, width in ((keys, self.shape.head_dim), (values, self.shape.value_dim)):
            expected = (len(offsets), self.shape.heads, PAGE_TOKENS, width)
            if states.shape != expected:
                raise ConfigError(f"KV cache: pages {list(states.shape)}, expected {list(expected)}")
        starts: list[int] = offsets.tolist()
        if self.bits == 16:
            self._keys.codes.write(memory, starts, keys)
            if self.shape.value_dim:
                self._values.codes.write(memory, starts, values)
            return
        step = max(
            1, _PIECE_ELEMENTS // (self.shape.heads * PAGE_TOKENS * max(self.shape.head_dim, self.shape.value_dim))
        )
        for i in range(0, len(starts), step):
            rows = slice(i, i + step)
            if self.shape.value_dim:
                self._keys.write(memory, starts[rows], quantize_keys(keys[rows], self.bits))
            both = values if self.shape.value_dim else keys
            self._values.write(memory, starts[rows], quantize_values(both[rows], self.bits))


@dataclass(frozen=True)
class _Part:
    """Codes, scales or zeros in a block: [heads, tokens, width] of `dtype` from byte `start` on."""

    start: int
    size: tuple[int, int, int]
    dtype: torch.dtype

    @property
    def plane(self) -> Plane:
        """This part in the form that attention takes."""
        _, tokens, width = self.size
        return Plane(self.dtype, width, tokens * width, width, self.start)

    @property
    def stop(self) -> int:
        heads, tokens, width = self.size
        return self.start + heads * tokens * width * self.dtype.itemsize

    def every(self, blocks: torch.Tensor) -> torch.Tensor:
        """[blocks, heads, tokens, width]: this part of all blocks, uint8 [blocks, block_nbytes]."""
        return blocks[:, self.start : self.stop].view(self.dtype).view(-1, *self.size)

    def write(self, memory: torch.Tensor, offsets: list[int], states: torch.Tensor) -> None:
        """Write states [pages, heads, tokens, width] to the blocks at `offsets`."""
        for offset, page in zip(offsets, states, strict=True):
            memory[offset + self.start : offset + self.stop].view(self.dtype).view(self.size).copy_(page)


@dataclass(frozen=True)
class _Parts:
    """Where a block holds its keys, or its values: codes, and scales and zeros if they are quantized."""

    format: CacheFormat
    codes: _Part
    scale: _Part | None = None
    zero: _Part | None = None

    @classmethod
    def of(cls, shape: KVShape, width: int, kind: CacheFormat, start: int, slots: int) -> Self:
        """The parts from byte `start` of the block on, for heads of `width` channels."""
        start = round_up(start, PART_ALIGNMENT)
        if kind is CacheFormat.BF16:
            return cls(kind, _Part(start, (shape.heads, slots, width), getattr(torch, shape.dtype)))
        codes = _Part(start, (shape.heads, PAGE_TOKENS, width * kind.bits // 8), torch.uint8)
        groups = width // group_size(width)
        side = (shape.heads, 1, width) if kind.per_channel else (shape.heads, PAGE_TOKENS, groups)
        scale = _Part(round_up(codes.stop, PART_ALIGNMENT), side, torch.float16)
        return cls(kind, codes, scale, _Part(round_up(scale.stop, PART_ALIGNMENT), side, torch.uint8))

    @property
    def stop(self) -> int:
        return self.codes.stop if self.zero is None else self.zero.stop

    def pages(self, table: BlockTable, recent: Pages | None) -> Pages:
        scale, zero = (None if part is None else part.plane for part in (self.scale, self.zero))
        return Pages(self.format, table, self.codes.plane, scale, zero, recent=recent)

    def write(self, memory: torch.Tensor, offsets: list[int], pages: QuantizedPages) -> None:
        assert self.scale is not None and self.zero is not None
        self.codes.write(memory, offsets, pages.codes)
        self.scale.write(memory, offsets, pages.scale)
        self.zero.write(memory, offsets, pages.zero)
