"""Keys and values of sequences that begin in this pass, where they are computed: all that their queries read is there.

In: the states of one micro-batch after the other, layer by layer. Out: pages as the cache will hold them, although that
is elsewhere. Used by `PackedKV` where a device computes and the cache is the host's.
"""

import torch

from tiered.cache.layout import PageLayout
from tiered.kernels.attention import PAGE_TOKENS, BlockTable, Pages, contiguous_pages


class Beginning:
    """One sequence with `tokens` tokens in this pass, or several with one each. Pages are those of `layout`."""

    def __init__(self, layout: PageLayout, tokens: int) -> None:
        self._layout, self._tokens = layout, tokens
        self._keys = self._values = torch.empty(0)
        """[1, heads, tokens, width] in the layer that computes, if the pass has them in several micro-batches."""
        self._blocks = torch.empty(0, dtype=torch.uint8)
        """The complete pages, as the cache stores them, if it does not store them as they were computed."""
        self._stored = 0
        """How many of them there are."""
        self._offsets = torch.arange(tokens // PAGE_TOKENS) * layout.block_nbytes

    def add(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[Pages, Pages]:
        """What queries of tokens `start` on read, whose own states [sequences, heads, tokens, head_dim] these are.

        Micro-batches come in their order, layer after layer.
        """
        stop = start + keys.shape[2]
        if keys.shape[2] < self._tokens:
            keys, values = self._joined(start, keys, values)
        keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
        # Latents have no values of their own.
        recent = contiguous_pages(keys), contiguous_pages(values if values.shape[-1] else keys)
        pages = recent
        # Queries in the first page read it as it was computed.
        if self._layout.bits != 16 and stop > PAGE_TOKENS:
            pages = self._layout.pages(self._table(stop, keys, values), recent)
        if stop == self._tokens:
            # The next layer may take this memory for another sequence, once attention has read it.
            self._keys = self._values = torch.empty(0)
            self._blocks, self._stored = self._blocks.new_empty(0), 0
        return pages

    def _joined(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
        return BlockTable(self._blocks, torch.cat([self._offsets[:whole], missing])[None])
