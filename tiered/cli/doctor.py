"""`tiered doctor`: what this machine can do, what is switched off, and why. One function per section.

A section is a list of facts. What is switched off, and what deserves a warning, is noted once for the whole
examination. A probe that fails says why in its place; it never ends the examination.
"""

import importlib.metadata
import os
import platform
import resource
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import click

from tiered.bench import measure_raw
from tiered.cli.doctor_findings import Examination, Fact, lines, plain_fact, rate_fact, size_fact
from tiered.cli.doctor_gpu import gpu_facts
from tiered.cli.doctor_kernels import kernel_facts
from tiered.cli.lines import print_json
from tiered.cli.profile import summary
from tiered.errors import ConfigError, ReadError, StoreError, TieredError
from tiered.io import Arena, ReadMode, probe_mode
from tiered.io.arena import populate_refusal
from tiered.io.filesystem import free_nbytes, mount_of, probe_folder, queue_of
from tiered.io.modes import ProbeResult
from tiered.plan import available_budget, memory_limits
from tiered.plan import system as machine
from tiered.plan.machines import find_profile, profile_path
from tiered.store import read_manifest
from tiered.units import GIB, MIB, format_size

_PACKAGES: Final = ("torch", "transformers", "safetensors", "numpy")
_AMX: Final = ("amx_tile", "amx_bf16", "amx_int8")
_MEMORY_NBYTES: Final = 64 * MIB
_TEST_NBYTES: Final = 256 * MIB
_ENOUGH_NBYTES: Final = 64 * MIB
"""Files smaller than this are read in too short a time to say much about a disk."""


def run(path: Path, disk_test: bool, as_json: bool) -> None:
    """Look at everything, and show it as lines or as JSON."""
    found = examine(path, disk_test)
    if as_json:
        print_json(found.to_json())
        return
    for line in lines(found):
        click.echo(line)


def examine(path: Path, disk_test: bool) -> Examination:
    """Look at everything; `path` is a store or a folder where one could be."""
    found = Examination()
    found.add("software", _software)
    found.add("cpu", _cpu)
    found.add("kernels", kernel_facts)
    found.add("memory", _memory)
    found.add("cgroups", _cgroups)
    found.add("disk", lambda examination: _disk(examination, path, disk_test))
    found.add("gpu", gpu_facts)
    found.add("profile", lambda examination: _profile(examination, path))
    return found


def _software(found: Examination) -> Iterable[Fact]:
    yield plain_fact("tiered", importlib.metadata.version("tiered"))
    yield plain_fact("python", platform.python_version())
    yield plain_fact("kernel", platform.release())
    for package in _PACKAGES:
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
    refusal = populate_refusal()
    yield Fact("taken ahead of reads", "yes" if refusal is None else f"no: {refusal}", refusal is None)
    if refusal is not None:
        found.switch_off("memory taken ahead of reads", refusal, "run on Linux 5.14 or later")


def _cgroups(found: Examination) -> Iterable[Fact]:
    yield plain_fact("version", machine.cgroup_version())
    support = machine.cgroup_support()
    for way in support:
        yield Fact(way.method, "can be tried" if way.refusal is None else way.refusal, way.refusal is None)
    if all(way.refusal is not None for way in support):
        found.switch_off(
            "runs limited by a cgroup (tests, 'tiered bench --memory-limit' and tools/limit.py)",
            "; ".join(f"{way.method}: {way.refusal}" for way in support),
            "root, a delegated cgroup, or a systemd user session; 'tiered generate --ram' works without",
        )


def _disk(found: Examination, path: Path, disk_test: bool) -> Iterable[Fact]:
    """What lies below `path`, and how fast and in which way it can be read."""
    yield Fact("path", str(path), str(path))
    if not path.exists():
        found.warnings.append(f"{path}: does not exist; pass a store, or the folder where one is to be")
        return
    folder = path if path.is_dir() else path.absolute().parent
    files = _block_files(path)
    yield Fact("is a store", "yes" if files else "no", bool(files))
    mount = mount_of(folder)
    yield Fact("file system", f"{mount.kind} on {mount.point} ({mount.options})", mount.kind)
    yield Fact("source", mount.source, mount.source)
    yield Fact("free", format_size(free_nbytes(folder)), free_nbytes(folder))
    yield from _queue(folder)
    try:
        probe = probe_mode(files[0]) if files else probe_folder(folder)
    except (OSError, ReadError) as error:
        yield Fact("read mode", f"unknown: {error}", None)
        return
    yield from _mode(found, probe, mount.kind)
    if files:
        yield from _store_bandwidth(files, probe)
    if disk_test:
        yield from _tested(folder, probe)
    elif not files:
        yield Fact("bandwidth", "not measured; --disk-test writes and reads a temporary file of 256 MiB", None)


