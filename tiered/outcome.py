"""What the main thread waits for, where an interrupt may end the waiting: what another thread brings, and threads that
must have ended before memory and files are taken back.

In: functions that run in other threads. Out: their end, or what they bring. It imports nothing that takes long.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar, cast

from tiered.process import interrupts_later

T = TypeVar("T")
_POLL_SECONDS: Final = 0.1
"""Seconds between two looks for a signal, while a caller waits."""


class Outcome(Generic[T]):
    """What one thread brings another, which may be interrupted while it waits: a result or an error, once.

    `Future`, `Event` and `Condition` are functions of Python around a lock. A KeyboardInterrupt may come between the
    lock's taking and the statement that gives it back, and then whoever brings something waits for ever. Here nothing
    is taken that must be given back.
    """

    def __init__(self) -> None:
        self._closed = threading.Lock()
        self._closed.acquire()
        self._result: T | None = None
        self.error: BaseException | None = None
        self.is_there = False
        """Whether it has been brought."""

    def bring(self, result: T) -> None:
        """The result is there."""
        self._result, self.is_there = result, True
        self._closed.release()

    def fail(self, error: BaseException) -> None:
        """There will be none, because of `error`."""
        self.error, self.is_there = error, True
        self._closed.release()

    def wait(self, seconds: float = _POLL_SECONDS) -> bool:
        """Wait until it is there, but no longer than `seconds`; returns whether it is."""
        if not self.is_there and self._closed.acquire(timeout=seconds):
            self._closed.release()
        return self.is_there

    def result(self) -> T:
        """Wait for the result, or raise the error."""
        while not self.wait():
            pass
        try:
            if self.error is not None:
                raise self.error
            return cast(T, self._result)
        finally:
            # An error holds this frame, and this object the error: a cycle that only the garbage collector would free.
            del self


def run_threads(
    works: Sequence[Callable[[], None]],
    stop: threading.Event,
    name: str | None = None,
    on_wait: Callable[[], None] | None = None,
) -> None:
    """Run each of `works`, which raise nothing, in a thread of its own called `name`. When this returns or raises, none
    runs any more: `stop`, at which those that go on are to end, is set before the last wait. `on_wait` is called again
    and again meanwhile."""
    ended = [Outcome[None]() for _ in works]

    def run(work: Callable[[], None], end: Outcome[None]) -> None:
        try:
            work()
        finally:
            end.bring(None)

    threads = [threading.Thread(target=run, args=each, name=name) for each in zip(works, ended, strict=True)]
    try:
        # One whose start is interrupted may run and not be known to have begun.
        with interrupts_later():
            for thread in threads:
                thread.start()
        for end in ended:
            while not end.wait():
                if on_wait is not None:
                    on_wait()
    finally:
        # An interruption ends the wait, not what the threads do.
        with interrupts_later():
            stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
