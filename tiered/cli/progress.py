"""What the status line says while a command works: one class per kind of work."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TextIO

from tiered.cli.screen import StatusLine
from tiered.units import format_rate, format_seconds, format_size

if TYPE_CHECKING:
    from tiered.jobs import Progress  # which loads torch

_LEAST_SECONDS: Final = 0.5
"""A speed over less time than this says nothing."""


class PassProgress:
    """Says where a run is: which pass, how many of its blocks are computed, the disk's speed, time left in it."""

    def __init__(self, status: StatusLine, bytes_read: Callable[[], int]) -> None:
        self._status, self._bytes_read = status, bytes_read
        self._number = self._done = self._total = 0
        self._started = time.perf_counter()
        self._begin()

    def on_block(self, done: int, total: int) -> None:
        """A block of the running pass has been computed."""
        if done <= self._done:  # of the next pass
            self._begin()
        self._done, self._total = done, total
        self._status.update(lambda: self._line(done, total))

    def so_far(self) -> str:
        """Where it is, and what it took, for whoever ends it early."""
        elapsed, nbytes = format_seconds(time.perf_counter() - self._started), format_size(self._bytes_read())
        blocks = f"after {self._done} of {self._total} blocks" if self._total else "before its first block"
        return f"pass {self._number}, {blocks}: {elapsed}, {nbytes} read"

    def _begin(self) -> None:
        self._number += 1
        self._began, self._bytes_before = time.perf_counter(), self._bytes_read()

    def _line(self, done: int, total: int) -> str:
        elapsed = time.perf_counter() - self._began
        rate = (self._bytes_read() - self._bytes_before) / elapsed if elapsed else 0.0
        left = elapsed / done * (total - done)
        return f"pass {self._number}  block {done}/{total}  {format_rate(rate)}  {format_seconds(left)} left in it"


class ScoreProgress:
    """Says where a scoring is: which pass of about so many, which block, time left, the perplexity so far."""

    def __init__(self, status: StatusLine, passes: int, perplexity: Callable[[], float | None]) -> None:
        """`perplexity` returns None while nothing has been scored."""
        self._status, self._passes, self._perplexity = status, passes, perplexity
        self._done = 0
        self._began = time.perf_counter()

    def on_block(self, done: int, total: int) -> None:
        """A block of the running pass has been computed; the last one ends the pass."""
        number = self._done + 1
        if done == total:
            self._done = number
        self._status.update(lambda: self._line(number, done, total))

    def _line(self, number: int, done: int, total: int) -> str:
        passes = max(self._passes, number)
        share = (number - 1 + done / total) / passes
        left = format_seconds((time.perf_counter() - self._began) * (1 / share - 1))
        perplexity = self._perplexity()
        found = "" if perplexity is None else f"  perplexity so far {perplexity:.4g}"
        return f"pass {number}/{passes}  block {done}/{total}  {left} left{found}"


class ByteProgress:
    """How far a known number of bytes is, with speed and time left, counted from the first call on."""

    def __init__(self) -> None:
        self._began: float | None = None

    def line(self, done: int, total: int, skipped: int = 0) -> str:
        """`skipped` of the bytes that are done do not count for the speed."""
        now = time.perf_counter()
        if self._began is None:
            self._began = now
        seconds, achieved = now - self._began, done - skipped
        text = f"{format_size(done)} of {format_size(total)}"
        if seconds < _LEAST_SECONDS or achieved <= 0:
            return text
        left = seconds / achieved * (total - done)
        return f"{text}  {format_rate(achieved / seconds)}  {format_seconds(left)} left"


class JobScreen:
    """Shows how far a job is. A context manager; leaving it takes the status line away."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stderr if stream is None else stream
        self.status = StatusLine(stream=self._stream, clock=clock)
        self._line = ""

    def __enter__(self) -> Self:
        self.status.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.status.__exit__(kind, error, tb)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.status.clear()
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def on_scan(self, what: str, done: int, total: int) -> None:
        """`done` of `total` bytes of the input have been read; `what` says what for."""
        self.status.update(lambda: f"{what} {done / total:.0%}")

    def on_progress(self, progress: "Progress") -> None:
        """A pass has ended."""
        self._line = progress.line()
        self.status.update(lambda: self._line)

    def on_block(self, done: int, total: int) -> None:
        """A block of the running pass has been computed."""
        self.status.update(lambda: f"{self._line}  block {done}/{total}".lstrip())