def _block_files(path: Path) -> list[Path]:
    """The block files of the store at `path`; none where it is no store."""
    try:
        manifest = read_manifest(path)
    except (StoreError, ReadError):
        return []
    return [file for file in (path / info.path for info in manifest.files) if file.is_file()]


def _queue(folder: Path) -> Iterable[Fact]:
    try:
        queue = queue_of(folder)
    except TieredError as error:
        yield Fact("device", f"none: {error}", None)
        return
    kind = {True: "rotating by its own account", False: "not rotating", None: "of unknown kind"}[queue.rotational]
    yield Fact("device", f"{queue.device}, {kind}", queue.device)
    yield Fact("rotational", str(queue.rotational).lower(), queue.rotational)
    yield Fact("scheduler", queue.scheduler or "unknown", queue.scheduler)
    for label, nbytes in (("read ahead", queue.read_ahead_nbytes), ("largest request", queue.max_request_nbytes)):
        yield Fact(label, "unknown" if nbytes is None else format_size(nbytes), nbytes)
    yield Fact("queue requests", str(queue.requests), queue.requests)


def _mode(found: Examination, probe: ProbeResult, kind: str) -> Iterable[Fact]:
    yield Fact("read mode", probe.mode.value, probe.mode.value)
    yield Fact("refused modes", "; ".join(probe.refused) or "none", list(probe.refused))
    if probe.mode is not ReadMode.DIRECT:
        found.switch_off(
            "O_DIRECT",
            f"the file system ({kind}) refuses it ({'; '.join(probe.refused)}); {probe.mode.value} is used",
            "keep the store on a local disk with ext4 or xfs",
        )
    if kind in ("tmpfs", "ramfs"):
        found.warnings.append(
            f"the path lies in memory ({kind}): a store there takes the memory that streaming is to save"
        )


def _store_bandwidth(files: Sequence[Path], probe: ProbeResult) -> Iterable[Fact]:
    with Arena(_MEMORY_NBYTES) as arena:
        slab = arena.borrow(_MEMORY_NBYTES, "bandwidth")
        raw = measure_raw(files, slab.view, probe.mode is ReadMode.DIRECT)
        arena.release(slab)
    how = f"raw, sustained by the best of a sweep: {raw.threads} threads, pieces of {format_size(raw.block_nbytes)}"
    if probe.mode is not ReadMode.DIRECT:
        how += "; through the page cache, so memory is measured too"
    if sum(file.stat().st_size for file in files) < _ENOUGH_NBYTES:
        how += "; the store is too small for this to mean much"
    yield rate_fact("bandwidth", raw.bytes_per_second, how)


def _tested(folder: Path, probe: ProbeResult) -> Iterable[Fact]:
    """Write a temporary file, measure on it, remove it."""
    if free_nbytes(folder) < _TEST_NBYTES + GIB:
        yield Fact("disk test", f"left out: less than {format_size(_TEST_NBYTES + GIB)} are free", None)
        return
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tiered-test-", buffering=0) as file:
            # Random, because some disks and file systems compress, and do not store zeros at all.
            data = os.urandom(4 * MIB)
            began = time.perf_counter()
            for _ in range(_TEST_NBYTES // len(data)):
                file.write(data)
            os.fsync(file.fileno())
            written = _TEST_NBYTES / (time.perf_counter() - began)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            yield rate_fact("write bandwidth", written, f"a temporary file of {format_size(_TEST_NBYTES)}, with fsync")
            for fact in _store_bandwidth([Path(file.name)], probe):
                yield Fact("read bandwidth", fact.text, fact.value)
    except OSError as error:
        yield Fact("disk test", f"failed: {error.strerror}", None)


def _profile(found: Examination, path: Path) -> Iterable[Fact]:
    """What `tiered profile` has measured on this machine, with the disk below `path`."""
    if not path.exists():
        return
    command = f"tiered profile --dir {path}" if path.is_dir() else "tiered profile"
    try:
        known = find_profile(path)
    except ConfigError as error:
        found.warnings.append(str(error))
        yield Fact("measured", "damaged, see the warnings", None)
        return
    if known is None:
        yield Fact("measured", f"not yet; to measure this machine and disk in two minutes: {command}", None)
        return
    yield from (Fact(label, text, value) for label, text, value in summary(known))
    yield plain_fact("file", str(profile_path(path)))
