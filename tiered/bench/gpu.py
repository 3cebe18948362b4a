"""How fast a graphics processor is: the bus to it, its memory, its matrix products. Absent where torch sees none."""

import time
from collections.abc import Callable
from typing import Final

import torch

from tiered.device import Device
from tiered.kernels import device_dtype
from tiered.plan.hardware import GpuRates
from tiered.units import MIB

_NBYTES: Final = 256 * MIB
_SIDE: Final = 8192
"""Of the square matrices that are multiplied: large enough for any processor to reach what it sustains."""
_SECONDS: Final = 0.5


def measure_gpu() -> GpuRates | None:
    """The first device that torch sees, with copies from and to pinned memory; None where there is none."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    dtype = device_dtype(torch.cuda.get_device_capability(0), torch.bfloat16)
    host = torch.zeros(_NBYTES, dtype=torch.uint8).pin_memory()
    device, other = (torch.zeros(_NBYTES, dtype=torch.uint8, device="cuda:0") for _ in range(2))
    left, right = (torch.randn(_SIDE, _SIDE, dtype=dtype, device="cuda:0") for _ in range(2))
    product = torch.empty_like(left)
    return GpuRates(
        name=found.name,
        vram=found.total_memory,
        host_to_device=_NBYTES / _time(lambda: device.copy_(host, non_blocking=True)),
        device_to_host=_NBYTES / _time(lambda: host.copy_(device, non_blocking=True)),
        memory=2 * _NBYTES / _time(lambda: other.copy_(device)),  # read and written
        flops=2 * _SIDE**3 / _time(lambda: torch.matmul(left, right, out=product)),
    )


def measure_bus(device: Device, memory: torch.Tensor, nbytes: int, seconds: float = _SECONDS) -> float:
    """Bytes per second of plain copies to `device` from the first `nbytes` bytes of `memory` (uint8, whole pages of the
    host's), which is registered meanwhile, into as much that is borrowed. Nothing else may use the device."""
    there = device.borrow(nbytes, "measuring the bus")
    refusal = device.register(memory.data_ptr(), memory.nbytes)
    try:
        copied, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds or not copied:
            for _ in range(4):
                last = device.copy_in(memory[:nbytes], there)
            last.wait()
            copied += 4 * nbytes
        return copied / elapsed
    finally:
        if refusal is None:
            device.unregister(memory.data_ptr())
        device.release(there)


def _time(work: Callable[[], object]) -> float:
    """Seconds per call of `work`, of as many as `_SECONDS` allow after some that do not count."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    runs, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < _SECONDS or not runs:
        for _ in range(4):
            work()
        torch.cuda.synchronize()
        runs += 4
    return elapsed / runs
