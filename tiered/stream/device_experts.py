"""Experts that a device computes with: each is copied to one of two slots there, while the one before is computed with.

In: a chosen expert in the host's memory. Out: its bytes on the device, until the next but one is brought. Called by the
cache of experts (`experts.py`), in the thread that computes.
"""

from collections.abc import Sequence
from typing import Final

import torch

from tiered.device import Device, Event, Lease
from tiered.stream.bus import Bus
from tiered.stream.loan import AnyWeight

SLOTS: Final = 2
"""Slots on the device: one is computed with while the next expert is copied to the other."""


class DeviceExperts:
    """Slots of `slot_nbytes` bytes on `device`, from `open` to `close`."""

    def __init__(self, device: Device, slot_nbytes: int, bus: Bus) -> None:
        self._device, self._slot_nbytes, self._bus = device, slot_nbytes, bus
        self._memory = Lease(device, SLOTS * slot_nbytes, "chosen experts")
        self._freed: list[Sequence[Event]] = [()] * SLOTS
        """The last use of each slot."""
        self._next = 0
        self.views: dict[tuple[int, int], Sequence[AnyWeight]] = {}
        """The matrices of whichever expert is in a slot, by slot and layout: for the cache."""

    def open(self) -> None:
        """Borrow the slots. Raises BudgetError."""
        self._memory.take()
        self.release_all()  # what was computed there for others may not be done

    def close(self) -> None:
        """Give them back, when they have been computed with. They are borrowed again when an expert is brought."""
        self._device.record().wait()
        self._memory.end()
        self.views.clear()

    def bring(self, source: torch.Tensor, name: str) -> tuple[int, torch.Tensor]:
        """Copy an expert; its slot's number and the slot. `source` may be read into again when this returns."""
        if not self._memory.is_held:
            self.open()
        slot, self._next = self._next, (self._next + 1) % SLOTS
        memory = self._slot(slot)
        arrived = self._device.copy_in(source, memory[: source.nbytes], self._freed[slot])
        arrived.wait()
        self._bus.count(name, source.nbytes, arrived.seconds)
        self._device.wait_for(arrived)
        self._device.uses(memory)
        return slot, memory

    def release(self) -> None:
        """What was brought last has been computed with."""
        slot = (self._next - 1) % SLOTS
        self._device.discards(self._slot(slot))
        self._freed[slot] = (self._device.record(),)

    def _slot(self, number: int) -> torch.Tensor:
        return self._memory.take()[number * self._slot_nbytes :][: self._slot_nbytes]

    def release_all(self) -> None:
        """Nothing that was brought will be computed with any more."""
        self._freed = [(self._device.record(),)] * SLOTS
