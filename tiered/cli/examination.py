"""What `tiered doctor` looks at: one function per section. Heavy imports live here.

A section is a list of facts. What is switched off, and what deserves a warning, is noted once for the whole
examination. A probe that fails says why in its place; it never ends the examination.
"""

import importlib.metadata
import platform
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tiered.cli.disk_examination import disk_facts
from tiered.cli.findings import Examination, Fact, plain_fact, size_fact
from tiered.cli.kernel_examination import kernel_facts
from tiered.plan import available_budget, memory_limits
from tiered.plan import hardware as machine
from tiered.units import format_size

PACKAGES: Final = ("torch", "transformers", "safetensors", "numpy")
_AMX: Final = ("amx_tile", "amx_bf16", "amx_int8")


def examine(path: Path, disk_test: bool) -> Examination:
    """Look at everything; `path` is a store or a folder where one could be."""
    found = Examination()
    found.add("software", _software)
    found.add("cpu", _cpu)
    found.add("kernels", kernel_facts)
    found.add("memory", _memory)
    found.add("cgroups", _cgroups)
    found.add("disk", lambda examination: disk_facts(examination, path, disk_test))
    found.add("gpu", _gpu)
    return found


def _software(found: Examination) -> Iterable[Fact]:
    yield plain_fact("tiered", importlib.metadata.version("tiered"))
    yield plain_fact("python", platform.python_version())
    yield plain_fact("kernel", platform.release())
    for package in PACKAGES:
        try:
            yield plain_fact(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            found.warnings.append(f"{package} is not installed; install tiered with its dependencies")
            yield Fact(package, "not installed", None)


def _cpu(found: Examination) -> Iterable[Fact]:
    cpu = machine.cpu()
    yield plain_fact("model", cpu.model)
    yield plain_fact("architecture", cpu.architecture)
    yield Fact("processors", f"{cpu.allowed} of {cpu.present} may be used", cpu.allowed)
    yield Fact("features", " ".join(cpu.features) or "none of those asked about", list(cpu.features))
    yield Fact("missing features", " ".join(cpu.missing) or "none", list(cpu.missing))
    if set(_AMX) & set(cpu.features):
        refusal = machine.amx_refusal()
        yield Fact("amx usable", "yes" if refusal is None else f"no: {refusal}", refusal is None)
        if refusal is not None:
            found.switch_off("AMX", refusal, "run on Linux 5.16 or later, outside sandboxes that filter arch_prctl")
    if cpu.allowed < cpu.present:
        found.switch_off(
            f"{cpu.present - cpu.allowed} processors",
            "this process may not run on them (taskset, a cpuset, a container's limit)",
            "start it with a wider CPU set",
        )


def _memory(found: Examination) -> Iterable[Fact]:
    for key in ("MemTotal", "MemAvailable"):
        yield size_fact(key, machine.meminfo(key))
    limits = memory_limits()
    binding = min(limits, key=lambda limit: limit.available)
    values = {limit.name: limit.available for limit in limits}
    text = "; ".join(f"{limit.name} leaves {format_size(limit.available)}" for limit in limits)
    yield Fact("limits", text, values)
    yield Fact("binding limit", binding.name, binding.name)
    budget = available_budget()
    yield Fact("default budget", f"{format_size(budget)} (90 % of the binding limit)", budget)
    yield from _swap(found)
    yield from _huge_pages(found)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    yield Fact("lockable memory", "unlimited" if unlimited else format_size(soft), None if unlimited else soft)


def _swap(found: Examination) -> Iterable[Fact]:
    swap = machine.meminfo("SwapTotal")
    yield Fact("swap", format_size(swap) if swap else "none", swap)
    if swap:
        found.warnings.append(
            f"{format_size(swap)} of swap: a budget above what is free would page weights out instead of failing, "
            "and time would be lost unseen; keep --ram below MemAvailable, or switch swap off (swapoff -a)"
        )


def _huge_pages(found: Examination) -> Iterable[Fact]:
    setting = machine.huge_pages()
    yield plain_fact("huge pages", setting)
    if setting == "never":
        found.switch_off(
            "huge pages",
            "/sys/kernel/mm/transparent_hugepage/enabled says never",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )


def _cgroups(found: Examination) -> Iterable[Fact]:
    yield plain_fact("version", machine.cgroup_version())
    support = machine.cgroup_support()
    for way in support:
        yield Fact(way.method, "can be tried" if way.refusal is None else way.refusal, way.refusal is None)
    if all(way.refusal is not None for way in support):
        found.switch_off(
            "runs limited by a cgroup (tests and tools/limit.py)",
            "; ".join(f"{way.method}: {way.refusal}" for way in support),
            "root, a delegated cgroup, or a systemd user session; 'tiered generate --ram' works without",
        )


def _gpu(found: Examination) -> Iterable[Fact]:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Fact("seen by torch", ", ".join(names) or "none", names)
    yield Fact("used", "no: this version computes on the CPU only", False)
    why = "this version computes on the CPU only"
    found.switch_off("GPU", why if names else f"{why}, and torch sees none here", "a later version of tiered")
