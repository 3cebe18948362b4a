"""Pages of keys or values, gathered many at once from wherever their blocks lie. Called by `attention_torch.py`.

In: a block table and which pages are wanted. Out: one tensor of floats. Offsets are looked at on the host alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tiered.kernels.attention import PAGE_TOKENS, Pages, Plane, widen_codes


@dataclass(frozen=True)
class Tile:
    """Queries start..stop of a sequence, whose own slots are in one page."""

    sequence: int
    start: int
    stop: int
    slot: int
    """Of query `start`."""
    first: int
    """The first slot that one of them sees."""
    end: int
    """Slots from here on are seen by none."""

    @property
    def page(self) -> int:
        """The page of their own slots."""
        return self.slot // PAGE_TOKENS


class PageSource:
    """Keys or values of a call, gathered page by page into one piece.

    Blocks of a table lie at multiples of some number of bytes, whoever made them; so pages are rows of one strided view
    of the memory. A page that the memory does not hold to its last slot, as that of a tensor in one piece may be, is
    fetched by itself.
    """

    def __init__(self, pages: Pages, heads: int, head_dim: int, dtype: torch.dtype, first_head: int = 0) -> None:
        """`heads` heads from number `first_head` on."""
        self._pages, self._shape, self._dtype = pages, (heads, PAGE_TOKENS, head_dim), dtype
        self._first_head = first_head
        self._offsets = pages.table.offsets.cpu().numpy()
        self._recent = None if pages.recent is None else PageSource(pages.recent, heads, head_dim, dtype, first_head)
        memory = pages.table.memory
        room = memory.untyped_storage().nbytes() - memory.storage_offset() * memory.dtype.itemsize
        planes = [plane for plane in (pages.codes, pages.scale, pages.zero) if plane is not None]
        self._last = room - max(_nbytes(plane, first_head + heads, self._tokens(plane)) for plane in planes)
        """Blocks that begin after it are not whole."""
        whole = self._offsets[(self._offsets >= 0) & (self._offsets <= self._last)]
        self._first = int(whole.min()) if whole.size else 0
        self._step = max(1, int(np.gcd.reduce(whole - self._first))) if whole.size else 1
        self._rows = (int(whole.max()) - self._first) // self._step + 1 if whole.size else 0

    def differs(self, tiles: Sequence[Tile], start: int, stop: int) -> bool:
        """Whether tiles of one sequence read different pages among start..stop: their own, as they were computed."""
        return self._recent is not None and any(start <= tile.page < stop for tile in tiles)

    def gather(self, tiles: Sequence[Tile], start: int, stop: int, clean: bool = False) -> torch.Tensor:
        """[tiles, heads, slots, head_dim] of pages start..stop; 0 in those that no query of a tile sees.

        Slots that none sees, in pages that some do, hold anything; 0 with `clean`.
        """
        places: dict[PageSource, list[int]] = {}  # in the result
        rows: dict[PageSource, list[int]] = {}
        single: list[tuple[int, Tile, int]] = []
        for number, tile in enumerate(tiles):
            for page in range(max(start, tile.first // PAGE_TOKENS), min(stop, -(-tile.end // PAGE_TOKENS))):
                source = self._chosen(tile, page)
                place, offset = number * (stop - start) + page - start, int(source._offsets[tile.sequence, page])
                if offset > source._last:
                    single.append((place, tile, page))
                else:
                    places.setdefault(source, []).append(place)
                    rows.setdefault(source, []).append((offset - source._first) // source._step)
        count = len(tiles) * (stop - start)
        if len(rows.get(self, ())) == count:
            pages = self._widened(rows[self])
        else:
            pages = torch.zeros(count, *self._shape, dtype=self._dtype, device=self._pages.table.memory.device)
            for source, chosen in rows.items():
                pages.index_copy_(0, sent(places[source], pages.device), source._widened(chosen))
        for place, tile, page in single:
            heads, tokens = self._first_head + self._shape[0], min(PAGE_TOKENS, tile.end - page * PAGE_TOKENS)
            shape = heads, tokens, self._shape[2]
            found = self._pages.widen(tile.sequence, page, shape, page == tile.page, self._dtype)
            pages[place, :, :tokens] = found[self._first_head :]
        states: torch.Tensor = pages.unflatten(0, (len(tiles), -1)).transpose(1, 2).flatten(2, 3)
        low, high = start * PAGE_TOKENS, stop * PAGE_TOKENS
        if clean and any(tile.first > low or tile.end < high for tile in tiles):
            slot = torch.arange(low, high, device=states.device)
            first, end = sent([(tile.first, tile.end) for tile in tiles], states.device)[..., None].unbind(1)
            states.masked_fill_(((slot < first) | (slot >= end))[:, None, :, None], 0)
        return states

    def _chosen(self, tile: Tile, page: int) -> "PageSource":
        """Where a tile reads a page; as in `Pages.widen`."""
        stored, recent = self._offsets[tile.sequence, page] >= 0, self._recent
        if recent is not None and (page == tile.page or not stored) and recent._offsets[tile.sequence, page] >= 0:
            return recent
        assert stored, f"sequence {tile.sequence}: page {page} is missing"
        return self

    def _widened(self, rows: Sequence[int]) -> torch.Tensor:
        """[rows, heads, 64, head_dim]: the pages with these numbers among the strided rows."""
        pages = self._pages
        index = sent(rows, pages.table.memory.device)
        codes, scale, zero = (
            None if plane is None else self._strided(plane).index_select(0, index)
            for plane in (pages.codes, pages.scale, pages.zero)
        )
        assert codes is not None
        return widen_codes(pages.format, codes, scale, zero, self._dtype)

    def _strided(self, plane: Plane) -> torch.Tensor:
        """[rows, heads, tokens, width]: this part of every row. Nothing is copied."""
        numbers, itemsize = self._pages.table.memory.view(plane.dtype), plane.dtype.itemsize
        size = self._rows, self._shape[0], self._tokens(plane), plane.width
        strides = self._step // itemsize, plane.head_stride, plane.token_stride, 1
        start = (self._first + plane.start) // itemsize + self._first_head * plane.head_stride
        return numbers.as_strided(size, strides, numbers.storage_offset() + start)

    def _tokens(self, plane: Plane) -> int:
        return 1 if plane is not self._pages.codes and self._pages.format.per_channel else PAGE_TOKENS


def _nbytes(plane: Plane, heads: int, tokens: int) -> int:
    """From the beginning of a block to the end of the plane."""
    elements = (heads - 1) * plane.head_stride + (tokens - 1) * plane.token_stride + plane.width
    return plane.start + elements * plane.dtype.itemsize


def sent(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Numbers of the host, as int64 at the device; the host does not wait for what the device has to do before."""
    return torch.tensor(numbers).to(device, non_blocking=True)
