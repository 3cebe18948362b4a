"""What the kernel tells of memory in /proc: this process's resident size, and the fields of files such as meminfo."""

import contextlib
from pathlib import Path


def process_rss_bytes() -> int:
    """VmRSS of this process: what it has in memory now."""
    return keyed_kib(Path("/proc/self/status"), "VmRSS") * 1024


def process_peak_rss_bytes() -> int:
    """VmHWM of this process: its largest resident size so far, as the kernel saw it."""
    try:
        return keyed_kib(Path("/proc/self/status"), "VmHWM") * 1024
    except KeyError:  # sandboxes that stand in for the kernel may not keep it
        return process_rss_bytes()


def reset_peak_rss() -> None:
    """Make the peak that `process_peak_rss_bytes` tells begin anew at what is resident now, where the kernel can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def keyed_kib(path: Path, key: str) -> int:
    """The number, in KiB, in the line of `path` that begins with `key` and a colon; raises KeyError where none does."""
    for line in path.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise KeyError(f"{path} has no {key}")
