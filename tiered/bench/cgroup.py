"""Ways to bound what a process and its children take, tried in this order: cgroup v2, cgroup v1, a systemd scope.

In: a number of bytes, or a rate. Out: the words that, put before a command, make it join a group with that limit. Where
no way works the error says why for each. `limit.py` runs commands with it.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tiered.errors import ConfigError, TieredError
from tiered.units import parse_option

CANNOT_LIMIT: Final = 125
POLL_SECONDS: Final = 0.02
SCOPE_SECONDS: Final = 10.0

# The shell joins the group before it becomes the command: not one page of the command is charged elsewhere,
# and nothing of this program is charged to the group.
JOIN: Final = 'echo $$ > "$1" || exit 125; shift; exec "$@"'
# systemd removes an empty scope, and the figures with it: a sleeper keeps it until they have been read.
HOLD: Final = 'sleep 2147483647 </dev/null >/dev/null 2>&1 & exec "$@"'
PLAIN: Final = 'exec "$@"'


class CannotLimitError(TieredError):
    """No cgroup with a memory limit can be made; one reason per method in the message."""

    exit_code = CANNOT_LIMIT


@dataclass(frozen=True)
class Group:
    """The folder of a memory cgroup; which files are in it tells v1 from v2."""

    path: Path

    def set_limit(self, nbytes: int) -> None:
        """Bound memory and page cache to `nbytes`, and allow no swap; raises OSError."""
        if (self.path / "memory.max").exists():
            (self.path / "memory.max").write_text(str(nbytes))
            self._write_if_there("memory.swap.max", 0)
        else:
            (self.path / "memory.limit_in_bytes").write_text(str(nbytes))
            # Memory plus swap at the limit of memory alone leaves no swap. Without that file
            # (swapaccount=0), swappiness 0 is the nearest there is.
            if not self._write_if_there("memory.memsw.limit_in_bytes", nbytes):
                self._write_if_there("memory.swappiness", 0)

    def peak_bytes(self) -> int:
        """The most ever charged. For v2 groups Linux before 5.19 tells only what is charged now."""
        for name in ("memory.peak", "memory.max_usage_in_bytes", "memory.current"):
            if (self.path / name).exists():
                return int((self.path / name).read_text())
        return 0

    def limit_hits(self) -> int:
        """How often an allocation met the limit: cache was reclaimed then, or something was killed.

        The kernel's own count. Linux 6.18 was seen to count nothing in v1 groups, kills included.
        """
        # v1 charges memory plus swap first: with equal limits it is that counter which fails.
        v1 = (self.path / name for name in ("memory.failcnt", "memory.memsw.failcnt"))
        return self._count("memory.events", "max") + sum(int(f.read_text()) for f in v1 if f.exists())

    def oom_kills(self) -> int:
        return self._count("memory.events", "oom_kill") + self._count("memory.oom_control", "oom_kill")

    def remove(self) -> None:
        """Kill what is left in the group and in groups below it, then delete them."""
        deadline = time.monotonic() + SCOPE_SECONDS
        while self.path.exists():
            for folder in sorted(self.path.glob("**/"), reverse=True):
                # Processes and groups may vanish between looking and acting; the next round tells.
                with contextlib.suppress(OSError):
                    self._kill(folder)
                    folder.rmdir()
            if time.monotonic() > deadline:
                raise TieredError(f"{self.path}: cannot be removed, something still runs in it")
            if self.path.exists():
                time.sleep(POLL_SECONDS)

    @staticmethod
    def _kill(folder: Path) -> None:
        for pid in (folder / "cgroup.procs").read_text().split():
            if pid != "0":  # a process of another namespace: not ours
                os.kill(int(pid), signal.SIGKILL)

    def _write_if_there(self, name: str, value: int) -> bool:
        if not (self.path / name).exists():
            return False
        (self.path / name).write_text(str(value))
        return True

    def _count(self, name: str, key: str) -> int:
        if not (self.path / name).exists():
            return 0
        lines = (line.split() for line in (self.path / name).read_text().splitlines())
        return next((int(value) for found, value in lines if found == key), 0)


@dataclass(frozen=True)
class Limiter:
    """How to start a command under the limit: words to put before it, and the group it will be in."""

    method: str
    prefix: tuple[str, ...]
    group: Group | None = None
    scope: str | None = None  # the unit by which systemd's group is known once the command runs in it


@contextlib.contextmanager
def limiter(limit_bytes: int | None) -> Iterator[Limiter]:
    """The first method that works, its group removed afterwards; raises CannotLimitError.

    None as limit checks that a group can be made and joined.
    """
    refusals: list[str] = []
    name = f"tiered-limit-{os.getpid()}-{secrets.token_hex(3)}"
    for method, parents in (("cgroup v2", parents_v2), ("cgroup v1", parents_v1)):
        for parent in parents(refusals):
            group = Group(parent / name)
            try:
                prepare(group, limit_bytes)
            except (OSError, subprocess.CalledProcessError) as error:
                detail = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
                refusals.append(f"{method}: {detail}")
                group.remove()
                continue
            try:
                join = ("sh", "-c", JOIN, "sh", str(group.path / "cgroup.procs"))
                yield Limiter(f"{method} ({group.path})", join, group)
            finally:
                group.remove()
            return
    yield systemd_scope(f"{name}.scope", limit_bytes, refusals)


@contextlib.contextmanager
def throttled(rate: str | None, folder: Path | None) -> Iterator[tuple[str, ...]]:
    """Words before a command that make it read at most `rate` bytes per second, such as 400MB, from the disk of
    `folder`; none without a rate. Raises CannotLimitError."""
    if rate is None:
        yield ()
        return
    if folder is None:
        raise ConfigError("--read-rate: expected --disk-of FOLDER as well, whose disk is slowed down")
    nbytes, mount = parse_option("--read-rate", rate), mounted("cgroup", "blkio")
    if mount is None:
        raise CannotLimitError("--read-rate: no blkio controller of cgroup v1 is mounted; run without it")
    device = folder.stat().st_dev
    path = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    disk = (path.parent if (path / "partition").exists() else path) / "dev"
    group = Group(own_folder(mount, "blkio") / f"tiered-limit-{os.getpid()}-{secrets.token_hex(3)}")
    try:
        group.path.mkdir()
        (group.path / "blkio.throttle.read_bps_device").write_text(f"{disk.read_text().strip()} {nbytes}")
        yield ("sh", "-c", JOIN, "sh", str(group.path / "cgroup.procs"))
    except OSError as error:
        raise CannotLimitError(
            f"--read-rate: {error}; run as root on a machine with cgroup v1, or without it"
        ) from None
    finally:
        group.remove()


def prepare(group: Group, limit_bytes: int | None) -> None:
    """Make the group, prove that a process can join it, and set its limit."""
    group.path.mkdir()
    if not any((group.path / name).exists() for name in ("memory.max", "memory.limit_in_bytes")):
        raise OSError(f"{group.path}: has no memory controller")
    probe = ["sh", "-c", JOIN, "sh", str(group.path / "cgroup.procs"), "true"]
    subprocess.run(probe, check=True, capture_output=True, text=True)
    if limit_bytes is not None:
        group.set_limit(limit_bytes)


def parents_v2(refusals: list[str]) -> Iterator[Path]:
    """Folders of the v2 tree under which a group with a memory controller may be made, nearest first."""
    mount = mounted("cgroup2", "")
    if mount is None:
        refusals.append("cgroup v2: no such file system is mounted")
        return
    own = own_folder(mount, "")
    for folder in (own, *(above for above in own.parents if above.is_relative_to(mount.point))):
        offered = (folder / "cgroup.controllers").read_text().split()
        if "memory" not in offered:
            refusals.append(f"cgroup v2: {folder} offers no memory controller (it offers: {' '.join(offered)})")
            continue
        switch = folder / "cgroup.subtree_control"
        try:
            if "memory" not in switch.read_text().split():
                # Refused (EBUSY) where the folder itself holds processes, unless it is the real root.
                switch.write_text("+memory")
        except OSError as error:
            refusals.append(f"cgroup v2: {error}")
            continue
        yield folder


def parents_v1(refusals: list[str]) -> Iterator[Path]:
    """The folder of the v1 memory tree under which a group may be made: our own, or the root."""
    mount = mounted("cgroup", "memory")
    if mount is None:
        refusals.append("cgroup v1: no memory controller is mounted")
        return
    yield own_folder(mount, "memory")


def systemd_scope(unit: str, limit_bytes: int | None, refusals: list[str]) -> Limiter:
    """A transient scope; raises CannotLimitError with all `refusals` where systemd makes none."""
    words = ["systemd-run", "--scope", "--quiet", "--collect", *(["--user"] if os.geteuid() else [])]
    words += ["-p", "MemorySwapMax=0"]
    try:
        probe = [*words, "-p", "MemoryMax=64M", "--", "true"]
        subprocess.run(probe, check=True, capture_output=True, text=True, timeout=SCOPE_SECONDS)
    except FileNotFoundError:
        refusals.append("systemd-run: not installed")
    except subprocess.TimeoutExpired:
        refusals.append(f"systemd-run: no answer in {SCOPE_SECONDS:.0f} s")
    except subprocess.CalledProcessError as error:
        refusals.append(f"systemd-run: {' '.join(error.stderr.split())}")
    else:
        bound = ("-p", f"MemoryMax={limit_bytes}", f"--unit={unit}", "--", "sh", "-c", HOLD, "sh")
        return Limiter("systemd-run --scope", (*words, *bound), scope=unit)
    raise CannotLimitError("memory cannot be limited here:" + "".join(f"\n  {reason}" for reason in refusals))


@dataclass(frozen=True)
class Mount:
    point: Path
    root: str  # the cgroup that appears at `point`: not "/" in some containers


def mounted(kind: str, controller: str) -> Mount | None:
    """Where the cgroup file system `kind` (of v1: the one of `controller`) is mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        fields, (found, _, options) = before.split(), after.split(maxsplit=2)
        if found == kind and (not controller or controller in options.split(",")):
            return Mount(Path(fields[4]), fields[3])
    return None


def own_folder(mount: Mount, controller: str, pid: str = "self") -> Path:
    """The folder of a process's cgroup under `mount`; the mount point where it is not visible there."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            inside = path.removeprefix(mount.root) if mount.root != "/" else path
            folder = mount.point / inside.lstrip("/")
            return folder if folder.is_dir() else mount.point
    return mount.point


def group_of(pid: int, scope: str) -> Group | None:
    """The memory cgroup of `pid` once systemd has moved it into `scope`."""
    for mount, controller in ((mounted("cgroup", "memory"), "memory"), (mounted("cgroup2", ""), "")):
        with contextlib.suppress(FileNotFoundError):
            if mount is not None and (folder := own_folder(mount, controller, str(pid))).name == scope:
                return Group(folder)
    return None
