"""What this machine is: its processor, its memory settings, its control groups, as the kernel reports them.

In: the kernel's files (their roots can be replaced, for tests). Out: frozen facts. `tiered doctor` calls it.
"""

import ctypes
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CPU_FEATURES: Final = (
    "avx2",
    "f16c",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
)
"""Instruction sets that a linear layer can gain from, as /proc/cpuinfo spells them."""
ARM_FEATURES: Final = ("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2")
MEMORY_FILE_SYSTEMS: Final = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
"""Kinds of file systems whose files are memory themselves."""
_ARCH_REQ_XCOMP_PERM: Final = 0x1023
_XFEATURE_XTILEDATA: Final = 18
_SYS_ARCH_PRCTL: Final = 158
PROC: Final = Path("/proc")
SYS: Final = Path("/sys")


@dataclass(frozen=True)
class Cpu:
    """The processor."""

    model: str
    architecture: str
    allowed: int
    """Processors this process may run on."""
    present: int
    features: tuple[str, ...]
    """Of the features asked about, those that the processor has and the kernel has enabled."""
    missing: tuple[str, ...]
    """The other features asked about."""


def cpu(proc: Path = PROC) -> Cpu:
    """The processor of this machine; raises OSError if /proc/cpuinfo cannot be read."""
    text = (proc / "cpuinfo").read_text()
    architecture = platform.machine()
    asked = ARM_FEATURES if architecture in ("aarch64", "arm64") else CPU_FEATURES
    flags = set(_field(text, "flags|Features").split())
    return Cpu(
        model=_field(text, "model name|Hardware|CPU part") or "unknown",
        architecture=architecture,
        allowed=len(os.sched_getaffinity(0)),
        present=os.cpu_count() or 1,
        features=tuple(name for name in asked if name in flags),
        missing=tuple(name for name in asked if name not in flags),
    )


def amx_refusal() -> str | None:
    """Why the kernel does not let this process use AMX tiles; None where it does.

    The tile registers are large, so Linux (since 5.16) gives them only to processes that ask.
    """
    if platform.machine() != "x86_64":
        return "this is no x86-64 processor"
    libc = ctypes.CDLL(None, use_errno=True)
    request = ctypes.c_long(_ARCH_REQ_XCOMP_PERM)
    if libc.syscall(ctypes.c_long(_SYS_ARCH_PRCTL), request, ctypes.c_long(_XFEATURE_XTILEDATA)) == 0:
        return None
    return f"the kernel refuses tile registers: {os.strerror(ctypes.get_errno())}"


def meminfo(key: str, proc: Path = PROC) -> int:
    """Bytes of one line of /proc/meminfo; raises KeyError where there is none."""
    found = _field((proc / "meminfo").read_text(), re.escape(key))
    if not found:
        raise KeyError(f"{proc / 'meminfo'} has no {key}")
    return int(found.split()[0]) * 1024


def busy_seconds(proc: Path = PROC) -> float:
    """Processor seconds since the start of the machine that any program has taken, or that its host has taken away."""
    fields = (proc / "stat").read_text().split("\n", 1)[0].split()
    user, nice, system, _idle, _waiting, irq, soft_irq, steal = (int(word) for word in fields[1:9])
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")


def chosen(path: Path) -> str:
    """The choice in brackets of a kernel setting such as "always [madvise] never"."""
    text = path.read_text().strip()
    found = re.search(r"\[(.+?)\]", text)
    return found.group(1) if found else text


def huge_pages(sys: Path = SYS) -> str:
    """When the kernel gives anonymous memory huge pages: always, madvise (where asked) or never."""
    return chosen(sys / "kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class CgroupSupport:
    """One way to limit a run's memory, and why it cannot be used here; None if it can."""

    method: str
    refusal: str | None


def cgroup_version(sys: Path = SYS) -> str:
    """Which hierarchy accounts memory here: "v2", "v1", or "none"."""
    mount = sys / "fs/cgroup"
    if (mount / "cgroup.controllers").is_file():
        return "v2"
    return "v1" if (mount / "memory").is_dir() else "none"


def cgroup_support(sys: Path = SYS, run: Path = Path("/run")) -> tuple[CgroupSupport, ...]:
    """For each method, whether a group with a memory limit could be made; none is made."""
    mount = sys / "fs/cgroup"
    return (
        CgroupSupport("cgroup v2", _v2_refusal(mount)),
        CgroupSupport("cgroup v1", _v1_refusal(mount)),
        CgroupSupport("systemd-run", _systemd_refusal(run)),
    )


def _v2_refusal(mount: Path) -> str | None:
    if not (mount / "cgroup.controllers").is_file():
        return f"{mount} is not a v2 hierarchy"
    if "memory" not in (mount / "cgroup.controllers").read_text().split():
        return f"{mount}/cgroup.controllers does not list memory"
    if not os.access(mount / "cgroup.subtree_control", os.W_OK):
        return f"{mount} is not writable"
    return None


def _v1_refusal(mount: Path) -> str | None:
    if not (mount / "memory").is_dir():
        return f"{mount}/memory does not exist"
    return None if os.access(mount / "memory", os.W_OK) else f"{mount}/memory is not writable"


def _systemd_refusal(run: Path) -> str | None:
    if not (run / "systemd/system").is_dir():
        return "systemd is not running"
    paths = os.environ.get("PATH", "").split(os.pathsep)
    return None if any((Path(p) / "systemd-run").is_file() for p in paths) else "no systemd-run in PATH"


def _field(text: str, keys: str) -> str:
    """The value of the first "key : value" line whose key is one of `keys` (a regular expression); else ""."""
    found = re.search(rf"^(?:{keys})[ \t]*:[ \t]*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""
