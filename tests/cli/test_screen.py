"""What a terminal shows, judged by its screen and not by the bytes sent to it."""

import contextlib
import fcntl
import logging
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pytest

from tests.commands import ROOT, TIERED, Done, make_store, run_apart, smallest_ram
from tests.warm import WarmProcess, run_warm, tiered
from tiered.cli.progress import PassProgress
from tiered.cli.screen import StatusLine, TextWriter
from tiered.units import parse_size

COLUMNS, ROWS = 20, 6
ESCAPES = re.compile(r"\x1b\[(\d*)([ABK])|\x1b([78D])")


class Screen:
    """A small terminal: wraps late, as real ones do, scrolls, and knows what `tiered` sends."""

    def __init__(self, columns: int = COLUMNS, rows: int = ROWS) -> None:
        self.columns, self.rows = columns, rows
        self.lines = [""]
        self.top = 0
        """The first visible one of `lines`; those above have scrolled away."""
        self.row = self.column = 0
        self.saved = (0, 0)
        self.shown: list[str] = []
        """Every line that was the screen's last one at some time."""

    def feed(self, text: str) -> None:
        position = 0
        while position < len(text):
            if text[position] == "\x1b":
                found = ESCAPES.match(text, position)
                assert found, f"unknown escape sequence {text[position : position + 8]!r}"
                self._escape(int(found[1] or 1), found[2] or found[3])
                position = found.end()
            else:
                self._put(text[position])
                position += 1
        self.shown.append(self.visible[-1])

    @property
    def visible(self) -> list[str]:
        """The lines on the screen, without empty ones at the end."""
        lines = [line.rstrip() for line in self.lines]
        while lines and not lines[-1]:
            lines.pop()
        return lines or [""]

    def _put(self, character: str) -> None:
        if character == "\n":
            self.column = 0  # as the terminal driver sends carriage return and line feed for it
            self._down()
        elif character == "\r":
            self.column = 0
        elif character == "\b":
            self.column = max(0, min(self.column, self.columns - 1) - 1)
        else:
            if self.column == self.columns:
                self.column = 0
                self._down()
            line = self.lines[self.top + self.row].ljust(self.column)
            self.lines[self.top + self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def _down(self) -> None:
        if self.row == self.rows - 1:
            self.top += 1
        else:
            self.row += 1
        if self.top + self.row == len(self.lines):
            self.lines.append("")

    def _escape(self, count: int, command: str) -> None:
        last = self.columns - 1
        if command == "7":
            self.saved = (self.row, self.column)
        elif command == "8":
            self.row, self.column = self.saved
        elif command == "D":
            self._down()
        elif command == "A":
            self.row, self.column = max(0, self.row - count), min(self.column, last)
        elif command == "B":
            self.row, self.column = min(self.rows - 1, self.row + count), min(self.column, last)
            while self.top + self.row >= len(self.lines):
                self.lines.append("")
        elif command == "K":
            assert count == 2
            self.lines[self.top + self.row] = ""
        else:
            raise AssertionError(f"unexpected command {command}")


def wrapped(text: str, columns: int = COLUMNS) -> list[str]:
    """The lines that `text` takes on a screen."""
    screen = Screen(columns)
    screen.feed(text)
    return screen.visible


@dataclass
class Growing:
    """A sequence that is given its text by the test."""

    text: str = ""
    finish_reason: str | None = None


@dataclass
class Terminal:
    """A pseudo-terminal whose output goes to a screen."""

    master: int
    stream: TextIO
    screen: Screen

    def read(self, seconds: float = 0.0) -> None:
        while select.select([self.master], [], [], seconds)[0]:
            self.screen.feed(os.read(self.master, 1 << 16).decode().replace("\r\n", "\n"))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        yield Terminal(master, stream, Screen())
    os.close(master)


TEXTS = {
    "short": ["a", " few", " words"],
    "newlines": ["one\n", "two\n", "\n", "three", "\nfour"],
    "wraps": ["0123456789" * 3, "0123456789" * 3],
    "one by one over the edge": list("0123456789" * 5),
    "ends at the edge": ["0123456789" * 2, "0123456789" * 2],
    "newline at the edge": ["0123456789" * 2, "\nnext", "0123456789ABCDEF", "\n", "after"],
    "scrolls": [f"line {number}\n" for number in range(ROWS * 2)],
    "long lines scroll": [str(number % 10) * 17 for number in range(ROWS * 3)],
}


@pytest.mark.parametrize("started_at", [0, ROWS - 1])
@pytest.mark.parametrize("pieces", TEXTS.values(), ids=TEXTS.keys())
def test_text_between_status_lines_is_as_if_there_were_none(
    terminal: Terminal, pieces: Sequence[str], started_at: int
) -> None:
    before = "$\n" * started_at
    terminal.stream.write(before)
    sequence = Growing()
    with (
        TextWriter([sequence], [""], terminal.stream) as writer,
        StatusLine(lambda: writer.at_edge, terminal.stream) as status,
    ):
        for piece in pieces:
            status.say("block 1/2")
            status.say("a status that is wider than the screen")
            terminal.stream.flush()
            terminal.read()
            assert terminal.screen.shown[-1] == "a status that is wi"
            status.clear()
            sequence.text += piece
            writer.update()
        status.say("measuring")
        status.clear()
        sequence.finish_reason = "length"
        writer.update()
        status.say("measuring again")
    terminal.stream.write("report\n")
    terminal.stream.flush()
    terminal.read()
    assert terminal.screen.visible == wrapped(before + "".join(pieces) + "\nreport\n")


def test_wide_characters_are_counted_as_two(terminal: Terminal) -> None:
    sequence = Growing()
    with TextWriter([sequence], [""], terminal.stream) as writer:
        for text, held in (("日" * 10, "日"), ("日" * 10 + "a", ""), ("日" * 10 + "a" * 18 + "e", "")):
            sequence.text = text
            writer.update()
            assert writer.at_edge == held


def test_a_text_that_breaks_off_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(KeyboardInterrupt), TextWriter([Growing("unfin")], [""]) as writer:
        writer.update()
        raise KeyboardInterrupt
    assert capsys.readouterr().out == "unfin\n"


def test_the_front_text_streams_and_those_behind_wait(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = Growing("He"), Growing("Wor"), Growing("all", "stop")
    with TextWriter([first, second, third], ["[1] ", "[2] ", "[3] "]) as writer:
        writer.update()
        assert capsys.readouterr().out == "[1] He"
        second.text, second.finish_reason = "World", "length"
        writer.update()
        assert capsys.readouterr().out == ""
        first.text, first.finish_reason = "Hello", "stop"
        writer.update()
        assert capsys.readouterr().out == "llo\n[2] World\n[3] all\n"


def test_nothing_is_shown_where_there_is_no_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with StatusLine() as status:
        status.say("block 1/2")
        PassProgress(status, lambda: 0).on_block(1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_dumb_terminal_gets_no_movements(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with StatusLine(stream=terminal.stream) as status:
        status.say("block 1/2")
    terminal.read()
    assert terminal.screen.visible == [""]


def test_a_warning_gets_a_line_of_its_own(terminal: Terminal) -> None:
    handler = logging.StreamHandler(terminal.stream)
    logging.getLogger().addHandler(handler)
    try:
        with StatusLine(stream=terminal.stream) as status:
            status.say("reading")
            logging.getLogger("tiered.test").warning("no O_DIRECT here")
            status.say("block 1/2")
        logging.getLogger("tiered.test").warning("and none there")
    finally:
        logging.getLogger().removeHandler(handler)
    terminal.read()
    assert terminal.screen.visible == ["no O_DIRECT here", "and none there"]


def test_tabs_move_to_the_next_stop_and_stay_on_the_line(terminal: Terminal) -> None:
    sequence = Growing()
    with TextWriter([sequence], [""], terminal.stream) as writer:
        for text, held in (("a\tb\tcde", ""), ("a\tb\tcdef", "f"), ("a\tb\tcdefg\t\t\t", "")):
            sequence.text = text
            writer.update()
            assert writer.at_edge == held, text


def test_nothing_comes_after_the_end(terminal: Terminal) -> None:
    with StatusLine(stream=terminal.stream) as status:
        status.say("block 1/2")
    PassProgress(status, lambda: 0).on_block(1, 2)
    terminal.read()
    assert terminal.screen.visible == [""]


# The whole command.


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("screen"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streams")


@pytest.fixture(scope="module")
def streaming(store: Path, folder: Path) -> list[str]:
    """Words of a command that streams in a warm process, and writes several lines."""
    return streaming_words(store, lambda words: run_warm(folder, *words))


def streaming_words(store: Path, run: Callable[[Sequence[str]], Done]) -> list[str]:
    """Such words for processes as `run` starts them; they differ in size, each a little from the one before."""
    words = ["generate", str(store), "-p", "The function returns", "-n", "48", "--prefetch", "0"]
    run([*words, "--ram", "1MiB"])  # it leaves the store's shape, and is larger than those that find it there
    smallest = parse_size(smallest_ram(run([*words, "--ram", "1MiB"]).err))
    return [*words, "--ram", str(smallest)]


@pytest.fixture(scope="module")
def plain(streaming: list[str], folder: Path) -> str:
    """What that command writes where there is no terminal."""
    done = run_warm(folder, *streaming)
    assert done.code == 0, done.err
    assert "\x1b" not in done.out + done.err
    assert done.out.count("\n") > 2
    return done.out


@pytest.mark.slow
def test_a_run_on_a_terminal_shows_status_lines_and_leaves_text_and_report(streaming: list[str], plain: str) -> None:
    columns, rows = 40, 10
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    screen = Screen(columns, rows)
    with WarmProcess(tiered, streaming, [os.ttyname(slave)] * 3, TERM="xterm") as child:
        ended = False
        while not ended:
            ended = child.poll() is not None  # then what is there now is all
            while select.select([master], [], [], 0.1)[0]:
                screen.feed(os.read(master, 1 << 16).decode().replace("\r\n", "\n"))
    os.close(slave)
    os.close(master)
    assert child.returncode == 0
    assert any(re.match(r"pass \d+  block \d+/9  \d+\.\d\d GB/s", line) for line in screen.shown), screen.shown
    assert "measuring the disk" in screen.shown
    text = wrapped(plain, columns)
    assert screen.visible[: len(text)] == text
    assert screen.visible[len(text)].startswith("prefill ")
    assert not any(line.startswith(("block", "measuring", "reading")) for line in screen.visible)


@pytest.mark.inputs("tiered/cli")
@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_a_real_terminal_shows_the_same(
    store: Path, plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("TMUX", raising=False)
    tmux = ("tmux", "-S", str(tmp_path / "socket"), "-f", "/dev/null")
    command = [*map(str, TIERED), *streaming_words(store, lambda words: run_apart((*TIERED, *words)))]
    (tmp_path / "run").write_text(f"{subprocess.list2cmdline(command)}\necho end of the run; exec sleep 1000\n")
    subprocess.run((*tmux, "new-session", "-d", "-x", "40", "-y", "8", f"sh {tmp_path / 'run'}"), check=True)
    try:
        deadline = time.monotonic() + 200
        while "end of the run" not in (shown := captured(tmux)) and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        subprocess.run((*tmux, "kill-server"), check=True)
    lines = shown.splitlines()
    text = wrapped(plain, 40)
    assert lines[: len(text)] == text
    assert lines[len(text)].startswith("prefill ")
    assert not any(line.startswith(("block", "measuring", "reading")) for line in lines)


def captured(tmux: Sequence[str]) -> str:
    """All lines of a tmux window, those that have scrolled away included."""
    command = (*tmux, "capture-pane", "-p", "-S", "-1000")
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
