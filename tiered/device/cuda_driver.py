"""What the CUDA runtime and the driver's library say of devices, beside torch: whether one can be used, and how much of
its memory is in use.

Called by `cuda.py` when a device is opened and warmed up, and when memory is registered.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from tiered.errors import ConfigError, shortened
from tiered.units import MIB

LEAST_CAPABILITY: Final = (7, 0)
"""What kernels are written and compiled for."""
_PROCESSOR: Final = "or compute on the processor with --tiers disk,cpu"
_UNKNOWN_CONTEXT_NBYTES: Final = 640 * MIB
"""What a context is taken for where the driver's library does not tell."""
_MOST_PROCESSES: Final = 256
"""Processes on one device that are looked at."""
_NOT_TOLD: Final = 2**64 - 1
"""NVML_VALUE_NOT_AVAILABLE."""


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


class Use:
    """What this process uses of the memory of device number `index` outside torch's allocator: the context, libraries,
    compiled kernels.

    Made before the process does anything there. A context that is there already, of an earlier opening or because the
    program computes on the device itself, cannot be seen being made: what the driver says of this process is taken
    then, or what was measured when it was made.
    """

    def __init__(self, index: int, properties: Any) -> None:
        self._index, self._properties = index, properties
        known = _CONTEXTS.get(index) if _has_context(index) else 0
        used = used_nbytes(properties)
        self._others: int | None = None
        """Bytes that others use, as far as is known."""
        if used is not None and known is not None:
            self._others = used - known - torch.cuda.memory_reserved(index)

    def measure(self) -> int:
        """Bytes of it now. It never shrinks."""
        reserved = torch.cuda.memory_reserved(self._index)
        own, used = own_nbytes(self._properties), used_nbytes(self._properties)
        known = _CONTEXTS.get(self._index)
        # In a container the driver may mean another process by the same number.
        if own is not None and reserved < own and (used is None or own <= used):
            found = own - reserved
        elif used is not None and self._others is not None:
            found = used - self._others - reserved
        else:
            return _UNKNOWN_CONTEXT_NBYTES if known is None else known
        _CONTEXTS[self._index] = max(found, known or 0)
        return _CONTEXTS[self._index]


_CONTEXTS: Final[dict[int, int]] = {}
"""Bytes that each device's context was last measured to take, by its index. It lives as long as the process, as the
contexts do: torch makes each once, and ends none."""


def _has_context(index: int) -> bool:
    """Whether this process has a context there."""
    return bool(torch._C._cuda_hasPrimaryContext(index))  # type: ignore[attr-defined]


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t, as of version 2."""

    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


def used_nbytes(properties: Any) -> int | None:
    """Bytes of the memory of the device with these properties that all processes use, as the driver's library tells
    without making a context. None where it does not."""
    with _library(properties) as (library, handle):
        memory = _Memory()
        if library is None or library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
            return None
        return int(memory.used)


def own_nbytes(properties: Any) -> int | None:
    """The same of this process alone, allocator and all; None where it has no context, or the library does not tell,
    as in many containers."""
    with _library(properties) as (library, handle):
        processes, count = (_Process * _MOST_PROCESSES)(), ctypes.c_uint(_MOST_PROCESSES)
        ask = getattr(library, "nvmlDeviceGetComputeRunningProcesses_v3", None)
        if ask is None or ask(handle, ctypes.byref(count), processes) != 0:
            return None
        own = [process.used for process in processes[: count.value] if process.pid == os.getpid()]
        return int(own[0]) if own and own[0] != _NOT_TOLD else None


@contextlib.contextmanager
def _library(properties: Any) -> Iterator[tuple[Any, ctypes.c_void_p]]:
    """The driver's library and its handle of the device; no library where there is none, or it does not know it."""
    handle = ctypes.c_void_p()
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        yield None, handle
        return
    if library.nvmlInit_v2() != 0:
        yield None, handle
        return
    try:
        uuid = f"GPU-{getattr(properties, 'uuid', '')}"
        found = library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle))
        yield library if found == 0 else None, handle
    finally:
        library.nvmlShutdown()
