"""Devices that compute beside the processor: their memory, copies and order. Importing this touches no device."""

import re

from tiered.device.device import Device, Event
from tiered.errors import ConfigError

__all__ = ["Device", "Event", "open_device"]


def open_device(name: str, vram: int | None) -> Device:
    """The device called `name`: "cuda", "cuda:1" or "emulated", of whose memory `vram` bytes may be used; None: most
    of what is free.

    Raises ConfigError with the reason, in one line, where there is none or it cannot be used.
    """
    if name == "emulated":
        from tiered.device.emulated import EmulatedDevice

        if vram is None:
            raise ConfigError("--device emulated: it has no memory of its own; say how much with --vram, like 1GiB")
        return EmulatedDevice(vram)
    found = re.fullmatch(r"cuda(?::(\d+))?", name)
    if found is None:
        raise ConfigError(f"--device {name!r}: expected cuda, cuda:NUMBER or emulated")
    from tiered.device.cuda import CudaDevice

    return CudaDevice(int(found[1] or 0), vram)
