"""The KV cache for dense attention: keys and values of a micro-batch in one piece, gathered page by page.

In: the new states of a layer, with as many tokens in every row. Out: all states so far, padded on the left, and the
mask that hides the padding. What a query reads is what `micro_batch.py` says.
"""

from collections.abc import Sequence
from typing import Any

import torch

from tiered.cache.blocks import LentBlocks, Part
from tiered.cache.micro_batch import MicroBatchKV
from tiered.cache.outbox import Outbox
from tiered.kernels.attention import PAGE_TOKENS, Pages


class GatheredKV(MicroBatchKV):
    """Parts of equally many tokens as rows [parts, tokens]; keys and values in one piece, padded on the left."""

    def __init__(
        self, blocks: LentBlocks, parts: Sequence[Part], numbers: Sequence[int], outbox: Outbox | None = None
    ) -> None:
        count = parts[0].count
        longest = max(part.stop for part in parts)
        super().__init__(blocks, parts, numbers, longest - count, outbox)
        self._grouped = [
            [self.call(group, [row], [part]) for row, part in enumerate(parts)] for group in range(len(blocks.maps))
        ]
        self.states = self._states_of([range(len(parts))])
        self._reads_cache = outbox is None or longest > count
        """Whether there are keys that are not of this micro-batch, or may be."""
        self.attention_mask = None
        if len(parts) > 1:
            padding = torch.tensor([longest - part.stop for part in parts])
            mask = (torch.arange(longest) >= padding[:, None]).long()
            self.attention_mask = mask.to(self.pool.where if outbox is None else outbox.where)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store states [parts, heads, tokens, head_dim]; returns all so far, [parts, heads, longest, head_dim] each."""
        keys, values = (states.transpose(0, 1).flatten(1, 2) for states in (key_states, value_states))
        self.store(layer_idx, keys, values, self._reads_cache)
        if not self._reads_cache:
            return key_states, value_states  # in 16 bits, or inside one page: read as they were computed
        calls = self._grouped[self.pool.group(layer_idx)]
        longest = max(part.stop for part in self.parts)
        gathered = [
            torch.zeros((*new.shape[:2], longest, new.shape[3]), dtype=new.dtype, device=self.pool.where)
            for new in (key_states, value_states)
        ]
        for row, (part, call) in enumerate(zip(self.parts, calls, strict=True)):
            for pages, states in zip(self.pages(call, layer_idx), gathered, strict=True):
                _gather(pages, part, states[row, :, longest - part.stop :])
        if self.outbox is not None:
            gathered = [states.to(key_states.device) for states in gathered]
        return gathered[0], gathered[1]


def _gather(pages: Pages, part: Part, out: torch.Tensor) -> None:
    """Write slots 0 to part.stop - 1 to out [heads, slots, head_dim]."""
    heads, slots, head_dim = out.shape
    for start in range(0, slots, PAGE_TOKENS):
        stop, page = min(slots, start + PAGE_TOKENS), start // PAGE_TOKENS
        shape = (heads, stop - start, head_dim)
        # In 16 bits the scale would be rounded, which changes all numbers of a channel by the same factor.
        out[:, start:stop] = pages.widen(0, page, shape, page >= part.first_page, torch.float32)
