"""Where the KV blocks are that some tokens of a pass read and write: in the pool's memory, or on their way from disk.

In: parts, which are consecutive tokens of sequences, with their places in the pool. Out: offsets for the attention's
tables, and extents for the disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tiered.cache.pool import KVPool, SequenceKV
from tiered.kernels.attention import PAGE_TOKENS


@dataclass(frozen=True, eq=False)
class Part:
    """Tokens `start` to `start` + `count` - 1 of one sequence."""

    kv: SequenceKV
    start: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def first_page(self) -> int:
        """The page that its first token is in."""
        return self.start // PAGE_TOKENS

    @property
    def complete_pages(self) -> range:
        """Pages that it completes."""
        return range(self.first_page, self.stop // PAGE_TOKENS)

    @property
    def is_within_a_page(self) -> bool:
        return self.first_page == (self.stop - 1) // PAGE_TOKENS

    def oldest_page(self, window: int) -> int:
        """The first page that its queries read, where they see `window` tokens (0: all)."""
        return max(0, self.start - window + 1) // PAGE_TOKENS if window else 0


@dataclass(frozen=True)
class Extent:
    """Neighbouring blocks in the file, and where they lie in the memory lent for them."""

    offset: int
    memory_offset: int
    nbytes: int


class BlockMap:
    """Where the blocks of some sequences lie in a layer's memory, for the layers of one group.

    `parts`: all that a pass adds to each of them. In memory a block has its place in the pool; what comes from disk
    lies part after part in what is lent for it.
    """

    def __init__(self, pool: KVPool, group: int, parts: Sequence[Part]) -> None:
        self._pool, self._group, self.parts = pool, group, parts
        self.window = pool.plan.groups[group].window
        self._nbytes = pool.layout.block_nbytes
        self._starts = []
        """Of each part's blocks in lent memory."""
        position = 0
        for part in parts:
            self._starts.append(position)
            position += (part.stop // PAGE_TOKENS - part.oldest_page(self.window)) * self._nbytes
        self.lent_nbytes = position

    def offset(self, number: int, page: int) -> int:
        """Bytes from the start of the memory to the block of `page` of part `number`; -1: it is not there."""
        part = self.parts[number]
        oldest = part.oldest_page(self.window)
        if page < oldest or (self._pool.plan.has_tails and page >= part.stop // PAGE_TOKENS):
            return -1
        if not self._pool.plan.on_disk:
            return part.kv.block(self._group, page) * self._nbytes
        return self._starts[number] + (page - oldest) * self._nbytes

    def offsets(self, number: int, pages: int) -> list[int]:
        """`offset` of the pages 0 to `pages` - 1 of part `number`."""
        part = self.parts[number]
        kv, nbytes = part.kv, self._nbytes
        oldest = min(part.oldest_page(self.window), pages)
        stop = min(pages, part.stop // PAGE_TOKENS) if self._pool.plan.has_tails else pages
        if self._pool.plan.on_disk:
            there = [self._starts[number] + (page - oldest) * nbytes for page in range(oldest, stop)]
        else:
            first, ring = kv.first[self._group], kv.pages[self._group]
            there = [(first + page % ring) * nbytes for page in range(oldest, stop)]
        return [-1] * oldest + there + [-1] * (pages - max(stop, oldest))

    def reads(self, layer: int) -> list[Extent]:
        """What `layer` needs from disk before it computes."""
        return [
            extent
            for number, part in enumerate(self.parts)
            for extent in self._extents(layer, number, range(part.oldest_page(self.window), part.first_page))
        ]

    def writes(self, layer: int) -> list[Extent]:
        """What goes to disk when `layer` has computed: the pages that its parts have completed."""
        found = []
        for number, part in enumerate(self.parts):
            complete = part.complete_pages
            # Of a ring, only the last round: what is overwritten at once is not written.
            ring = part.kv.pages[self._group]
            found += self._extents(layer, number, range(max(complete.start, complete.stop - ring), complete.stop))
        return found

    def _extents(self, layer: int, number: int, pages: range) -> list[Extent]:
        """The blocks of `pages`, in one piece, or in several where a ring begins anew."""
        found: list[Extent] = []
        kv, start = self.parts[number].kv, pages.start
        while start < pages.stop:
            ring = kv.pages[self._group]
            stop = min(pages.stop, (start // ring + 1) * ring)
            offset = self._pool.file_offset(layer, kv.block(self._group, start))
            found.append(Extent(offset, self.offset(number, start), (stop - start) * self._nbytes))
            start = stop
        return found


class LentBlocks:
    """The blocks that some micro-batches of a pass share: those of the sequences whose tokens they are.

    Micro-batches of one long prompt share them, so that each finds what the ones before it have completed.
    """

    def __init__(self, pool: KVPool, parts: Sequence[Part]) -> None:
        self.pool = pool
        self.maps = tuple(BlockMap(pool, group, tuple(parts)) for group in range(len(pool.plan.groups)))
        self._lent: dict[int, torch.Tensor] = {}

    def map_of(self, layer: int) -> BlockMap:
        """Where the blocks that `layer` reads and writes are."""
        return self.maps[self.pool.group_of[layer]]

    def lend(self, layer: int, memory: torch.Tensor) -> None:
        """Give the blocks of `layer` that have been read from disk, with room for those that will be completed."""
        self._lent[layer] = memory

    def take_back(self, layer: int) -> None:
        """The memory lent for `layer` is wanted for something else."""
        del self._lent[layer]

    def memory(self, layer: int) -> torch.Tensor:
        """uint8: the blocks of `layer`, as `map_of(layer)` has them."""
        return self._lent[layer] if self.pool.plan.on_disk else self.pool.layer_blocks(layer)
