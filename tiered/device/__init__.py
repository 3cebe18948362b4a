"""Devices that compute beside the processor: their memory, copies and order. Importing this touches no device."""

import re

from tiered.device.device import Device, Event
from tiered.device.lease import Lease
from tiered.errors import ConfigError
from tiered.units import format_size

__all__ = ["Device", "Event", "Lease", "open_device"]


def open_device(name: str, vram: int | None) -> Device:
    """The device called `name`: "cuda", "cuda:1" or "emulated", of whose memory `vram` bytes may be used; None: most
    of what is free. An emulated one has at most what is free of the machine's.

    Raises ConfigError with the reason, in one line, where there is none or it cannot be used.
    """
    if name == "emulated":
        from tiered.device.emulated import EmulatedDevice
        from tiered.plan.budget import memory_limits

        if vram is None:
            raise ConfigError("--device emulated: it has no memory of its own; say how much with --vram, like 1GiB")
        free = min(memory_limits(), key=lambda limit: limit.available)
        if vram > free.available:
            raise ConfigError(
                f"--vram of {format_size(vram)}: an emulated device's memory is this machine's, of which "
                f"{format_size(free.available)} are free ({free.name}); use less"
            )
        return EmulatedDevice(vram)
    found = re.fullmatch(r"cuda(?::(\d+))?", name)
    if found is None:
        raise ConfigError(f"--device {name!r}: expected cuda, cuda:NUMBER or emulated")
    from tiered.device.cuda import CudaDevice

    return CudaDevice(int(found[1] or 0), vram)
