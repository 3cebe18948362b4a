"""The result file: whole lines whatever happened, one process at a time, only results of its own job."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from tiered.errors import ConfigError, CorruptError, DiskFullError
from tiered.jobs import Identity, JobFile, Journal, Label, job_path
from tiered.jobs.request import Problem
from tiered.jobs.results import problem_line

IDENTITY = Identity("input", "store", {"seed": 0})
JOB = JobFile(IDENTITY, 1700000000, 5, 20, 90)
LINES = 9


def record(line: int, key: str = IDENTITY.key) -> bytes:
    return problem_line(Label(key, 0, "model"), Problem(line, "code", "caf\u00e9 \u8a9e", None, f"id-{line}"))


def add(path: Path, *lines: int) -> None:
    with Journal(path) as journal:
        journal.begin(JOB, LINES)
        for line in lines:
            journal.append(line, record(line), 0)


def done(path: Path) -> set[int]:
    """What a process that opens the file finds done."""
    with Journal(path) as journal:
        journal.begin(JOB, LINES)
        assert len(journal.done) == journal.failed
        return {line for line in range(1, LINES + 1) if line in journal.done}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def test_what_was_appended_is_found_done_and_what_is_added_goes_behind_it(results: Path) -> None:
    add(results, 3, 1)
    add(results, 7)
    assert results.read_bytes() == record(3) + record(1) + record(7)
    assert done(results) == {1, 3, 7}


def test_a_last_line_torn_at_any_byte_is_cut_off_and_may_be_written_again(results: Path) -> None:
    add(results, 3, 1)
    whole = results.read_bytes()
    start = len(record(3))
    for length in range(start, len(whole)):
        results.write_bytes(whole[:length])
        assert done(results) == {3}
        assert results.read_bytes() == record(3)
        add(results, 1)
        assert results.read_bytes() == whole


def test_a_first_line_torn_leaves_nothing(results: Path) -> None:
    add(results, 3)
    results.write_bytes(record(3)[:10])
    assert done(results) == set()
    assert results.read_bytes() == b""


def test_a_last_line_with_a_hole_in_it_is_cut_off(results: Path) -> None:
    add(results, 3, 1)
    hole = bytes(len(record(1)) - 5) + record(1)[-5:]
    results.write_bytes(record(3) + hole)
    assert done(results) == {3}
    assert results.read_bytes() == record(3)


@pytest.mark.parametrize(
    "between",
    [
        b"\n",
        b"nonsense\n",
        record(2, key="0" * 16),
        record(3),
        record(LINES + 1),
        b'{"id": 5}\n',
        record(2)[:-20] + b"\n",
    ],
    ids=["blank", "nonsense", "another job", "done twice", "no such line", "no result", "broken"],
)
def test_anything_but_results_of_this_job_before_the_end_is_an_error(results: Path, between: bytes) -> None:
    add(results, 3)
    content = record(3) + between + record(1)
    results.write_bytes(content)
    with pytest.raises(CorruptError, match=r"results\.jsonl: line 2 .*another one with -o"):
        done(results)
    assert results.read_bytes() == content


def test_another_job_is_refused_and_the_file_left_alone(results: Path) -> None:
    add(results, 3)
    with results.open("ab") as file:
        file.write(b"torn")
    content = results.read_bytes()
    other = JobFile(Identity("input", "store", {"seed": 1}), 0, 0, 0, 0)
    with Journal(results) as journal:
        with pytest.raises(ConfigError, match="seed is 1, it was 0"):
            journal.check(other.identity)
        with pytest.raises(ConfigError, match="seed is 1, it was 0"):
            journal.begin(other, LINES)
    assert results.read_bytes() == content


def test_results_without_their_job_are_refused(results: Path) -> None:
    add(results, 3)
    job_path(results).unlink()
    with pytest.raises(ConfigError, match=r"without results\.jsonl\.job.*another file with -o"), Journal(results):
        pass
    assert results.read_bytes() == record(3)


def test_a_job_without_results_begins_anew(results: Path) -> None:
    add(results, 3)
    results.unlink()
    assert done(results) == set()


def test_the_job_is_written_down_before_the_first_result(results: Path) -> None:
    with Journal(results) as journal:
        assert journal.job is None
        journal.begin(JOB, LINES)
        assert JobFile.from_json(job_path(results).read_text(encoding="utf-8"), results) == JOB
        assert results.read_bytes() == b""


def test_a_job_keeps_what_it_was_begun_with(results: Path) -> None:
    add(results, 3)
    with Journal(results) as journal:
        journal.begin(JobFile(IDENTITY, 1800000000, 6, 21, 91), LINES)
        assert journal.job == JOB


def test_what_attends_is_open_until_there_is_a_result_of_it_and_then_kept(results: Path) -> None:
    with Journal(results) as journal:
        journal.begin(JOB, LINES)
        for where in ("gpu", "cpu", "gpu"):
            journal.attends(where)
            assert journal.attention is None
        journal.append(1, record(1), 0)  # an error
        journal.attends("cpu")
        journal.append(2, record(2), 1)
        assert journal.attention == "cpu"
        journal.attends("cpu")
        with pytest.raises(ConfigError, match="its results are of a job with the KV cache in memory or on disk"):
            journal.attends("gpu")
    assert JobFile.from_json(job_path(results).read_text(encoding="utf-8"), results).attention == "cpu"


def test_two_cannot_write_to_one_file(results: Path) -> None:
    with Journal(results) as journal:
        journal.begin(JOB, LINES)
        with pytest.raises(ConfigError, match="another process is writing to it"), Journal(results):
            pass
        journal.append(2, record(2), 0)
    assert done(results) == {2}


@pytest.mark.parametrize("name", ["missing/results.jsonl", "."])
def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be written"), Journal(tmp_path / name):
        pass


def test_each_line_is_on_the_disk_before_append_returns(results: Path) -> None:
    events: list[str] = []

    def noting(name: str, call: Callable[..., int | None]) -> Callable[..., int | None]:
        def noted(*arguments: object) -> int | None:
            events.append(name)
            return call(*arguments)

        return noted

    with Journal(results) as journal:
        journal.begin(JOB, LINES)
        with mock.patch.multiple(os, write=noting("write", os.write), fdatasync=noting("sync", os.fdatasync)):
            journal.append(1, record(1), 0)
            journal.append(2, record(2), 0)
    assert events == ["write", "sync"] * 2


def test_a_line_that_the_system_takes_in_pieces_is_written_whole(results: Path) -> None:
    write = os.write
    with Journal(results) as journal:
        journal.begin(JOB, LINES)
        with mock.patch.object(os, "write", lambda fd, data: write(fd, data[:7])):
            journal.append(1, record(1), 0)
    assert results.read_bytes() == record(1)


def test_a_full_disk_leaves_whole_lines_and_says_what_to_do(results: Path) -> None:
    write, room = os.write, [len(record(1)) + 10]

    def limited(fd: int, data: memoryview) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(fd, data[: room[0]])
        room[0] -= count
        return count

    with Journal(results) as journal:
        journal.begin(JOB, LINES)
        with mock.patch.object(os, "write", limited):
            journal.append(1, record(1), 0)
            with pytest.raises(DiskFullError, match=r"results\.jsonl.*results so far are kept.*same command again"):
                journal.append(2, record(2), 0)
        assert results.read_bytes() == record(1)
        journal.append(2, record(2), 0)
    assert done(results) == {1, 2}
