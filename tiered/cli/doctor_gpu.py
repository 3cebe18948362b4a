"""Which GPU could compute on this machine, and what keeps one from it. Nothing is computed there."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import torch

from tiered.cli.doctor_findings import Examination, Fact
from tiered.kernels import device_dtype, triton_refusal
from tiered.units import format_size

_DRIVER: Final = Path("/proc/driver/nvidia/version")


def gpu_facts(found: Examination) -> Iterable[Fact]:
    """The devices that torch sees, driver and kernels, and whether the GPU tier can be used."""
    count, why = torch.cuda.device_count(), None
    yield Fact("seen by torch", str(count) if count else "none", count)
    driver = _driver()
    yield Fact("driver", driver or "none found", driver)
    yield Fact("cuda of torch", torch.version.cuda or "none: a build for the processor", torch.version.cuda)
    if count:
        yield from _devices(count)
    else:
        why, turn_on = _why_none(driver)
        found.switch_off("GPU", why, turn_on)
    devices: list[torch.device | None] = [torch.device("cuda", index) for index in range(count)]
    refusal = next(filter(None, map(triton_refusal, devices or [None])), None)
    yield Fact("triton", "yes" if refusal is None else f"no: {refusal}", refusal is None)
    if count and refusal is not None:
        found.switch_off("Triton kernels", refusal, "pip install 'tiered[gpu]', and a C compiler in PATH (or CC)")
    usable = "with --tiers disk,cpu,gpu" if why is None else f"no: {why}; --device emulated plays one"
    yield Fact("used", usable, why is None)


def _devices(count: int) -> Iterable[Fact]:
    """What is known of each device."""
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        dtype = (
            "bfloat16"
            if device_dtype(capability, torch.bfloat16) is torch.bfloat16
            else "float16: it has no arithmetic in bfloat16"
        )
        text = f"{properties.name}, {format_size(properties.total_memory)}, compute capability {capability[0]}."
        value = {
            "name": properties.name,
            "memory": properties.total_memory,
            "compute_capability": f"{capability[0]}.{capability[1]}",
        }
        yield Fact(f"cuda:{index}", f"{text}{capability[1]}, computes in {dtype}", value)


def _driver() -> str | None:
    """The driver's version, as its kernel module tells it."""
    try:
        words = _DRIVER.read_text(encoding="utf-8", errors="replace").splitlines()[0].split()
    except (OSError, IndexError):
        return None
    return next((word for word in words if word.replace(".", "").isdigit() and "." in word), None)


def _why_none(driver: str | None) -> tuple[str, str]:
    """Why torch sees no device, and what would change that."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build for the processor",
            "a CUDA device, and a build of torch for it: https://pytorch.org/get-started/locally",
        )
    if driver is None:
        return "no NVIDIA driver is loaded", "a CUDA device, and its driver"
    return (
        f"torch {torch.__version__} sees no device with driver {driver}",
        f"a driver for CUDA {torch.version.cuda} or newer; CUDA_VISIBLE_DEVICES may hide devices",
    )
