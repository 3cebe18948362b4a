"""Keys and values of prompts where they are computed, while the cache is elsewhere: what a pass adds to a sequence is
there for its queries, as pages that hold what the cache will; and what earlier passes have added comes there.

In: the states of one micro-batch after the other, layer by layer. Out: pages. Used by `PackedKV` where a device
computes and the cache is the host's. A page that a pass goes on with is put together here, from its tail on.
"""

import itertools
from dataclasses import dataclass, replace

import torch

from tiered.cache.layout import PageLayout
from tiered.kernels.attention import PAGE_TOKENS, BlockTable, Pages, contiguous_pages

States = tuple[torch.Tensor, torch.Tensor]


class Beginning:
    """Tokens `start` to `start` + `tokens` - 1 of a sequence, which a pass adds to it. Pages are those of `layout`."""

    def __init__(self, layout: PageLayout, start: int, tokens: int) -> None:
        self._layout, self._first_page = layout, start // PAGE_TOKENS
        # From here on tokens are counted from the first of that page.
        self._tokens = start % PAGE_TOKENS + tokens
        self._keys = self._values = torch.empty(0)
        """[1, heads, tokens, width] in the layer that computes, if the pass has them in several micro-batches."""
        self._blocks = torch.empty(0, dtype=torch.uint8)
        """The complete pages, as the cache stores them, if it does not store them as they were computed."""
        self._stored = 0
        """How many of them there are."""
        self._offsets = torch.arange(self._tokens // PAGE_TOKENS) * layout.block_nbytes

    def add(self, start: int, keys: torch.Tensor, values: torch.Tensor, before: States | None) -> tuple[Pages, Pages]:
        """What queries of tokens `start` on read of pages that are not complete before this pass. Their own states are
        [1, heads, tokens, head_dim]; `before`: those of the tokens before them in their page, if they are the first of
        the pass and there are some.

        Micro-batches come in their order, layer after layer.
        """
        start -= self._first_page * PAGE_TOKENS
        if before is not None:
            start -= before[0].shape[2]
            keys, values = (torch.cat(both, dim=2) for both in zip(before, (keys, values), strict=True))
        stop = start + keys.shape[2]
        if keys.shape[2] < self._tokens:
            keys, values = self._joined(start, keys, values)
        keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
        # Latents have no values of their own.
        recent = tuple(self._shifted(contiguous_pages(x)) for x in (keys, values if values.shape[-1] else keys))
        pages = recent[0], recent[1]
        # Queries in the first page read it as it was computed.
        is_stored = self._layout.bits != 16 and stop > PAGE_TOKENS
        if self._first_page or is_stored:
            table = self._table(stop, keys, values) if is_stored else self._none_of(stop, keys.device)
            pages = self._layout.pages(table, pages)
        if stop == self._tokens:
            # The next layer may take this memory for another sequence, once attention has read it.
            self._keys = self._values = torch.empty(0)
            self._blocks, self._stored = self._blocks.new_empty(0), 0
        return pages

    def _joined(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> States:
        """All states so far."""
        if not start:
            self._keys, self._values = (x.new_empty((*x.shape[:2], self._tokens, x.shape[3])) for x in (keys, values))
        stop = start + keys.shape[2]
        self._keys[:, :, start:stop], self._values[:, :, start:stop] = keys, values
        return self._keys[:, :, :stop], self._values[:, :, :stop]

    def _table(self, stop: int, keys: torch.Tensor, values: torch.Tensor) -> BlockTable:
        """Complete pages of keys and values [1, heads, stop, head_dim], stored."""
        if not self._stored:
            nbytes = len(self._offsets) * self._layout.block_nbytes
            self._blocks = torch.empty(nbytes, dtype=torch.uint8, device=keys.device)
        whole = stop // PAGE_TOKENS
        new = slice(self._stored, whole)
        if self._stored < whole:
            tokens = slice(self._stored * PAGE_TOKENS, whole * PAGE_TOKENS)
            paged = (x[0, :, tokens].unflatten(1, (-1, PAGE_TOKENS)).transpose(0, 1) for x in (keys, values))
            self._layout.store(self._blocks, self._offsets[new], *paged)
            self._stored = whole
        missing = torch.full((-(-stop // PAGE_TOKENS) - whole,), -1)
        return self._later(BlockTable(self._blocks, torch.cat([self._offsets[:whole], missing])[None]))

    def _none_of(self, stop: int, where: torch.device) -> BlockTable:
        """No page is stored."""
        nothing = torch.empty(0, dtype=torch.uint8, device=where)
        return self._later(BlockTable(nothing, torch.full((1, -(-stop // PAGE_TOKENS)), -1)))

    def _shifted(self, pages: Pages) -> Pages:
        return replace(pages, table=self._later(pages.table))

    def _later(self, table: BlockTable) -> BlockTable:
        """`table`, of pages from the first one on, for the pages of the whole sequence."""
        earlier = torch.full((1, self._first_page), -1)
        return BlockTable(table.memory, torch.cat([earlier, table.offsets], dim=1))


@dataclass(frozen=True, eq=False)
class OwnRead:
    """What a call of attention reads where it is computed, while the pool is elsewhere."""

    beginning: Beginning
    start: int
    """Its first token."""
    number: int
    """Of its part."""
    past: torch.Tensor | None
    """[1, pages] int64: offsets of the blocks of earlier passes; -1: its queries do not see the page."""


def brought(table: BlockTable, past: BlockTable, nbytes: int) -> BlockTable:
    """`table`, of one sequence and at a device, and the pages of `past`, which are in the host's memory: blocks of
    `nbytes` bytes each, all copied to memory of their own at the device."""
    pages = past.offsets.shape[1]
    wanted = [(past.memory, offset) for offset in past.offsets[0].tolist()]
    wanted += [(table.memory, offset) for offset in table.offsets[0, pages:].tolist()]
    present = [block for block in wanted if block[1] >= 0]
    there = [(source, offset, number * nbytes) for number, (source, offset) in enumerate(present)]
    memory = table.memory.new_empty(len(there) * nbytes)
    # Neighbours, which most are, in one copy.
    for _, run in itertools.groupby(there, key=lambda block: (id(block[0]), block[1] - block[2])):
        blocks = list(run)
        (source, offset, begin), size = blocks[0], len(blocks) * nbytes
        memory[begin : begin + size].copy_(source[offset : offset + size])
    places = iter(begin for _, _, begin in there)
    return BlockTable(memory, torch.tensor([[next(places) if offset >= 0 else -1 for _, offset in wanted]]))
