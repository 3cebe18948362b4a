"""The process around a command: standard streams that are open and take any text, interrupts, imports, a quiet end.

`tiered.__main__` and `tiered.cli.main` call it. It imports nothing that takes long, because it must act at once.
"""

import atexit
import contextlib
import gc
import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn, TextIO

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

_INTERRUPTED: Final = 130
_PATIENCE_SECONDS: Final = 2.0
"""Seconds that a command has for cleaning up before another interrupt ends it at once."""
_AGAIN_SECONDS: Final = 0.01
"""Seconds after which an interrupt that was lost, or came at a wrong moment, comes again."""
_WHOLE: Final = frozenset(
    {
        *(("threading", "Condition.__enter__"), ("threading", "Condition.__exit__"), ("threading", "Thread.start")),
        ("concurrent.futures.thread", "ThreadPoolExecutor.submit"),
    }
)
"""Functions of Python that an exception must not end halfway: the lock that one has just taken would stay locked for
ever, also for the thread that is to end, and a thread or a task would run of which nobody knows."""


def restart_in_utf8() -> None:
    """Where the locale knows nothing but ASCII (LC_ALL=C with UTF-8 mode switched off), start anew in UTF-8 mode.

    Arguments, names of files and standard streams were decoded when the interpreter started. The process stays the
    same, and has read nothing yet. A locale with any other encoding is kept.
    """
    if sys.getfilesystemencoding() == "ascii" and sys.executable:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def quiet_libraries() -> None:
    """Hide Python's warnings, which are meant for programmers, unless -W or PYTHONWARNINGS asks for them."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@contextlib.contextmanager
def importing(is_command: bool) -> Iterator[None]:
    """Around imports that take seconds: garbage is not collected. Next to nothing of what they make is garbage, and
    looking for it takes a fifth of their time (docs/benchmarks/streaming.md). If the process `is_command`'s own, later
    collections leave alone what is there when the context ends.
    """
    if not gc.isenabled() or "transformers" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
        if is_command:
            gc.freeze()
    finally:
        gc.enable()


def open_streams() -> None:
    """Give closed standard streams (`tiered ... <&- >&-`) to /dev/null, and make the others take any text.

    A file that is opened later would get a closed stream's number, and whatever is printed would go into it.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.name == "<stdout>":  # tests put other objects there
        sys.stdout = _named_output(sys.stdout)


def _named_output(plain: io.TextIOWrapper) -> io.TextIOWrapper:
    """`plain`, standard output, as a stream that takes any text, and whose errors name standard output."""
    return io.TextIOWrapper(
        io.BufferedWriter(_StandardOutput(1, "w", closefd=False)),
        plain.encoding,
        "backslashreplace",  # an escape is shown for what an encoding lacks; standard error does so anyway
        line_buffering=plain.line_buffering or plain.write_through,
    )


class _StandardOutput(io.FileIO):
    """Standard output whose first error names it, as errors of files do; what is written after the error is lost."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = "standard output"
            _discard(self)
            raise


def end_streams(status: int) -> int:
    """Flush the standard streams. Returns the status to end with: `status`, or 1 if that is 0 and flushing fails.

    What cannot be written is discarded: the interpreter would try once more at its end, and complain.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            _discard(stream)
            status = status or 1
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                sys.stderr.write(f"tiered: standard output: {getattr(error, 'strerror', error)}\n")
    return status


def _discard(stream: TextIO | io.FileIO) -> None:
    """Let what `stream` still holds be written to /dev/null."""
    try:
        fd = stream.fileno()
    except (OSError, ValueError):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, fd)
    os.close(nowhere)


class Interrupts:
    """What SIGINT does to a command: the first one raises KeyboardInterrupt, and later ones do not.

    Those that follow closely are ignored: raised while the command cleans up, they would leave that half done. One
    that comes later says that cleaning up takes too long: it ends the process at once, which is as safe as a kill.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._status: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal's handler."""
        now, begun = time.monotonic(), self._first
        if begun is not None:
            if now - begun > _PATIENCE_SECONDS:
                self.end_now()
            return
        # One that comes again, by an alarm, waits like the others.
        if isinstance(held := signal.getsignal(signal.SIGINT), Held):
            held(number, frame)
            return
        # What an exception does to an import cannot be known, and there is nothing to clean up yet.
        if _is_in(frame, _is_of_the_importer):
            end_at_once()
        if _is_in(frame, _is_whole):
            self._come_again()
            return
        self._first = now
        raise KeyboardInterrupt

    def handle_unraisable(self, lost: "sys.UnraisableHookArgs") -> None:
        """Called for an exception that is lost, in a destructor or a callback: a KeyboardInterrupt comes again."""
        if lost.exc_type is not KeyboardInterrupt:
            sys.__unraisablehook__(lost)
            return
        if self._status is None:
            self._first = None
            self._come_again()

    def end(self, status: int) -> None:
        """The command has ended, and `status` is its exit code: interrupts do not change it any more. One that comes
        when ending takes too long, because a thread does not end, ends the process with it."""
        self._first, self._status = time.monotonic(), status
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _come_again(self) -> None:
        # A timer of the system's: a thread that sends the signal would have to be started here.
        signal.signal(signal.SIGALRM, self.handle)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)

    @property
    def has_come(self) -> bool:
        """Whether the one that counts has come: none raises anything any more."""
        return self._first is not None

    def end_now(self) -> None:
        """End the process without more cleaning up."""
        if self._status is None:
            end_at_once()
        os._exit(self._status)


