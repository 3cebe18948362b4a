"""Memory of a device that is given back while nothing computes there, and borrowed again when something does."""

import torch

from tiered.device.device import Device


class Lease:
    """`nbytes` bytes of `device`, called `label` in refusals. For one thread at a time."""

    def __init__(self, device: Device, nbytes: int, label: str) -> None:
        self.device, self.nbytes, self._label = device, nbytes, label
        self._memory: torch.Tensor | None = None

    @property
    def is_held(self) -> bool:
        """Whether they are borrowed now."""
        return self._memory is not None

    def take(self) -> torch.Tensor:
        """uint8 [nbytes], borrowed now if they were not: their address is another one then. Raises BudgetError."""
        if not self.nbytes:
            return torch.empty(0, dtype=torch.uint8, device=self.device.where)
        if self._memory is None:
            self._memory = self.device.borrow(self.nbytes, self._label)
        return self._memory

    def end(self) -> None:
        """Give them back, if they are borrowed. This thread must have waited for what uses them."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self.device.release(memory)
