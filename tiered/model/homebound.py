"""What stands for a cache of transformers' kind where a device computes a prompt, and the cache is the processor's.

In: the keys, values and recurrent states of one micro-batch after the other, layer by layer. Out: all of them so far,
where they were computed; and in the cache's own memory, once the prompt has passed the layer. The device has room for
one layer's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from tiered.cache import PositionCache

_LINEAR: tuple[Any, ...] = tuple(
    getattr(cache_utils, name)
    for name in ("LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer")
    if hasattr(cache_utils, name)
)
"""Layers with recurrent states, as the newer of the supported versions of transformers have them."""
_KEPT: tuple[type, ...] = (DynamicLayer, DynamicSlidingWindowLayer, *_LINEAR)
"""Layers that take what they are given, and return all there is of a prompt that begins them."""


def can_come_home(cache: Cache) -> bool:
    """Whether `Homebound` can stand for `cache`, which must be empty."""
    layers: list[Any] = cache.layers
    return all(type(layer) in _KEPT for layer in layers) and not any(
        any(layer.has_previous_state.values()) for layer in layers if isinstance(layer, _LINEAR)
    )


@dataclass(eq=False)
class Home:
    """Where a prompt's keys, values and states go, and, in the layer that computes, those that are not there yet."""

    cache: Cache
    where: torch.device
    dtype: torch.dtype
    """The torch device of the cache, and what it keeps in 16 bits (all, in float32)."""
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    """[rows, heads, tokens, width], where they were computed."""
    layer: int = 0
    states: Any = None
    """The last one with recurrent states, and a layer like the cache's, which has them."""

    def keep(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> None:
        """Give the cache a layer's keys and values [rows, heads, tokens, width] of the whole prompt."""
        layers: list[Any] = self.cache.layers
        kept: Any = layers[layer] if layer < len(layers) else None
        skipped = 0
        is_sliding = isinstance(kept, DynamicSlidingWindowLayer) and not getattr(kept, "record_past", False)
        if is_sliding and kept.sliding_window > 1:
            # It would keep a view of the last ones, and so the memory of all of them.
            skipped = max(0, keys.shape[2] - kept.sliding_window + 1)
        keys, values = (self._at_home(x[:, :, skipped:]) for x in (keys, values))
        self.cache.update(keys, values, layer, *args, **kwargs)
        if skipped:
            kept.cumulative_length += skipped

    def keep_states(self) -> None:
        """Give the cache the recurrent states of the layer that has computed."""
        states, layer, self.states = self.states, self.layer, None
        for number, state in states.conv_states.items():
            if state is not None:
                width = states.conv_kernel_size[number]
                self.cache.update_conv_state(self._at_home(state), layer, number, conv_kernel_size=width)
        for number, state in states.recurrent_states.items():
            if state is not None:
                self.cache.update_recurrent_state(self._at_home(state), layer, number)

    def _at_home(self, tensor: torch.Tensor) -> torch.Tensor:
        # Processor and device may have other 16 bits.
        dtype = self.dtype if tensor.dtype.itemsize == self.dtype.itemsize else tensor.dtype
        return tensor.to(self.where, dtype, copy=True)


class Homebound(PositionCache):
    """Stands for `home.cache` in the layers of a micro-batch of tokens `start` to `stop` - 1 of a prompt of `tokens`:
    what it is given is attended to where it is, and is in the cache's own memory once the prompt has passed the
    layer."""

    def __init__(self, home: Home, start: int, stop: int, tokens: int, layers: int) -> None:
        super().__init__(start, layers)
        self._home, self._start, self._stop, self._tokens = home, start, stop, tokens

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of the prompt so far, where these are."""
        home, start, stop = self._home, self._start, self._stop
        keys, values = key_states, value_states
        if stop - start < self._tokens:
            if home.keys is None or home.values is None:
                home.keys, home.values = (x.new_empty(*x.shape[:2], self._tokens, x.shape[3]) for x in (keys, values))
            home.keys[:, :, start:stop], home.values[:, :, start:stop] = keys, values
            keys, values = home.keys[:, :, :stop], home.values[:, :, :stop]
        if stop == self._tokens:
            home.keys = home.values = None
            home.keep(keys, values, layer_idx, *args, **kwargs)
        return keys, values

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        states = self._states(layer_idx)
        found: torch.Tensor | None = states.conv_states[state_idx] if states.has_previous_state[state_idx] else None
        return found

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        states = self._states(layer_idx)
        found: torch.Tensor | None = (
            states.recurrent_states[state_idx] if states.has_previous_state[state_idx] else None
        )
        return found

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        found: torch.Tensor = self._states(layer_idx).update_conv_state(conv_states, state_idx, **kwargs)
        return found

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        found: torch.Tensor = self._states(layer_idx).update_recurrent_state(recurrent_states, state_idx, **kwargs)
        return found

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def settle(self) -> None:
        """A mixer has computed; kernels for single tokens have written into what they were given."""
        if self._stop == self._tokens:
            self._home.keep_states()

    def _states(self, layer: int) -> Any:
        home = self._home
        if home.states is None:
            assert not self._start, f"layer {layer}: no state of the tokens before {self._start}"
            layers: list[Any] = home.cache.layers
            home.layer, home.states = layer, _LINEAR[0](layers[layer].number_of_states)
        return home.states
