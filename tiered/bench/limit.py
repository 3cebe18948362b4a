"""Runs a command inside a memory cgroup, where exceeding the limit kills it, and tells what it used.

In: a command and a limit in bytes. Out: a `Report` that keeps apart what one process held and what its whole group was
charged for, page cache included. Called by `tiered bench` for each of its runs, and by tools/limit.py.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tiered.bench.cgroup import PLAIN, POLL_SECONDS, CannotLimitError, Limiter, group_of, limiter
from tiered.units import format_seconds, format_size

HELD: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD})


@dataclass(frozen=True)
class Report:
    """What one run used. `limited` False: the other cgroup figures are absent, not zero."""

    command: list[str]
    method: str
    limited: bool
    limit_bytes: int | None  # None: no limit was asked for
    exit_code: int
    interrupted: bool  # a signal to end came meanwhile
    seconds: float
    vm_hwm_bytes: int  # the main process, polled: a peak in its last 20 ms may be missing
    max_rss_bytes: int  # from wait4: the largest of it, of children it waited for, and of us who spawned it
    cgroup_peak_bytes: int | None
    limit_hits: int | None
    oom_kills: int | None

    def lines(self) -> Iterator[str]:
        """The report as people read it."""
        under = f"{format_size(self.limit_bytes or 0)} by {self.method}" if self.limited else "NOT limited"
        yield f"{under}; exit status {self.exit_code} after {format_seconds(self.seconds)}"
        rss = format_size(self.max_rss_bytes)
        yield f"main process: peak {format_size(self.vm_hwm_bytes)} (VmHWM), {rss} (ru_maxrss)"
        if self.cgroup_peak_bytes is not None:
            peak = format_size(self.cgroup_peak_bytes)
            yield f"whole group with page cache: peak {peak}, failure count {self.limit_hits}"
        if self.oom_kills:
            what = "the command" if self.exit_code == 128 + signal.SIGKILL else "a process it had started"
            yield f"OUT OF MEMORY: the kernel killed {what} for exceeding {format_size(self.limit_bytes or 0)}"


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """While it lasts, signals that would end this program wait for `run`, which passes them on to its command: so none
    can leave a group behind."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run(
    command: Sequence[str],
    limit_bytes: int | None,
    *,
    or_unlimited: bool = False,
    say: Callable[[str], None] = lambda text: None,
    stdout: Path | None = None,
) -> Report:
    """Run `command` bounded to `limit_bytes` (None: as it is) and wait for it; raises CannotLimitError, unless
    `or_unlimited`: then `say` is told. What the command prints goes into the file `stdout` where that is given."""
    unlimited = Limiter("none", ("sh", "-c", PLAIN, "sh"))
    with contextlib.ExitStack() as stack:
        found = unlimited
        try:
            if limit_bytes is not None:
                found = stack.enter_context(limiter(limit_bytes))
        except CannotLimitError as error:
            if not or_unlimited:
                raise
            say(f"{error}\nNOT limited: running the command all the same, as --or-unlimited asks")
        return _watch(command, found, limit_bytes, stdout)


def _watch(command: Sequence[str], limiter: Limiter, limit_bytes: int | None, stdout: Path | None) -> Report:
    """Start `command`, pass signals on to it, poll its memory, and take the group's figures at the end."""
    start = time.monotonic()
    group, interrupted = limiter.group, False
    hwm = peak = 0
    pid = _spawn([*limiter.prefix, *command], stdout)
    while True:
        caught = signal.sigtimedwait(HELD, POLL_SECONDS)
        if caught is not None and caught.si_signo != signal.SIGCHLD:
            interrupted = True
            # What the kernel sent (code above 0), such as a terminal's Ctrl-C, has reached the child already.
            if caught.si_code <= 0:
                os.kill(pid, caught.si_signo)
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if group is None and limiter.scope is not None:
            group = group_of(pid, limiter.scope)
        if group is not None:
            peak = max(peak, group.peak_bytes())
        if ended:
            break
        hwm = max(hwm, vm_hwm_bytes(pid))
    seconds = time.monotonic() - start
    code = os.waitstatus_to_exitcode(status)
    report = Report(
        command=list(command),
        method=limiter.method,
        limited=limiter.method != "none",
        limit_bytes=limit_bytes,
        exit_code=code if code >= 0 else 128 - code,
        interrupted=interrupted,
        seconds=seconds,
        vm_hwm_bytes=hwm,
        max_rss_bytes=usage.ru_maxrss * 1024,
        cgroup_peak_bytes=peak if group else None,
        limit_hits=group.limit_hits() if group else None,
        oom_kills=group.oom_kills() if group else None,
    )
    if limiter.scope is not None and group is not None:
        group.remove()
    return report


def _spawn(words: list[str], stdout: Path | None) -> int:
    """The process of `words`, found by PATH."""
    actions: list[tuple[int, int, str, int, int]] = []
    if stdout is not None:
        actions.append((os.POSIX_SPAWN_OPEN, 1, str(stdout), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    # posix_spawn, as it can hand the child an empty signal mask while ours keeps them blocked.
    return os.posix_spawnp(words[0], words, os.environ, file_actions=actions, setsigmask=[])


def vm_hwm_bytes(pid: int) -> int:
    """Peak resident memory of `pid` so far; 0 when it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
