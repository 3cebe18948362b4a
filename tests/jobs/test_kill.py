"""A job that is killed with -9 again and again ends with the results of a run in one go, each exactly once."""

import itertools
import json
import os
import random
import time
from pathlib import Path
from typing import IO, Any
from unittest import mock

import pytest

from tests.commands import make_store
from tests.warm import WarmProcess, run_warm, tiered
from tiered.jobs import Journal
from tools.job_loop import differences, kill_until_done, write_requests

SEQUENCES = 40
KILLS = 4
ENOUGH = 7
"""As many results as a kill waits for at most; `KILLS` kills leave some of the 31 requests to do."""


def goes_no_further(*words: str) -> None:
    """The command, which waits when it has added `ENOUGH` results: for a kill, however late that is."""
    append, added = Journal.append, itertools.count(1)

    def wait(*arguments: Any, **named: Any) -> None:
        append(*arguments, **named)
        if next(added) == ENOUGH:
            time.sleep(100)

    with mock.patch.object(Journal, "append", wait):
        tiered(*words)


@pytest.mark.inputs("tools/job_loop.py", "tiered/jobs", "tiered/cli")
@pytest.mark.timeout(300)
def test_kill_9_at_random_moments_changes_no_result(tmp_path: Path) -> None:
    store, requests = make_store(tmp_path), tmp_path / "requests.jsonl"
    write_requests(requests, SEQUENCES)
    command = ["batch", str(store), "-i", str(requests), "--no-measure", "--batch", "3"]
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert run_warm(tmp_path, *command, "-o", whole).code == 0
    runs = itertools.count(1)

    def start(told: IO[bytes]) -> WarmProcess:
        words, streams = [*command, "-o", str(killed)], (os.devnull, os.devnull, told.name)
        return WarmProcess(goes_no_further if next(runs) <= KILLS else tiered, words, streams)

    loop = kill_until_done(start, killed, random.Random(2), KILLS, seconds=3)
    assert loop.kills == KILLS and loop.with_results >= 1
    assert differences(killed, whole) == []
    custom_ids = [json.loads(line)["custom_id"] for line in killed.read_bytes().splitlines()]
    asked = [json.loads(line)["custom_id"] for line in requests.read_bytes().splitlines()]
    assert sorted(custom_ids) == sorted(asked)


def test_the_comparison_sees_what_is_missing_double_or_different(tmp_path: Path) -> None:
    def write(name: str, *texts: tuple[int, str]) -> Path:
        records = [
            {"id": f"r_{line}", "response": {"body": {"created": id(name), "text": text}}} for line, text in texts
        ]
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return tmp_path / name

    expected = write("expected", (1, "a"), (2, "b"))
    assert differences(write("same", (2, "b"), (1, "a")), expected) == []
    assert differences(write("missing", (1, "a")), expected) == ["r_2: no result"]
    assert differences(write("double", (1, "a"), (2, "b"), (1, "a")), expected) == ["r_1: 2 results"]
    assert differences(write("different", (1, "a"), (2, "c")), expected) == ["r_2: another result"]
