"""Where a folder lies: its file system, the device below, and how files there can be read.

In: a path. Out: frozen facts from the kernel's files (roots replaceable, for tests). `tiered doctor` calls it.
"""

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tiered.errors import ReadError
from tiered.io.modes import ProbeResult, probe_mode
from tiered.store import PAGE

PROC: Final = Path("/proc")
SYS: Final = Path("/sys")
_QUEUE_FILES: Final = ("rotational", "read_ahead_kb", "scheduler", "nr_requests", "max_sectors_kb")


@dataclass(frozen=True)
class Mount:
    """The mount a path lies on."""

    point: Path
    kind: str
    """Type of the file system: "ext4", "tmpfs"."""
    source: str
    """Device, or whatever the file system calls its origin."""
    options: str


@dataclass(frozen=True)
class Queue:
    """Settings of a block device's request queue."""

    device: str
    rotational: bool | None
    read_ahead_nbytes: int | None
    scheduler: str | None
    requests: int | None
    max_request_nbytes: int | None


def kind_of(path: Path) -> str:
    """The type of the file system of `path`; "unknown" where the system does not tell."""
    try:
        return mount_of(path).kind
    except (ReadError, OSError):
        return "unknown"


def mount_of(path: Path, proc: Path = PROC) -> Mount:
    """The mount of `path`; raises ReadError where the kernel lists none."""
    real = path.resolve()
    best: Mount | None = None
    for line in (proc / "self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, source, *options) = left.split(), right.split()
        mount = Mount(Path(_unescape(fields[4])), kind, _unescape(source), ",".join([fields[5], *options]))
        # A later mount on the same point hides the earlier one.
        if real.is_relative_to(mount.point) and (best is None or mount.point.is_relative_to(best.point)):
            best = mount
    if best is None:
        raise ReadError(f"{path}: no mount in {proc / 'self/mountinfo'} contains it")
    return best


def queue_of(path: Path, sys: Path = SYS) -> Queue:
    """The request queue of the device below `path`.

    Raises ReadError where no block device is below it (tmpfs, network and overlay file systems).
    """
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    folder = sys / "dev/block" / number
    if not folder.exists():
        raise ReadError(f"{path}: device {number} is no block device; the file system keeps its data elsewhere")
    folder = folder.resolve()
    # A partition has no queue of its own: its disk, one folder up, has.
    disk = folder if (folder / "queue").is_dir() else folder.parent
    values = {name: _read(disk / "queue" / name) for name in _QUEUE_FILES}
    scheduler = values["scheduler"]
    active = re.search(r"\[(.+?)\]", scheduler or "")
    return Queue(
        device=disk.name,
        rotational=None if values["rotational"] is None else values["rotational"] == "1",
        read_ahead_nbytes=_kib(values["read_ahead_kb"]),
        scheduler=active.group(1) if active else scheduler,
        requests=None if values["nr_requests"] is None else int(values["nr_requests"]),
        max_request_nbytes=_kib(values["max_sectors_kb"]),
    )


def free_nbytes(path: Path) -> int:
    """Bytes that can still be written below `path`."""
    return shutil.disk_usage(path).free


def probe_folder(folder: Path) -> ProbeResult:
    """How new files in `folder` can be read, found out with a temporary file of 4096 bytes.

    Raises ReadError where no file can be written there.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tiered-probe-") as file:
            file.write(bytes(PAGE))
            file.flush()
            os.fsync(file.fileno())
            return probe_mode(Path(file.name))
    except OSError as error:
        raise ReadError(f"{folder}: no temporary file can be written and read here: {error.strerror}") from error


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _kib(text: str | None) -> int | None:
    return None if text is None else int(text) * 1024


def _unescape(text: str) -> str:
    """mountinfo writes blanks and backslashes as octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)
