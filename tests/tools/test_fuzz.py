"""The fuzz program: a slice of its cases finds nothing, a planted fault is found, and a case can be repeated."""

import itertools
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import ROOT, run_apart
from tests.waiting import SECONDS, wait_until
from tools.fuzz.cases import KINDS
from tools.fuzz.child import Child, Ended, Limits, faults, start
from tools.fuzz.mutate import mutate_bytes, mutate_json, mutate_safetensors, mutate_text

LIMITS = Limits(seconds=SECONDS)
READS = pytest.mark.inputs("tools/fuzz", "tiered/store", "tiered/convert", "tiered/jobs", "tiered/cli")
FUZZ = (sys.executable, "-m", "tools.fuzz")
PLANTED = """
import json, sys
from tiered.store import manifest
from tools.fuzz.__main__ import main

manifest.parse_json = lambda raw, *rest: json.loads(raw)
for line in sys.stdin:
    print("exit code", main(line.split()), flush=True)
"""
"""The program, where syntax errors of a manifest go unhandled, for the words of one line after the other."""


@READS
@pytest.mark.timeout(300)
def test_a_slice_of_all_kinds_finds_nothing() -> None:
    done = run_apart((*FUZZ, "--cases", "70", "--seed", "1", "--seconds", "90"), seconds=280)
    assert done.code == 0, done.out + done.err
    assert "70 cases from seed 1, 0 findings" in done.out
    assert set(KINDS) == set(re.findall(r"([\w-]+) \d+: \d+", done.out))


@READS
def test_a_planted_fault_is_found_and_its_case_can_be_repeated(tmp_path: Path) -> None:
    words = [sys.executable, "-c", PLANTED]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        found = answer(process, "--cases", "10", "--kinds", "manifest", "--keep", tmp_path / "kept")
        assert "wrote 'internal error'" in found
        seed = re.findall(r"--case (\d+) --kinds manifest", found)[0]
        assert (tmp_path / "kept" / seed).is_dir()
        assert f"--case {seed} " in answer(process, "--case", seed, "--kinds", "manifest")


def answer(process: subprocess.Popen[str], *words: str | Path) -> str:
    """What the program prints before its exit code, which says that there are findings."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(" ".join(map(str, words)) + "\n")
    process.stdin.flush()
    lines = list(itertools.takewhile(lambda line: line != "exit code 1\n", process.stdout))
    assert not process.poll(), "".join(lines)
    return "".join(lines)


def ended(call: Callable[[], object], folder: Path, limits: Limits = LIMITS, *signals: float) -> Ended:
    return end_of(start(call, folder, b"text", signals), limits)


def end_of(child: Child, limits: Limits) -> Ended:
    while (found := child.poll(limits)) is None:
        time.sleep(0.01)
    return found


def says(text: str, code: int) -> Callable[[], object]:
    def call() -> None:
        sys.stderr.write(text)
        sys.exit(code)

    return call


def never() -> None:
    print("begun", flush=True)
    while True:
        time.sleep(1)


def takes_too_much() -> None:
    kept = bytearray(200 << 20)
    kept[:: os.sysconf("SC_PAGE_SIZE")] = b"x" * len(kept[:: os.sysconf("SC_PAGE_SIZE")])


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        (says("tiered: a file: is not whole; get it again\n", 4), []),
        (says("", 0), []),
        (says("tiered: something else\n", 4), ["names neither of a file"]),
        (says("tiered: a file: one\ntiered: two\n", 4), ["expected one line"]),
        (says("", 3), ["expected one line"]),
        (says("", 7), ["exit code 7"]),
        (says("FutureWarning: do not\n", 0), ["wrote 'Warning:'"]),
        (lambda: 1 / 0, ["exit code 98", "wrote 'Traceback'"]),
        (lambda: os.kill(os.getpid(), 9), ["ended by signal 9"]),
        (takes_too_much, ["took"]),
    ],
)
def test_what_a_command_must_not_do_is_told(call: Callable[[], object], wrong: list[str], tmp_path: Path) -> None:
    base = ended(says("", 0), tmp_path).rss_nbytes
    for name in ("out", "err"):
        (tmp_path / name).unlink()
    limits = Limits(seconds=SECONDS, rss_nbytes=base + (100 << 20))
    found = list(faults(ended(call, tmp_path, limits), limits, ["a file"]))
    assert len(found) == len(wrong), found
    for text, expected in zip(found, wrong, strict=True):
        assert expected in text


def test_a_command_that_never_ends_is_ended_and_told(tmp_path: Path) -> None:
    child, limits = start(never, tmp_path, b"text"), Limits(seconds=0.5)
    wait_until(lambda: (tmp_path / "out").exists() and (tmp_path / "out").read_bytes())
    found = end_of(child, limits)
    assert list(faults(found, limits, [])) == ["still running after 0 s"]
    assert "in never" in found.err, "where it was"


def test_an_interrupt_is_delivered(tmp_path: Path) -> None:
    assert ended(never, tmp_path, LIMITS, 0.2).code == 130


@pytest.mark.parametrize("mutate", [mutate_json, mutate_text, mutate_bytes, mutate_safetensors])
def test_damage_is_a_function_of_the_seed_and_does_damage(mutate: Callable[[random.Random, bytes], bytes]) -> None:
    text = b'{"a": 1, "b": [1, 2, {"c": "d"}], "__metadata__": {"tiered": "{}"}}'
    raw = len(text).to_bytes(8, "little") + text + bytes(9) if mutate is mutate_safetensors else text
    first = [mutate(random.Random(seed), raw) for seed in range(100)]
    assert first == [mutate(random.Random(seed), raw) for seed in range(100)]
    assert len(set(first)) > 15
    assert sum(damaged != raw for damaged in first) > 80
