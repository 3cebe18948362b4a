"""Where the KV blocks lie that a part of a pass reads and writes: in the pool, or in memory lent for those on disk.

In: parts, which are consecutive tokens of sequences, with their places in the pool. Out: offsets for attention's block
tables, and extents for the disk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tiered.cache.beginning import Beginning
from tiered.cache.pool import KVPool, SequenceKV
from tiered.cache.state import StateRows
from tiered.kernels.attention import PAGE_TOKENS
from tiered.plan.kv import LayerGroup


@dataclass(frozen=True, eq=False)
class Part:
    """Tokens `start` to `start` + `count` - 1 of one sequence."""

    kv: SequenceKV
    start: int
    count: int
    is_prompt: bool = False
    """Whether they are a prompt's, whatever their number."""

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def first_page(self) -> int:
        """Number of the page that holds its first token."""
        return self.start // PAGE_TOKENS

    @property
    def complete_pages(self) -> range:
        """Numbers of the pages whose last token is in this part."""
        return range(self.first_page, self.stop // PAGE_TOKENS)

    @property
    def is_within_a_page(self) -> bool:
        return self.first_page == (self.stop - 1) // PAGE_TOKENS

    def oldest_page(self, kept: LayerGroup) -> int:
        """Number of the first page that its queries read in layers of this group."""
        return kept.first_seen(self.start) // PAGE_TOKENS


@dataclass(frozen=True)
class Extent:
    """Neighbouring blocks: bytes `offset` on in the file, bytes `memory_offset` on in the memory lent for them."""

    offset: int
    memory_offset: int
    nbytes: int


class BlockMap:
    """Where the blocks of some sequences lie in a layer's memory, for the layers of one group.

    `parts` has one part per sequence: all tokens that a pass adds to it. Where the KV cache is in memory, blocks lie in
    the pool; where it is on disk, they lie in the memory lent for them, those of one part after those of the other.
    """

    def __init__(self, pool: KVPool, group: int, parts: Sequence[Part]) -> None:
        self._pool, self._group, self.parts = pool, group, parts
        self.kept = pool.plan.groups[group]
        self._nbytes = pool.layouts[group].block_nbytes
        self._starts = []
        """For each part, the byte of the lent memory at which its blocks begin."""
        position = 0
        for part in parts:
            self._starts.append(position)
            position += (part.stop // PAGE_TOKENS - part.oldest_page(self.kept)) * self._nbytes
        self.lent_nbytes = position

    def offset(self, number: int, page: int) -> int:
        """Bytes from the start of the memory to the block of `page` of part `number`; -1: there is none."""
        part = self.parts[number]
        oldest = part.oldest_page(self.kept)
        if page < oldest or (self._pool.plan.has_tails and page >= part.stop // PAGE_TOKENS):
            return -1
        if not self._pool.plan.on_disk:
            return part.kv.block(self._group, page) * self._nbytes
        return self._starts[number] + (page - oldest) * self._nbytes

    def offsets(self, number: int, pages: int) -> list[int]:
        """`offset` of the pages 0 to `pages` - 1 of part `number`."""
        part = self.parts[number]
        kv, nbytes = part.kv, self._nbytes
        oldest = min(part.oldest_page(self.kept), pages)
        stop = min(pages, part.stop // PAGE_TOKENS) if self._pool.plan.has_tails else pages
        if self._pool.plan.on_disk:
            there = [self._starts[number] + (page - oldest) * nbytes for page in range(oldest, stop)]
        else:
            first, ring = kv.first[self._group], kv.pages[self._group]
            there = [(first + page % ring) * nbytes for page in range(oldest, stop)]
        return [-1] * oldest + there + [-1] * (pages - max(stop, oldest))

    def reads(self, layer: int, is_complete: bool = False) -> list[Extent]:
        """The extents that must be read from disk before `layer` computes; if it `is_complete`, with the pages that the
        parts have completed in it."""
        stops = [part.complete_pages.stop if is_complete else part.first_page for part in self.parts]
        return [
            extent
            for number, part in enumerate(self.parts)
            for extent in self._extents(layer, number, range(part.oldest_page(self.kept), stops[number]))
        ]

    def writes(self, layer: int) -> list[Extent]:
        """The extents that go to disk once `layer` has computed: the pages that the parts have completed."""
        found = []
        for number, part in enumerate(self.parts):
            complete = part.complete_pages
            # A part may go round a ring more than once. Only its last round is written: it overwrites the others.
            ring = part.kv.pages[self._group]
            found += self._extents(layer, number, range(max(complete.start, complete.stop - ring), complete.stop))
        return found

    def _extents(self, layer: int, number: int, pages: range) -> list[Extent]:
        """The blocks of `pages`: one extent, or several where a ring begins again at its first block."""
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
    """The KV blocks of some sequences, shared by the micro-batches that compute tokens of these sequences.

    So each micro-batch of a long prompt finds the pages that the earlier ones have completed.
    """

    def __init__(self, pool: KVPool, parts: Sequence[Part]) -> None:
        self.pool, self.parts = pool, tuple(parts)
        self.beginnings: dict[tuple[int, int], Beginning] = {}
        """By number of the group and of the part: what micro-batches keep of prompts where they compute, if that is not
        where the blocks are."""
        self.maps = tuple(BlockMap(pool, group, tuple(parts)) for group in range(len(pool.plan.groups)))
        self._lent: dict[int, torch.Tensor] = {}

    def map_of(self, layer: int) -> BlockMap:
        """Where the blocks that `layer` reads and writes are; it must keep keys and values."""
        return self.maps[self.pool.group(layer)]

    def lent_nbytes(self, layer: int) -> int:
        """Bytes of memory that `layer` needs for blocks and states from disk."""
        return self._states_start(layer) + self._state_nbytes(layer) * len(self.parts)

    def reads(self, layer: int) -> list[Extent]:
        """The extents that must be read from disk before `layer` computes."""
        source = self.pool.source_of[layer]
        keeps = self.pool.group_of[source] is not None
        blocks = self.map_of(source).reads(source, is_complete=source != layer) if keeps else []
        return blocks + self._state_extents(layer, lambda part: part.start > 0)

    def writes(self, layer: int) -> list[Extent]:
        """The extents that go to disk once `layer` has computed."""
        blocks = [] if self.pool.group_of[layer] is None else self.map_of(layer).writes(layer)
        return blocks + self._state_extents(layer, lambda part: True)

    def state_rows(self, layer: int, numbers: Sequence[int]) -> StateRows:
        """Where the recurrent states of the parts `numbers` are in `layer`, which has some."""
        states = self.pool.states
        assert states is not None, f"layer {layer} keeps no state"
        group = states.group_of[layer]
        if not self.pool.plan.on_disk:
            return StateRows(states.slots(layer), [self.parts[number].kv.tail for number in numbers], group)
        memory = self._lent[layer][self._states_start(layer) :][: len(self.parts) * group.nbytes]
        return StateRows(memory.view(len(self.parts), group.nbytes), numbers, group)

    def _states_start(self, layer: int) -> int:
        """Bytes from the start of the lent memory to the states: those of the blocks."""
        source = self.pool.source_of[layer]
        return 0 if self.pool.group_of[source] is None else self.map_of(source).lent_nbytes

    def _state_nbytes(self, layer: int) -> int:
        """Bytes of one sequence's recurrent state in `layer`."""
        states = self.pool.states
        group = None if states is None else states.group_of.get(layer)
        return 0 if group is None else group.nbytes

    def _state_extents(self, layer: int, wanted: Callable[[Part], bool]) -> list[Extent]:
        """The states of the parts that are `wanted`."""
        states, nbytes, start = self.pool.states, self._state_nbytes(layer), self._states_start(layer)
        if states is None or not nbytes:
            return []
        return [
            Extent(states.file_offset(layer, part.kv.tail), start + number * nbytes, nbytes)
            for number, part in enumerate(self.parts)
            if wanted(part)
        ]

    def lend(self, layer: int, memory: torch.Tensor) -> None:
        """Lend `memory`: the blocks that `layer` reads and that were read from disk, with room for those that it will
        complete."""
        self._lent[self.pool.source_of[layer]] = memory

    def take_back(self, layer: int) -> None:
        """End the loan of the memory for `layer`."""
        del self._lent[self.pool.source_of[layer]]

    def memory(self, layer: int) -> torch.Tensor:
        """uint8: the memory that holds the blocks of `layer`, at the offsets of `map_of(layer)`."""
        return self._lent[layer] if self.pool.plan.on_disk else self.pool.layer_blocks(layer)
