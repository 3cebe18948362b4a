"""New keys and values on their way from a device to the KV cache in the host's memory.

In: a micro-batch's states in one layer, computed on the device. Out: the same states in the host's memory, given to
whoever stores them. The copy is one transfer and runs beside computing: what is computed next need not wait for it.
Other copies between the two that a layer must not end without are waited for with these (`state.py`).
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from tiered.device import Event, Lease
from tiered.units import round_up

_ALIGNMENT: Final = 64

Store = Callable[[torch.Tensor, torch.Tensor], None]
"""Takes keys and values [heads, tokens, head_dim] in the host's memory, which are valid until it returns."""


@dataclass(frozen=True, eq=False)
class _Sent:
    """What is on its way."""

    event: Event
    store: Callable[[], None]
    """Called when it has arrived."""


class Outbox:
    """Copies states out of a device, from `source` there to `target` (uint8 of as many bytes, the host's).

    States are stored in the order in which they were sent: when they are asked for by `flush`, or when memory for
    others is wanted. For the thread that computes.
    """

    def __init__(self, source: Lease, target: torch.Tensor) -> None:
        assert source.nbytes == len(target), (source.nbytes, len(target))
        self.device, self._source, self._target = source.device, source, target
        self._sent: list[_Sent] = []
        self._used = 0
        self._last: dict[bool, Event] = {}
        """The ends of the last copies, by whether these are to the device."""

    @property
    def where(self) -> torch.device:
        """The torch device that states come from."""
        return self.device.where

    @property
    def is_empty(self) -> bool:
        """Whether nothing is on its way."""
        return not self._sent

    def send(self, keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype, store: Store) -> None:
        """Begin to copy keys and values [heads, tokens, head_dim] as `dtype`; `store` gets them once they are there."""
        nbytes = (keys.numel() + values.numel()) * dtype.itemsize
        assert nbytes <= len(self._target), f"{nbytes:,} bytes of states, planned for {len(self._target):,}"
        if self._used + nbytes > len(self._target):
            self.flush()
        part = slice(self._used, self._used + nbytes)
        source, target = self._source.take()[part], self._target[part]
        self._used = round_up(part.stop, _ALIGNMENT)
        self.device.uses(source, writes=True)
        for leaving, states in zip(_apart(source.view(dtype), keys, values), (keys, values), strict=True):
            leaving.copy_(states)
        event = self.device.copy_out(source, target, after=[self.device.record()])
        self.follow(event, functools.partial(store, *_apart(target.view(dtype), keys, values)))

    def follow(self, copied: Event, store: Callable[[], None] = lambda: None, is_in: bool = False) -> None:
        """Wait for the end of a copy out of the device (or into it: `is_in`) with those that have been sent, and call
        `store` then."""
        self._sent.append(_Sent(copied, store))
        self._last[is_in] = copied

    def flush(self) -> None:
        """Wait for all that is on its way, and store it. Raises what copying raised."""
        sent, self._sent, self._used = self._sent, [], 0
        for number, item in enumerate(sent):
            try:
                item.event.wait()
                item.store()
            except BaseException:
                _settle(sent[number:])
                raise

    def drop(self) -> None:
        """After a pass that failed: wait until nothing is on its way any more, and store none of it."""
        sent, self._sent, self._used = self._sent, [], 0
        _settle(sent)

    def rest(self) -> None:
        """Give the device's memory back until something is sent again. Nothing is on its way."""
        self.close()
        self._source.end()

    def close(self) -> None:
        """For the thread that gives the memory back, when nothing is sent any more: wait for the last copies."""
        for last in self._last.values():
            with contextlib.suppress(Exception):  # whoever waited for it first has been told
                last.wait()


def _apart(both: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of `both`, which holds as many numbers as `keys` and `values`, for either of them."""
    return both[: keys.numel()].view(keys.shape), both[keys.numel() :].view(values.shape)


def _settle(sent: list[_Sent]) -> None:
    """Wait until the memory of `sent` is written to no more."""
    for item in sent:
        with contextlib.suppress(Exception):  # the pass has failed already, and says why
            item.event.wait()
