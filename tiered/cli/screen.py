"""What a person sees while text is generated: the text on standard output, one status line on standard error."""

import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self, TextIO

from tiered.units import format_rate, format_seconds

_REFRESH_SECONDS = 0.1


class Writes(Protocol):
    """A sequence whose text grows."""

    @property
    def text(self) -> str: ...

    @property
    def finish_reason(self) -> str | None: ...


class StatusLine:
    """One line on a terminal that is rewritten while a pass runs, and gone when it ends. Silent elsewhere.

    Where standard output is the same terminal, text is only ever written while the line is off the screen.
    """

    def __init__(self, bytes_read: Callable[[], int], stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._on = stream.isatty()
        self._bytes_read = bytes_read
        self._shown = 0.0
        self._visible = False
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.clear()

    def on_block(self, done: int, total: int) -> None:
        """A block of the running pass has been computed."""
        now = time.perf_counter()
        if done == 1 and self._blocks_of_pass:
            self._begin()
        self._blocks_of_pass = done
        if not self._on or now - self._shown < _REFRESH_SECONDS:
            return
        self._shown = now
        elapsed = now - self._pass_began
        rate = (self._bytes_read() - self._bytes_before) / elapsed if elapsed else 0.0
        left = elapsed / done * (total - done)
        self._write(f"layer {done}/{total}  {format_rate(rate)}  {format_seconds(left)} left in this pass")

    def say(self, text: str) -> None:
        """Show `text` until something else happens."""
        if self._on:
            self._write(text)

    def clear(self) -> None:
        """Take the line off the screen."""
        if self._visible:
            # Restore the cursor to where the text ended, and erase what the line wrote below it.
            self._stream.write("\x1b8\x1b[J")
            self._stream.flush()
            self._visible = False

    def _begin(self) -> None:
        self._pass_began = time.perf_counter()
        self._bytes_before = self._bytes_read()
        self._blocks_of_pass = 0

    def _write(self, text: str) -> None:
        self.clear()
        # Save the cursor where the text stands; the status goes to the next line.
        self._stream.write(f"\n\x1b[1A\x1b7\x1b[B\r{text}")
        self._stream.flush()
        self._visible = True


class TextWriter:
    """Writes completions to standard output as they become final, one sequence after the other.

    The sequence in front streams; the ones behind it wait until it has ended, so that texts never mix.
    """

    def __init__(self, sequences: Sequence[Writes], titles: Sequence[str], stream: TextIO = sys.stdout) -> None:
        self._sequences, self._titles, self._stream = sequences, titles, stream
        self._front = 0
        self._written = 0
        self._started = False

    def update(self) -> None:
        """Write what has become final since the last call."""
        while self._front < len(self._sequences):
            sequence = self._sequences[self._front]
            if not self._started:
                self._stream.write(self._titles[self._front])
                self._started = True
            text = sequence.text
            self._stream.write(text[self._written :])
            self._written = len(text)
            if sequence.finish_reason is None:
                break
            self._stream.write("\n")
            self._front, self._written, self._started = self._front + 1, 0, False
        self._stream.flush()
