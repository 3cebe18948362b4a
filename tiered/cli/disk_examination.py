"""The disk section of `tiered doctor`: file system, device, read mode, bandwidth."""

import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from tiered.bench import measure_raw
from tiered.cli.findings import Examination, Fact, rate_fact
from tiered.errors import ReadError, StoreError, TieredError
from tiered.io import Arena, ReadMode, probe_mode
from tiered.io.filesystem import free_nbytes, mount_of, probe_folder, queue_of
from tiered.io.modes import ProbeResult
from tiered.store import read_manifest
from tiered.units import GIB, MIB, format_size

MEMORY_NBYTES: Final = 64 * MIB
TEST_NBYTES: Final = 256 * MIB
_ENOUGH_NBYTES: Final = 64 * MIB
"""Files smaller than this are read in too short a time to say much about a disk."""


def disk_facts(found: Examination, path: Path, disk_test: bool) -> Iterable[Fact]:
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
    with Arena(MEMORY_NBYTES) as arena:
        slab = arena.borrow(MEMORY_NBYTES, "bandwidth")
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
    if free_nbytes(folder) < TEST_NBYTES + GIB:
        yield Fact("disk test", f"left out: less than {format_size(TEST_NBYTES + GIB)} are free", None)
        return
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tiered-test-", buffering=0) as file:
            # Random, because some disks and file systems compress, and do not store zeros at all.
            data = os.urandom(4 * MIB)
            began = time.perf_counter()
            for _ in range(TEST_NBYTES // len(data)):
                file.write(data)
            os.fsync(file.fileno())
            written = TEST_NBYTES / (time.perf_counter() - began)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            yield rate_fact("write bandwidth", written, f"a temporary file of {format_size(TEST_NBYTES)}, with fsync")
            for fact in _store_bandwidth([Path(file.name)], probe):
                yield Fact("read bandwidth", fact.text, fact.value)
    except OSError as error:
        yield Fact("disk test", f"failed: {error.strerror}", None)
