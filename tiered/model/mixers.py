"""Mixers inside packed micro-batches: recurrent layers compute sequence by sequence, single tokens together.

In: hidden states of a micro-batch, and its cache. Out: what the family's own mixer makes of each sequence. Everything
else in a layer works on rows, and attention finds its sequences in the pages.
"""

from typing import Any

import torch
from torch import nn

from tiered.arch import StandIn, is_mixer
from tiered.cache import MicroBatchKV
from tiered.model.homebound import Homebound


class SequenceMixer(StandIn):
    """Takes the place of `original`, a module with a recurrent state; its parts are its own, under the same names."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        # The same dictionaries: weights that are put into the one are the other's.
        self._modules, self._parameters, self._buffers = original._modules, original._parameters, original._buffers

    def forward(
        self, hidden_states: torch.Tensor, cache: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """hidden_states [rows, tokens, hidden] -> [rows, tokens, hidden]. With a cache of transformers' kind it is the
        original."""
        original = self.original
        if not isinstance(cache, MicroBatchKV):
            mixed: torch.Tensor = original(hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)
            if isinstance(cache, Homebound):
                cache.settle()
            return mixed
        found, start = [], 0
        rows = hidden_states.flatten(0, 1)
        for states in cache.states:
            stop = start + states.sequences * states.tokens
            inside = rows[start:stop].unflatten(0, (states.sequences, states.tokens))
            states.begin(hidden_states.dtype)
            found.append(original(inside, cache=states, attention_mask=None, **kwargs).flatten(0, 1))
            states.settle()
            start = stop
        return (torch.cat(found) if len(found) > 1 else found[0]).view(*hidden_states.shape[:-1], -1)


def split_mixers(layer: nn.Module) -> None:
    """Put a `SequenceMixer` in the place of each mixer of `layer`."""
    for name, child in layer.named_children():
        if is_mixer(child):
            setattr(layer, name, SequenceMixer(child))
        else:
            split_mixers(child)