def end_at_once() -> NoReturn:
    """End an interrupted process without cleaning up."""
    os.write(2, b"tiered: interrupted\n")
    os._exit(_INTERRUPTED)


def catch_interrupts() -> None:
    """Have `Interrupts` handle SIGINT, unless it is ignored, as by a shell's background jobs."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        interrupts = Interrupts()
        signal.signal(signal.SIGINT, interrupts.handle)
        sys.unraisablehook = interrupts.handle_unraisable
        # The last thing that the interpreter does before it takes handlers back, after which a signal would kill.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def no_more_interrupts(status: int) -> None:
    """Where `catch_interrupts` handles SIGINT: the command has ended, and `status` is its exit code."""
    if (interrupts := _interrupts_of(signal.getsignal(signal.SIGINT))) is not None:
        interrupts.end(status)


def _interrupts_of(handler: object) -> Interrupts | None:
    """Whose method `handler` is."""
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, Interrupts) else None


class Held:
    """What SIGINT does while interrupts are held back: it is noted. In a command, one that comes long after another
    one ends the process at once, as ever."""

    def __init__(self, before: Any) -> None:
        """`before`: the handler that they are held back from."""
        self._before, self._interrupts, self._since = before, _interrupts_of(before), 0.0
        self.has_come = False

    @contextlib.contextmanager
    def let_come(self) -> Iterator[None]:
        """Inside, interrupts come as ever, those first that have been held back: for a step that takes long, and owns
        nothing that would have to be given back. Nothing changes where another context holds them back, too."""
        handler: object = signal.getsignal(signal.SIGINT)
        if handler is not self:
            yield
            return
        try:
            signal.signal(signal.SIGINT, self._before)
            self.end()
            yield
        finally:
            signal.signal(signal.SIGINT, self)

    def end(self) -> None:
        """Have those come that have been held back; where they go is the handler's affair that is there now."""
        has_come, self.has_come, self._since = self.has_come, False, 0.0
        if has_come:
            signal.raise_signal(signal.SIGINT)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._interrupts is not None and self._interrupts.has_come:
            self._interrupts.handle(number, frame)
            return
        now = time.monotonic()
        if self._interrupts is not None and self._since and now - self._since > _PATIENCE_SECONDS:
            self._interrupts.end_now()
        self.has_come, self._since = True, self._since or now


@contextlib.contextmanager
def interrupts_later() -> Iterator[Held]:
    """Hold interrupts back until the context ends, for steps of the main thread that must happen together; above all
    for `Thread.join`, which an exception ends for good: Python then takes the thread for one that has ended.

    Contexts may lie in each other: the outermost counts.
    """
    before = signal.getsignal(signal.SIGINT)
    held = Held(before)
    if threading.current_thread() is not threading.main_thread() or before is None or isinstance(before, Held):
        yield held
        return
    try:
        signal.signal(signal.SIGINT, held)
        yield held
    finally:
        signal.signal(signal.SIGINT, before)
        held.end()


@contextlib.contextmanager
def interrupts_now() -> Iterator[None]:
    """As `Held.let_come`, of whatever holds interrupts back now; nothing in threads that none come to."""
    held = signal.getsignal(signal.SIGINT)
    if isinstance(held, Held) and threading.current_thread() is threading.main_thread():
        with held.let_come():
            yield
    else:
        yield


def shut_down(pool: "ThreadPoolExecutor", cancel_futures: bool = False) -> None:
    """End a pool's threads and wait for them, whatever interrupts come meanwhile; they come after it."""
    with interrupts_later():
        pool.shutdown(cancel_futures=cancel_futures)


def _is_in(frame: FrameType | None, is_meant: Callable[[FrameType], bool]) -> bool:
    """Whether `frame`, or one that has called it, is meant."""
    while frame is not None and not is_meant(frame):
        frame = frame.f_back
    return frame is not None


def _is_of_the_importer(frame: FrameType) -> bool:
    return frame.f_code.co_filename == "<frozen importlib._bootstrap>"


def _is_whole(frame: FrameType) -> bool:
    return (frame.f_globals.get("__name__"), frame.f_code.co_qualname) in _WHOLE
