"""Writing the new keys and values of a micro-batch into the cache.

`BlockWriter`, for KV blocks in memory and in the compute dtype, writes straight into them. `TailWriter`, for KV blocks
that are quantized or on disk, writes into the sequences' tails, and a page into its block once it is complete.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from tiered.cache.blocks import LentBlocks, Part
from tiered.kernels.attention import PAGE_TOKENS
from tiered.plan.kv import STACKED_PAGES

States = tuple[torch.Tensor, torch.Tensor]
"""Keys and values."""


class Writer(Protocol):
    """Stores what a micro-batch adds to the cache, layer by layer."""

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """States [heads, tokens, head_dim] of all parts, in their order."""


class BlockWriter:
    """Writes every token into the block of its page."""

    def __init__(self, blocks: LentBlocks, parts: Sequence[Part]) -> None:
        self._pool = blocks.pool
        positions = [(part, position) for part in parts for position in range(part.start, part.stop)]
        slots = [position % PAGE_TOKENS for _, position in positions]
        self._places = [
            _Places.of(
                [part.kv.block(group, position // PAGE_TOKENS) for part, position in positions], slots, self._pool.where
            )
            for group in range(len(self._pool.plan.groups))
        ]
        """For each group, where each token goes: the block of its page, and its slot in there."""

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        group = self._pool.group(layer)
        self._places[group].write(self._pool.layouts[group].dense(self._pool.layer_blocks(layer)), (keys, values))


@dataclass(frozen=True, eq=False)
class _Places:
    """Rows and slots of memory [rows, heads, 64, head_dim], one of each per token."""

    rows: torch.Tensor | int
    """A number for a single token: after a product has filled the processor's caches, indexing by tensors takes twice
    as long as by numbers. And a tensor of a device could only be read by waiting for it."""
    slots: torch.Tensor | int

    @classmethod
    def of(cls, rows: Sequence[int], slots: Sequence[int], where: torch.device) -> Self:
        """For memory at `where`."""
        if len(rows) == 1:
            return cls(rows[0], slots[0])
        return cls(torch.tensor(rows).to(where), torch.tensor(slots).to(where))

    def write(self, target: States, states: States) -> None:
        """Write `states` [heads, tokens, head_dim] to these places of `target`."""
        if isinstance(self.rows, int):
            for memory, new in zip(target, states, strict=True):
                memory[self.rows, :, self.slots] = new[:, 0]
            return
        for memory, new in zip(target, states, strict=True):
            memory[self.rows, :, self.slots] = new.transpose(0, 1)


@dataclass(frozen=True)
class _Long:
    """A part that ends in another page than it begins in, or whose page a later micro-batch completes before all have
    read it: its pages are put together in fresh memory."""

    part: Part
    number: int
    """Number of the blocks' part that it lies within."""
    token: int
    """Index of its first token in the micro-batch."""
    fresh: int
    """Number of its first page in fresh memory."""


