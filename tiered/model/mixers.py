"""Mixers inside packed micro-batches: recurrent layers compute sequence by sequence, single tokens together.

In: hidden states of a micro-batch, and its cache. Out: what the family's own mixer makes of each sequence. Everything
else in a layer works on rows, and attention finds its sequences in the pages.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from tiered.arch import StandIn, is_mixer
from tiered.cache import MicroBatchKV
from tiered.kernels import LayerKernels
from tiered.model.homebound import Homebound
from tiered.model.steps import forward_with


class SequenceMixer(StandIn):
    """Takes the place of `original`, a module with a recurrent state; its parts are its own, under the same names."""

    def __init__(self, original: nn.Module, kernels: LayerKernels) -> None:
        super().__init__(original)
        self._mix = forward_with(original, kernels)
        # The same dictionaries: weights that are put into the one are the other's.
        self._modules, self._parameters, self._buffers = original._modules, original._parameters, original._buffers

    def forward(
        self, hidden_states: torch.Tensor, cache: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """hidden_states [rows, tokens, hidden] -> [rows, tokens, hidden]."""
        mix = partial(self._mix, self.original)
        if not isinstance(cache, MicroBatchKV):
            mixed = mix(hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)
            if isinstance(cache, Homebound):
                cache.settle()
            return mixed
        found, start = [], 0
        rows = hidden_states.flatten(0, 1)
        for states in cache.states:
            stop = start + states.sequences * states.tokens
            inside = rows[start:stop].unflatten(0, (states.sequences, states.tokens))
            states.begin(hidden_states.dtype)
            found.append(mix(inside, cache=states, attention_mask=None, **kwargs).flatten(0, 1))
            states.settle()
            start = stop
        return (torch.cat(found) if len(found) > 1 else found[0]).view(*hidden_states.shape[:-1], -1)


def split_mixers(layer: nn.Module, kernels: LayerKernels) -> None:
    """Put a `SequenceMixer` in the place of each mixer of `layer`."""
    for name, child in layer.named_children():
        if is_mixer(child):
            setattr(layer, name, SequenceMixer(child, kernels))
        else:
            split_mixers(child, kernels)
