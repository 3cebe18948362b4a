"""Processes that are forked from one that has imported everything: they spare the seconds that imports take.

For tests of what a command does once it runs: streams, exit code, signals. Where the start itself or memory is what is
tested, `run_apart` and `subprocess` start with nothing: of what a forked process has inherited, a page counts as its
own only once it is touched, so it measures, and names, other budgets.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, get_context, resource_tracker
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.commands import ROOT, Done
from tests.shared import FOLDER_VARIABLE

_CONTEXT: Final = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preload"])


class WarmProcess:
    """`call`, a function of a module, with `arguments`, in a forked process; as much of `Popen` as tests need.

    What it returns, or exits with, is the exit code. `streams` are the paths of standard input, output and
    error; a terminal there becomes the one that controls the process. The environment is the caller's and `variables`,
    the working directory `folder`.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        arguments: Sequence[Any],
        streams: Sequence[str | Path],
        folder: Path | None = None,
        **variables: str,
    ) -> None:
        settings = (tuple(map(str, streams)), str(folder or Path.cwd()), {**os.environ, **variables})
        self._process = _CONTEXT.Process(target=_run, args=(call, tuple(arguments), *settings))
        with contextlib.chdir(ROOT):  # where the server, which the first of them starts, finds tests/
            _share_server()
            self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Its exit code, or a signal's number, negative; None while it runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float = 100) -> int:
        """Wait for its end; returns what `poll` does."""
        self._process.join(timeout)
        code = self.poll()
        assert code is not None, f"still running after {timeout} seconds"
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.send_signal(signal.SIGKILL)
        self._process.join()


def start_warm(*words: str | Path, out: Path, err: Path, folder: Path | None = None) -> WarmProcess:
    """Start `tiered` `words`, with nothing on standard input."""
    return WarmProcess(tiered, list(map(str, words)), (os.devnull, out, err), folder)


def run_warm(folder: Path, *words: str | Path, seconds: float = 100) -> Done:
    """Run `tiered` `words`; what it writes lies in `folder` meanwhile."""
    return call_warm(folder, tiered, *map(str, words), seconds=seconds)


def call_warm(folder: Path, call: Callable[..., Any], *arguments: Any, seconds: float = 100) -> Done:
    """Run `call`; what it writes lies in `folder` meanwhile."""
    out, err = folder / "stdout", folder / "stderr"
    with WarmProcess(call, arguments, (os.devnull, out, err)) as process:
        code = process.wait(seconds)
    found = Done(code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))
    out.unlink()
    err.unlink()
    return found


def tiered(*words: str) -> None:
    """The command, as its process does it."""
    from tiered.__main__ import run

    sys.argv = ["tiered", *words]
    run()


def _share_server() -> None:
    """Fork from the server that another of the run's workers has started: its imports take four seconds of a processor.

    It lives until nobody has the writing end of its pipe, which can be opened where that worker has it.
    """
    server: Any = forkserver._forkserver
    if server._forkserver_address is not None:
        return
    with Path(os.environ[FOLDER_VARIABLE], "forkserver.json").open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        pipe, inode, address = json.loads(file.read() or '["", 0, null]')
        try:
            server._forkserver_alive_fd = _opened_pipe(pipe, inode)
        except OSError:  # none has, or it has ended, or what has its number now is another's
            server.ensure_running()
            file.truncate(0)
            pipe = f"/proc/{os.getpid()}/fd/{server._forkserver_alive_fd}"
            inode = os.fstat(server._forkserver_alive_fd).st_ino
            json.dump((pipe, inode, server._forkserver_address), file)
        else:
            server._forkserver_address = address
            server.ensure_running = resource_tracker.ensure_running  # its own would wait for its own child


def _opened_pipe(path: str, inode: int) -> int:
    """The writing end of the pipe `inode`, which is at `path`. Raises OSError where that is another file, or where
    nobody reads from it."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # of a named pipe it would wait for a reader
    looking = select.poll()
    looking.register(fd, 0)  # which tells of errors alone, as where the reading end is closed
    if os.fstat(fd).st_ino != inode or looking.poll(0):
        os.close(fd)
        raise FileNotFoundError(path)
    return fd


def _run(
    call: Callable[..., Any], arguments: Sequence[Any], streams: Sequence[str], folder: str, environment: dict[str, str]
) -> None:
    """In the forked process: what an interpreter finds at its start, then `call`."""
    os.setsid()
    modes = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT)
    for fd, (path, mode) in enumerate(zip(streams, modes, strict=True)):
        opened = os.open(path, mode, 0o600)
        if opened != fd:
            os.dup2(opened, fd)
            os.close(opened)
    sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # of another environment
    os.chdir(folder)
    # A background job of a shell ignores it; here it is meant.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(call(*arguments))