class TailWriter:
    """Appends parts within a page to their tails; puts longer ones together in fresh pages, and copies an incomplete
    last page to the tail.

    `parts[i]` lies within part `numbers[i]` of `blocks`.
    """

    def __init__(self, blocks: LentBlocks, parts: Sequence[Part], numbers: Sequence[int]) -> None:
        self._pool, self._blocks = blocks.pool, blocks
        self._are_read_later = any(group.readers for group in blocks.pool.plan.groups)
        self._kept: dict[int, torch.Tensor] = {}
        """Fresh memory of the groups that other layers read when it would have been used again."""
        self._short: list[tuple[Part, int]] = []
        self._long: list[_Long] = []
        tokens: list[int] = []
        tails: list[int] = []
        slots: list[int] = []
        token = fresh = 0
        for part, number in zip(parts, numbers, strict=True):
            if not self.is_fresh(part, number):
                self._short.append((part, number))
                tokens += range(token, token + part.count)
                tails += [part.kv.tail] * part.count
                slots += [position % PAGE_TOKENS for position in range(part.start, part.stop)]
            else:
                self._long.append(_Long(part, number, token, fresh))
                fresh += (part.stop - 1) // PAGE_TOKENS - part.first_page + 1
            token += part.count
        self._tokens = torch.tensor(tokens, dtype=torch.int64).to(self._pool.where)
        self._tails = _Places.of(tails, slots, self._pool.where)
        self._fresh_pages = fresh

    def is_fresh(self, part: Part, number: int) -> bool:
        """Whether queries of `part`, which lies within part `number` of the blocks, read their pages in fresh memory;
        else in the tail, which holds the last page of all that the pass adds to the sequence."""
        last = (self._blocks.parts[number].stop - 1) // PAGE_TOKENS
        return not part.is_within_a_page or (self._are_read_later and part.first_page < last)

    def fresh_pages(self, part: Part) -> range:
        """Numbers of a long part's pages in fresh memory, from the page of its first token on."""
        first = next(item.fresh for item in self._long if item.part is part)
        return range(first, first + (part.stop - 1) // PAGE_TOKENS - part.first_page + 1)

    def fresh(self, group: int) -> torch.Tensor:
        """uint8: the pages that long parts have put together in the layer that stored last, which is of `group`."""
        nbytes = max(1, self._fresh_pages) * self._pool.exact[group].block_nbytes
        if not self._pool.plan.groups[group].readers:
            return self._pool.scratch(nbytes)
        if group not in self._kept:
            self._kept[group] = torch.empty(nbytes, dtype=torch.uint8, device=self._pool.where)
        return self._kept[group]

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        group = self._pool.group(layer)
        tails, fresh = map(self._pool.exact[group].dense, (self._pool.tails(layer), self.fresh(group)))
        if self._short:
            tokens = slice(None) if not self._long else self._tokens
            self._tails.write(tails, (keys[:, tokens], values[:, tokens]))
        for item in self._long:
            for tail, page, states in zip(tails, fresh, (keys, values), strict=True):
                _fill(tail[item.part.kv.tail], page, item, states[:, item.token : item.token + item.part.count])
        self._complete(layer, tails, fresh)

    def _complete(self, layer: int, tails: States, fresh: States) -> None:
        """Write the pages that have become complete to their blocks."""
        group = self._pool.group(layer)
        blocks = self._blocks.maps[group]
        found = [(number, page, tails, part.kv.tail) for part, number in self._short for page in part.complete_pages]
        found += [
            (item.number, page, fresh, item.fresh + page - item.part.first_page)
            for item in self._long
            for page in item.part.complete_pages
        ]
        placed = [(blocks.offset(number, page), source, row) for number, page, source, row in found]
        # In a layer with a window the oldest pages of a long part may already be outside the window.
        placed = [item for item in placed if item[0] >= 0]
        # Sequences of equal length complete their pages together: stacking all at once would take unplanned memory.
        for begin in range(0, len(placed), STACKED_PAGES):
            some = placed[begin : begin + STACKED_PAGES]
            keys, values = (torch.stack([source[i][row] for _, source, row in some]) for i in (0, 1))
            offsets = torch.tensor([offset for offset, _, _ in some])
            self._pool.layouts[group].store(self._blocks.memory(layer), offsets, keys, values)


def _fill(tail: torch.Tensor, fresh: torch.Tensor, item: _Long, states: torch.Tensor) -> None:
    """Put the pages of a long part together in `fresh` [pages, heads, 64, head_dim]; copy an incomplete last page to
    `tail` [heads, 64, head_dim].

    `states` [heads, tokens, head_dim] are its keys, or its values.
    """
    begin, left = item.part.start % PAGE_TOKENS, item.part.stop % PAGE_TOKENS
    fresh[item.fresh, :, :begin] = tail[:, :begin]
    slot = begin
    token, page = 0, item.fresh
    while token < item.part.count:
        count = min(item.part.count - token, PAGE_TOKENS - slot)
        fresh[page, :, slot : slot + count] = states[:, token : token + count]
        token, page, slot = token + count, page + 1, 0
    if left:
        new = min(left, item.part.count)
        tail[:, left - new : left] = states[:, -new:]
