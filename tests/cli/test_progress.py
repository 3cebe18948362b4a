"""What is seen of running work: one line on a terminal, now and then a plain one elsewhere.

And of a job that is interrupted, how to go on.
"""

import io
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from tests.commands import make_store, run_here
from tests.jobs.fakes import request, write_lines
from tests.test_interrupt import on_a_terminal
from tests.waiting import SECONDS, wait_until
from tests.warm import run_warm, start_warm, tiered
from tiered.cli.progress import ByteProgress, JobScreen, PassProgress, ScoreProgress
from tiered.cli.screen import StatusLine
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
    assert [line.split("  ")[0] for line in lines] == [f"{n}/100 sequences" for n in (5, 11, 17, 23)]
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


class Said(StatusLine):
    """Shows everything, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def update(self, text: Callable[[], str]) -> None:
        self.texts.append(text())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("time.perf_counter", found)
    return found


def test_a_pass_has_blocks_a_speed_and_time_left_which_begin_anew_with_the_next(clock: Clock) -> None:
    status = Said()
    progress = PassProgress(status, lambda: round(clock.now) * 10**9)
    for _ in range(2):
        for block in (1, 3, 4):
            clock.now += 10.0
            progress.on_block(block, 4)
    assert status.texts[1] == "pass 1  block 3/4  1.00 GB/s  6.7 s left in it"
    assert status.texts[5] == "pass 2  block 4/4  1.00 GB/s  0 ms left in it"
    progress.on_block(1, 4)
    assert progress.so_far() == "pass 3, after 1 of 4 blocks: 1 min 00 s, 55.9 GiB read"


def test_a_scoring_has_passes_blocks_time_left_and_what_was_found_so_far(clock: Clock) -> None:
    status, found = Said(), [None, 3.0]
    progress = ScoreProgress(status, 2, lambda: found[0])
    for _ in range(2):
        for block in range(1, 5):
            clock.now += 10.0
            progress.on_block(block, 4)
        del found[0]
        found.append(3.0)
    assert len(status.texts) == 8
    assert status.texts[1] == "pass 1/2  block 2/4  1 min 00 s left"
    assert status.texts[5] == "pass 2/2  block 2/4  20.0 s left  perplexity so far 3"
    assert status.texts[7].startswith("pass 2/2  block 4/4  0 ms left")


def test_bytes_have_a_speed_and_time_left_without_those_that_were_there(clock: Clock) -> None:
    progress = ByteProgress()
    progress.line(10**9, 5 * 10**9, skipped=10**9)
    clock.now = 2.0
    text = progress.line(3 * 10**9, 5 * 10**9, skipped=10**9)
    assert "1.00 GB/s" in text and "2.0 s left" in text


def test_the_status_line_changes_ten_times_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    clock, stream = Clock(), Terminal()
    made: list[float] = []

    def text() -> str:
        made.append(clock.now)
        return "reading"

    with StatusLine(stream=stream, clock=clock) as status:
        for _ in range(100):
            clock.now += 0.01
            status.update(text)
    assert 5 <= len(made) <= 10
    assert stream.getvalue().count("reading") == len(made)


# The whole command.


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("screen"))


def source_of(requests: int, folder: Path) -> Path:
    """An input of so many, each for 60 tokens."""
    lines = (request(f"id-{number}", max_tokens=60, ignore_eos=True) for number in range(requests))
    return write_lines(folder / "in", lines)


def goes_no_further(*words: str) -> None:
    """The command, which waits where two sequences are done: until it is interrupted, however late that is."""
    on_progress = JobScreen.on_progress

    def wait(screen: JobScreen, progress: Progress) -> None:
        on_progress(screen, progress)
        if not progress.line().startswith(("0/", "1/")):
            screen.status.say(progress.line())
            time.sleep(SECONDS)

    with mock.patch.object(JobScreen, "on_progress", wait):
        tiered(*words)


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(store: Path, tmp_path: Path) -> None:
    results, source = tmp_path / "out.jsonl", source_of(16, tmp_path)
    command = ("batch", store, "-i", source, "-o", results, "--no-measure", "--batch", "2")
    with on_a_terminal(command, tmp_path, goes_no_further) as run:
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


@pytest.mark.slow
def test_two_at_once_do_not_write_to_one_file(store: Path, tmp_path: Path) -> None:
    # The first one has more to do than the machine can keep this process waiting for.
    results, source = tmp_path / "out.jsonl", source_of(2000, tmp_path)
    command = ("batch", store, "-i", source, "-o", results, "--batch", "2")
    with start_warm(*command, out=tmp_path / "stdout", err=tmp_path / "stderr") as first:
        wait_until(lambda: first.poll() is not None or (results.exists() and results.stat().st_size))
        first.send_signal(signal.SIGSTOP)  # it could be done before the other one looks
        second = run_here(*command)
        assert second.code == 2 and "another process is writing to it" in second.err
        first.send_signal(signal.SIGKILL)
        first.wait(SECONDS)
    for line in results.read_bytes().splitlines()[:-1]:
        json.loads(line)
