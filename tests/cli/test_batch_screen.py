"""What is seen of a running job: one line on a terminal, now and then a plain one elsewhere, and how to go on."""

import io
import json
import signal
import time
from pathlib import Path

import pytest

from tests.commands import make_store, run_here
from tests.jobs.fakes import request, write_lines
from tests.test_interrupt import on_a_terminal
from tests.warm import run_warm, start_warm
from tiered.cli.batch_screen import JobScreen
from tiered.jobs.progress import Counts, Progress


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """Somewhere a person looks."""

    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, passes: int, seconds: float) -> str:
    """What a job of so many passes writes, each taking so many seconds."""
    clock, progress = Clock(), Progress(100, 0, 0.0)
    with JobScreen(stream, clock) as screen:
        for number in range(1, passes + 1):
            clock.now += seconds
            screen.on_block(1, 3)
            progress.update(clock.now, Counts(sequences=number, generated_tokens=number * 10))
            screen.on_progress(progress)
        return stream.getvalue()


def test_away_from_a_terminal_a_line_every_half_minute_is_enough() -> None:
    lines = shown(io.StringIO(), 25, 5.0).splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"{n}/100 sequences" for n in (6, 12, 18, 24)]
    assert "\x1b" not in "".join(lines)


def test_a_short_job_says_nothing_on_the_way() -> None:
    assert shown(io.StringIO(), 5, 5.0) == ""


def test_a_terminal_shows_progress_and_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    written = shown(Terminal(), 3, 5.0)
    assert "block 1/3" in written and "2/100 sequences" in written and "\n" not in written


def test_a_terminal_is_not_written_to_more_often_than_eyes_can_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert shown(Terminal(), 1000, 0.001).count("sequences") < 30


# The whole command.


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("screen"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """More than is done in a few seconds."""
    return write_lines(tmp_path / "in", (request(f"id-{n}", max_tokens=60, ignore_eos=True) for n in range(16)))


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(store: Path, source: Path, tmp_path: Path) -> None:
    results = tmp_path / "out.jsonl"
    command = ("batch", store, "-i", source, "-o", results, "--no-measure", "--batch", "2")
    with on_a_terminal(command, tmp_path) as run:
        run.wait_for("2/16 sequences")
        run.interrupt()
    assert run.child.returncode == 130, run.shown
    assert "requests are done; run the same command to go on" in run.shown
    assert run.shown.rstrip().endswith("tiered: interrupted") and "Traceback" not in run.shown
    kept = results.read_bytes()
    assert kept.count(b"\n") >= 2 and kept.endswith(b"\n")
    done = run_warm(tmp_path, *command)
    assert done.code == 0, done.err
    assert f"16 of 16 done, {len(kept.splitlines())} of them before" in done.err
    assert results.read_bytes().startswith(kept)


def test_two_at_once_do_not_write_to_one_file(store: Path, source: Path, tmp_path: Path) -> None:
    results = tmp_path / "out.jsonl"
    command = ("batch", store, "-i", source, "-o", results, "--batch", "2")
    with start_warm(*command, out=tmp_path / "stdout", err=tmp_path / "stderr") as first:
        deadline = time.monotonic() + 60
        while not (results.exists() and results.stat().st_size):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        second = run_here(*command)
        assert second.code == 2 and "another process is writing to it" in second.err
        first.send_signal(signal.SIGKILL)
        first.wait(60)
    for line in results.read_bytes().splitlines()[:-1]:
        json.loads(line)
