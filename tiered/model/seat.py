"""Where passes compute: on the processor, on a device, or prompts on the device and decoding on the processor.

A *seat* is one of these places with all that computes there. Seats of a run share the store and the KV cache, nothing
else: each has a skeleton of its own, whose tensors are where it computes.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Self

import torch

from tiered.arch import Skeleton
from tiered.cache import KVPool, Outbox
from tiered.device import Device
from tiered.kernels import LayerKernels
from tiered.model.attention import KernelAttention, use_attention
from tiered.model.bind import PROCESSOR, BoundModel
from tiered.model.record import Recorder


@dataclass(frozen=True, eq=False)
class Seat:
    """A model bound to where it computes."""

    model: BoundModel
    recorder: Recorder
    attention: KernelAttention
    device: Device | None = None
    """None: the processor."""

    @classmethod
    def take(
        cls,
        skeleton: Skeleton,
        dtype: torch.dtype,
        kernels: LayerKernels,
        attention: KernelAttention,
        device: Device | None = None,
    ) -> Self:
        """A seat of `skeleton`, which must be as built for `dtype`, and is changed. `kernels` and `attention` are the
        device's, if there is one."""
        use_attention(skeleton.model, attention.name)
        model = BoundModel(skeleton, dtype, kernels, PROCESSOR if device is None else device.where)
        return cls(model, Recorder(skeleton), attention, device)

    @property
    def where(self) -> torch.device:
        """The torch device of all it computes with."""
        return self.model.where

    def computing(self) -> AbstractContextManager[None]:
        """Entered by the thread that computes, for all that it gives the seat to compute."""
        return contextlib.nullcontext() if self.device is None else self.device.computing()

    def outbox(self, pool: KVPool) -> Outbox | None:
        """The way of new keys and values to `pool`; None if they are computed where it is."""
        assert self.device is not None or not pool.plan.on_device, "the processor cannot read a device's memory"
        assert self.device is None or pool.plan.on_device or pool.outbox, "nothing leads from the device to the cache"
        return None if self.device is None else pool.outbox


@dataclass(frozen=True, eq=False)
class Seats:
    """Who computes what of a pass over sequences. Both are the same seat unless prompts have one of their own."""

    prefill: Seat
    """For tokens of prompts."""
    decode: Seat
    """For the tokens of sequences that decode, and for all logits: those of a sequence must not depend on whether
    others decode in the same pass."""

    def of(self, tokens: int, is_prompt: bool) -> Seat:
        """The seat of `tokens` tokens of one sequence. Several are a prompt's, whatever is said of them."""
        return self.prefill if is_prompt or tokens > 1 else self.decode

    def __iter__(self) -> Iterator[Seat]:
        """Each seat once, in the order in which they compute: a device's first."""
        yield from sorted(dict.fromkeys((self.prefill, self.decode)), key=lambda seat: seat.device is None)

    def of_pass(self, used: Sequence[Seat]) -> tuple[Seat, ...]:
        """The seats of a pass whose tokens have the seats `used`, in that order."""
        return tuple(seat for seat in self if seat is self.decode or seat in used)
