"""What a person sees while a job runs: a status line on a terminal, a plain line now and then anywhere else."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, TextIO

from tiered.cli.screen import StatusLine, is_terminal
from tiered.jobs import Progress

_REFRESH_SECONDS: Final = 0.1
_LINE_SECONDS: Final = 30.0
"""Between two plain lines."""


class JobScreen:
    """Shows how far a job is, on standard error. A context manager; leaving it takes the status line away."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._is_terminal = is_terminal(self._stream)
        self.status = StatusLine(int, stream=self._stream)
        self._line = ""
        self._shown = clock() - _REFRESH_SECONDS
        self._written = clock()

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
        """So many of all the bytes of the input have been read."""
        self._say(f"{what} {done / total:.0%}")

    def on_progress(self, progress: Progress) -> None:
        """A pass has ended."""
        self._line = progress.line()
        self._say(self._line)
        if not self._is_terminal and self._clock() - self._written >= _LINE_SECONDS:
            self._written = self._clock()
            self._stream.write(f"{self._line}\n")
            self._stream.flush()

    def on_block(self, done: int, total: int) -> None:
        """A block of the running pass has been computed."""
        self._say(f"{self._line}  block {done}/{total}".lstrip())

    def _say(self, text: str) -> None:
        if self._clock() - self._shown >= _REFRESH_SECONDS:
            self._shown = self._clock()
            self.status.say(text)
