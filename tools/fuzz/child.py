"""One command in a forked child, within limits; how it ended is judged by rules that hold for every input.

The parent has imported everything and started no thread, so that a case does not cost the time that Python and torch
take to start.
"""

import contextlib
import faulthandler
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tiered.process import catch_interrupts, quiet_libraries

EXIT_CODES: Final = (0, 1, 2, 3, 4, 130)
ADDRESS_NBYTES: Final = 6 << 30
"""Of address space: a huge allocation fails in the child and does not take the machine down."""
FILE_NBYTES: Final = 256 << 20
_LAST_WORDS_SECONDS: Final = 10.0
"""For a child that takes too long to tell where it was, at most."""
_LONGEST_MESSAGE: Final = 8000
_NEVER: Final = ("Traceback", "internal error", "Exception ignored", "Warning:", "panicked at", "Segmentation fault")
"""What no run may write to standard error."""


@dataclass(frozen=True)
class Limits:
    """What a case may take."""

    seconds: float = 60
    rss_nbytes: int = 1300 << 20
    """Peak, of which some 400 MiB are what this process has imported."""


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int
    """The exit code, or minus the number of the signal that ended it."""
    seconds: float
    rss_nbytes: int
    out: str
    err: str
    timed_out: bool


@dataclass
class Child:
    """A running child, and what is needed to see it to its end."""

    pid: int
    folder: Path
    began: float
    signals: list[float]
    """Seconds after its beginning at which it gets a SIGINT."""

    def poll(self, limits: Limits) -> Ended | None:
        """How it ended, once it has; kills it where it takes too long."""
        now = time.monotonic() - self.began
        while self.signals and self.signals[0] <= now:
            self.signals.pop(0)
            os.kill(self.pid, signal.SIGINT)
        timed_out = now > limits.seconds
        if timed_out:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGABRT)  # faulthandler then tells where it was
                self._await_end(_LAST_WORDS_SECONDS)
                os.killpg(self.pid, signal.SIGKILL)
        pid, status, usage = os.wait4(self.pid, 0 if timed_out else os.WNOHANG)
        if not pid:
            return None
        out, err = ((self.folder / name).read_bytes().decode("utf-8", "replace") for name in ("out", "err"))
        return Ended(os.waitstatus_to_exitcode(status), now, usage.ru_maxrss << 10, out, err, timed_out)

    def _await_end(self, seconds: float) -> None:
        """Wait until it has ended, which is told later, but no longer than `seconds`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.01)


def start(call: Callable[[], object], folder: Path, stdin: bytes, signals: Sequence[float] = ()) -> Child:
    """Fork a child that does `call` in `folder`, with files there as its standard streams."""
    (folder / "in").write_bytes(stdin)
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    # An interrupt waits until the command has said what it does.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    pid = os.fork()
    if pid == 0:
        os._exit(_run(call, folder))
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return Child(pid, folder, began, sorted(signals))


def _run(call: Callable[[], object], folder: Path) -> int:
    """In the child: do `call`, and what an interpreter does at its end; returns the exit code."""
    os.setsid()
    for fd, (name, flags) in enumerate(
        (("in", os.O_RDONLY), ("out", os.O_WRONLY | os.O_CREAT), ("err", os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    ):
        opened = os.open(folder / name, flags, 0o600)
        os.dup2(opened, fd)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    faulthandler.enable(sys.stderr)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_NBYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_NBYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(folder)
    code = 0
    try:
        # A background job of a shell ignores interrupts; here they are part of the case.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        catch_interrupts()
        quiet_libraries()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        call()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 99
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 98
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        threading._shutdown()  # type: ignore[attr-defined]
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 97
    return code


def faults(ended: Ended, limits: Limits, names: Sequence[str]) -> Iterator[str]:
    """What is wrong with how a command ended, whatever it was given.

    With exit code 4 the error must contain one of `names`, where there are any.
    """
    if ended.timed_out:
        yield f"still running after {limits.seconds:.0f} s"
        return
    if ended.code not in EXIT_CODES:
        yield f"ended by signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code} is not of the table"
    yield from (f"wrote {word!r}" for word in _NEVER if word in ended.err)
    if ended.rss_nbytes > limits.rss_nbytes:
        yield f"took {ended.rss_nbytes >> 20} MiB"
    lines = ended.err.splitlines()
    errors = [line for line in lines if line.startswith(("tiered: ", "Error: "))]
    asked_nothing = not errors and lines and lines[0].startswith("Usage: ")
    if ended.code in EXIT_CODES[1:5] and not asked_nothing:
        if len(errors) != 1 or lines[-1] != errors[0]:
            yield f"expected one line of error at the end, found {len(errors)}"
        elif len(errors[0]) > _LONGEST_MESSAGE:
            yield f"an error of {len(errors[0])} characters"
        elif ended.code == 4 and names and not any(f"{name}{end}" in errors[0] for name in names for end in ":/,"):
            yield f"the error names neither of {', '.join(names)}"
