"""What the CUDA runtime and the driver's library say of devices, beside torch: whether one can be used, and how much of
its memory is in use.

Called by `cuda.py` when a device is opened, and when memory is registered.
"""

import contextlib
import ctypes
from pathlib import Path
from typing import Any, Final

import torch

from tiered.errors import ConfigError, shortened

LEAST_CAPABILITY: Final = (7, 0)
"""What kernels are written and compiled for."""
_PROCESSOR: Final = "or compute on the processor with --tiers disk,cpu"


def usable(index: int) -> Any:
    """The properties of device number `index`, as torch gives them. Raises ConfigError where it cannot be used."""
    name = f"--device cuda:{index}"
    if torch.version.cuda is None:
        raise ConfigError(
            f"{name}: this torch ({torch.__version__}) is built without CUDA; install a build with it, {_PROCESSOR}"
        )
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
    except (RuntimeError, AssertionError) as error:
        advice = f"check the driver with nvidia-smi, {_PROCESSOR}"
        if "too old" in str(error):
            advice = f"update the driver, or install a torch for an older CUDA than {torch.version.cuda}"
        raise ConfigError(f"{name}: {shortened(error)}; {advice}") from error
    if index >= count:
        there = ", ".join(f"cuda:{number}" for number in range(count)) or "none"
        raise ConfigError(f"{name}: no such device; there are: {there}")
    properties: Any = torch.cuda.get_device_properties(index)
    if (properties.major, properties.minor) < LEAST_CAPABILITY:
        raise ConfigError(
            f"{name}: {properties.name} has compute capability {properties.major}.{properties.minor}, expected "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or higher; use another one, {_PROCESSOR}"
        )
    return properties


def clear_error(where: torch.device) -> None:
    """Take note of the CUDA runtime's last error, which the next operation of torch would report as its own."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        path = line.split(maxsplit=5)[-1]
        if "libcudart" in path:
            ctypes.CDLL(path).cudaGetLastError()
            return
    with contextlib.suppress(RuntimeError):  # then it reports it here
        torch.zeros(1, device=where)


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def used_nbytes(properties: Any) -> int | None:
    """Bytes of the memory of the device with these properties that all processes use, as the driver's library tells
    without making a context. None where it does not."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    uuid = f"GPU-{getattr(properties, 'uuid', '')}"
    if library.nvmlInit_v2() != 0:
        return None
    try:
        handle, memory = ctypes.c_void_p(), _Memory()
        if library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) != 0:
            return None
        found = library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        return int(memory.used) if found == 0 else None
    finally:
        library.nvmlShutdown()
