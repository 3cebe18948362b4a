"""What a person sees on a terminal: text that grows on standard output, one status line on standard error.

What the status line says is in `progress.py`.
"""

import logging
import math
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Protocol, Self, TextIO

_REFRESH_SECONDS: Final = 0.1
_LINE_SECONDS: Final = 30.0
"""Between two plain lines."""
_TAB: Final = 8
# The first moves to the line below the text, scrolling if need be; the second erases that line and moves back to where
# the text ended.
_LINE_BELOW: Final = "\x1bD\x1b[A\x1b7\x1b[B\r"
_BACK: Final = "\x1b8\x1b[B\x1b[2K\x1b8"


class Writes(Protocol):
    """A sequence whose text grows."""

    @property
    def text(self) -> str: ...

    @property
    def finish_reason(self) -> str | None: ...


class TextWriter:
    """Writes completions to standard output as they become final, one sequence after the other.

    The sequence in front streams; the ones behind it wait until it has ended, so that texts never mix.
    """

    def __init__(self, sequences: Sequence[Writes], titles: Sequence[str], stream: TextIO | None = None) -> None:
        self._sequences, self._titles = sequences, titles
        self._stream = sys.stdout if stream is None else stream
        self._edge = _Edge(self._stream) if is_terminal(self._stream) else None
        self._front = 0
        self._written = 0
        self._started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._started:
            # A text that breaks off still ends its line: what comes next is not part of it.
            self._write("\n")
            self._stream.flush()

    def update(self) -> None:
        """Write what has become final since the last call."""
        while self._front < len(self._sequences):
            sequence = self._sequences[self._front]
            if not self._started:
                self._write(self._titles[self._front])
                self._started = True
            text = sequence.text
            self._write(text[self._written :])
            self._written = len(text)
            if sequence.finish_reason is None:
                break
            self._write("\n")
            self._front, self._written, self._started = self._front + 1, 0, False
        self._stream.flush()

    @property
    def at_edge(self) -> str:
        """The character in the terminal's last column if the cursor waits behind it, else ""."""
        return "" if self._edge is None else self._edge.held

    def _write(self, text: str) -> None:
        self._stream.write(text)
        if self._edge is not None:
            self._edge.follow(text)


class StatusLine:
    """One line on a terminal that is rewritten while something runs, and gone when it ends. Elsewhere a plain line now
    and then, so that a log shows how far a long run is; nothing of what takes less.

    It stands below the text; the cursor returns to the text's end before more is written. `at_edge` returns what must
    then be written again: a terminal that has filled a line waits behind its last column, which a movement of the
    cursor makes it forget.
    """

    def __init__(
        self,
        at_edge: Callable[[], str] = str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._on = is_terminal(self._stream)
        self._at_edge, self._clock = at_edge, clock
        self._updated = -math.inf if self._on else clock()
        self._visible = self._is_over = False
        # Blocks are reported by the compute thread; warnings and the end of a pass come from others.
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        for handler in logging.getLogger().handlers:
            handler.addFilter(self._before_message)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for handler in logging.getLogger().handlers:
            handler.removeFilter(self._before_message)
        self.clear()
        self._is_over = True

    def update(self, text: Callable[[], str]) -> None:
        """Show what `text` returns, unless the last update was less than `_REFRESH_SECONDS` ago, or less than
        `_LINE_SECONDS` where lines stay."""
        now = self._clock()
        if now - self._updated < (_REFRESH_SECONDS if self._on else _LINE_SECONDS):
            return
        self._updated = now
        if self._on:
            self.say(text())
        elif not self._is_over:
            self._write(f"{text()}\n")

    def say(self, text: str) -> None:
        """Show `text` until something else happens."""
        with self._lock:
            if not self._on or self._is_over:
                return
            # A status that wraps takes two lines, and may scroll away the place to return to.
            self._write((_BACK if self._visible else "") + _LINE_BELOW + text[: _columns(self._stream) - 1])
            self._visible = True

    def clear(self) -> None:
        """Take the line off the screen."""
        with self._lock:
            if self._visible:
                self._write(_BACK + _again(self._at_edge()))
                self._visible = False

    def _before_message(self, _: logging.LogRecord) -> bool:
        """A warning is about to be written to the same screen; the next block brings the status back."""
        self.clear()
        return True

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class _Edge:
    """Follows a terminal's cursor along a line, to know when it waits behind the last column."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._column = 0
        self.held = ""

    def follow(self, text: str) -> None:
        """`text` has been written."""
        columns = _columns(self._stream)
        for character in text:
            width = _width(character)
            if character in "\r\n":
                self._column = 0
            elif character == "\t":
                self._column = min(self._column + _TAB - self._column % _TAB, columns - 1)
            elif width == 0:
                self.held += character if self.held else ""
                continue
            else:
                # A character that does not fit begins the next line.
                self._column = self._column + width if self._column + width <= columns else width
            self.held = character if width and self._column == columns else ""


def _again(held: str) -> str:
    """What to write so that `held` is in the last column once more, and the terminal waits behind it again."""
    return "\b" * (_width(held[0]) - 1) + held if held else ""


def _width(character: str) -> int:
    """Columns that `character` takes."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf", "Cc"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` goes to a screen that understands cursor movements."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80
