"""A device that computes beside the processor, and the memory it has of its own.

Two implementations: CUDA through torch (`cuda.py`), and one that is emulated in this process (`emulated.py`), which
shows what a missing wait would do. Work is given to a device and done later, in three streams, each in order: copies
to the device, copies from it, and computing. Nothing is ordered between streams but by events:

    arrived = device.copy_in(host, slot, after=[freed])       the copy begins when `freed` has come
    with device.computing():                                  in the thread that computes
        device.wait_for(arrived)                              what is computed from here on begins when it has arrived
        ...                                                   operations of torch on tensors at `device.where`
        freed = device.record()                               comes when all that has been computed so far is done

An event's `wait` blocks the host. Nothing here ever waits for the whole device.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch


class Event(Protocol):
    """A point in one of a device's streams."""

    @property
    def is_done(self) -> bool:
        """Whether everything before this point has been done."""

    @property
    def seconds(self) -> float:
        """Seconds that the copy took which this is the end of, once it is done; 0 for any other point."""

    def wait(self) -> None:
        """Block this thread until it is done. Raises what the work raised. Where another thread goes on with what has
        been waited for, it calls this as well: only then are its own accesses known to come later."""


class Device(Protocol):
    """What streams, kernels and the model need of a device. Methods may be called from any thread."""

    @property
    def name(self) -> str:
        """As reports call it: "cuda:0", "emulated"."""

    @property
    def description(self) -> str:
        """What it is, for people: model, memory, compute capability."""

    @property
    def where(self) -> torch.device:
        """The torch device of its tensors; "cpu" where it is emulated."""

    @property
    def capability(self) -> tuple[int, int] | None:
        """Its compute capability; None where it is emulated."""

    @property
    def vram_nbytes(self) -> int:
        """Bytes of its memory that may be used, by its context and by all else."""

    def borrow(self, nbytes: int, label: str) -> torch.Tensor:
        """uint8 [nbytes] of its memory, whose address is a multiple of 4096. Raises BudgetError, with all that is in
        use by label, where the bytes it may use do not suffice."""

    def release(self, memory: torch.Tensor) -> None:
        """Give borrowed memory back. Work that uses it must have been done."""

    def warm_up(self, dtype: torch.dtype) -> None:
        """Use what every run in `dtype` uses, in the thread that computes, before a plan is made: what it takes for
        good is part of `context_nbytes` then. Raises ConfigError where the device cannot compute."""

    @property
    def context_nbytes(self) -> int:
        """Bytes of its memory that no plan has: the driver's context, libraries with their handles and workspaces,
        kernels, what this process used there when the device was opened or last warmed up, what torch's allocator
        rounds up to, and what kernels that are loaded later take."""

    @property
    def peak_nbytes(self) -> int:
        """Bytes of its memory that this process has used at most since it was opened or last warmed up: the context,
        what was borrowed, and what computing took besides. Where it is emulated what was
        borrowed alone: slots, weights and the KV cache."""

    @property
    def held_nbytes(self) -> int:
        """The same now: what `trim` leaves."""

    def trim(self) -> None:
        """Give memory back to the system that was borrowed, or that computing took, and that nothing uses any more."""

    def register(self, address: int, nbytes: int) -> str | None:
        """Make page-aligned host memory known to the device, so that copies need no staging and do not block. Returns
        why that was refused, or None. Memory that is not registered is copied all the same, more slowly, and by a
        thread of the device's: `wait_for` then blocks until that has come to it."""

    @property
    def unregistered(self) -> str | None:
        """Why host memory could not be registered, and so copies are staged; None where it could."""

    def unregister(self, address: int) -> None:
        """Before registered memory is unmapped."""

    def copy_in(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        """Copy host bytes `source` to device bytes `target` of the same length, behind earlier copies to the device and
        `after`. `source` must stay as it is, and `target` must not be used, until the event."""

    def copy_out(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        """The same from the device to the host."""

    def computing(self) -> AbstractContextManager[None]:
        """Entered by the thread that computes; torch's operations inside belong to the computing stream."""

    def wait_for(self, event: Event) -> None:
        """What is computed from here on begins when `event` is done. Blocks only where the device is emulated; an error
        of the work is then raised here as well."""

    @property
    def stalled_seconds(self) -> float:
        """Seconds so far that computing has stood still for events it was to wait for."""

    def record(self) -> Event:
        """Comes when all that has been given to the computing stream so far is done."""

    @property
    def checks(self) -> bool:
        """Whether it checks waits, and so wants to be told what is used."""

    def uses(self, memory: torch.Tensor, writes: bool = False) -> None:
        """Say that what is computed next reads (or writes) `memory`. For devices that check; else nothing."""

    def discards(self, memory: torch.Tensor) -> None:
        """Say that what is computed next reads nothing of `memory`, until something has been written there again. As
        `uses`."""

    def host_writes(self, memory: torch.Tensor) -> None:
        """Say that this thread of the host, or another on its behalf, writes `memory` of the host from here on. The
        thread that says so must have waited for what uses it, and issues the next copy from it. As `uses`."""

    def close(self) -> None:
        """Wait for work in flight, and give all memory back."""
