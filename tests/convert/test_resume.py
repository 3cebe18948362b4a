"""Killed at any moment, the same command goes on, and the store comes out the same."""

import itertools
import os
import random
import signal
import time
from pathlib import Path
from unittest import mock

import pytest

from tests.convert.models import save_model, store_digest, tiny_model
from tests.waiting import SECONDS, wait_until
from tests.warm import WarmProcess, tiered
from tiered.convert import ConvertOptions, ConvertResult, convert_checkpoint
from tiered.store import Store


def convert_slowly(source: Path, out: Path) -> None:
    """Waits at each report of progress, so that a kill can fall anywhere, and for a minute before a store is whole."""
    chunks = itertools.count()
    convert_checkpoint(source, out, ConvertOptions(), lambda _: time.sleep(0.005 if next(chunks) < 60 else 60))


@pytest.mark.inputs("tiered/convert", "tiered/store", "tiered/quant")
def test_killed_at_random_moments_the_store_is_the_same(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("llama"), "60KB")
    convert_checkpoint(source, tmp_path / "whole", ConvertOptions())
    out, dice = tmp_path / "out", random.Random(5)
    kills = 0
    for _ in range(6):
        with WarmProcess(convert_slowly, (source, out), [os.devnull] * 3) as child:
            while not out.exists() and child.poll() is None:
                time.sleep(0.01)
            time.sleep(dice.uniform(0.0, 0.3))
            child.send_signal(signal.SIGKILL)
            kills += child.wait(60) == -signal.SIGKILL
        if (out / "manifest.json").exists():
            break
    if not (out / "manifest.json").exists() or (out / "conversion.json").exists():
        convert_checkpoint(source, out, ConvertOptions())
    assert kills >= 1
    Store.open(out)
    assert store_digest(out) == store_digest(tmp_path / "whole")


class Killed(BaseException):
    """As abrupt as a signal: no handler of ours catches it."""


def test_stopped_before_any_durable_write_the_store_is_the_same(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("bloom"))
    options = ConvertOptions()
    convert_checkpoint(source, tmp_path / "whole", options)
    expected = store_digest(tmp_path / "whole")
    replace = Path.replace
    step = 0
    while True:
        step += 1
        out, renames = tmp_path / f"out-{step}", 0

        def failing(self: Path, target: Path, limit: int = step) -> Path:
            nonlocal renames
            renames += 1
            if renames == limit:
                raise Killed
            return replace(self, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", failing)
            try:
                convert_checkpoint(source, out, options)
                break
            except Killed:
                pass
        convert_checkpoint(source, out, options)
        assert store_digest(out) == expected, step
    assert step > 8  # every small file, every block and the manifest


def convert_and_say(*words: str) -> None:
    """`tiered` `words`, which says when it has begun to convert, and takes its time."""

    def show(_: object) -> None:
        print("go", flush=True)
        time.sleep(SECONDS)  # until it is interrupted, however late that is

    def slowly(source: str, out: Path, options: ConvertOptions, _: object) -> ConvertResult:
        return convert_checkpoint(source, out, options, show)

    with mock.patch("tiered.cli.convert.convert_checkpoint", slowly):
        tiered(*words)


@pytest.mark.inputs("tiered/convert", "tiered/cli")
def test_interrupted_from_the_keyboard_it_says_how_to_go_on(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("llama"))
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    words = ("convert", str(source), "-o", str(tmp_path / "out"))
    with WarmProcess(convert_and_say, words, (os.devnull, out, err)) as child:
        wait_until(lambda: child.poll() is not None or (out.exists() and "go" in out.read_text(encoding="utf-8")))
        child.send_signal(signal.SIGINT)
        assert child.wait(SECONDS) == 130
    said = err.read_text(encoding="utf-8")
    assert "the same command resumes" in said and "Traceback" not in said
    convert_checkpoint(source, tmp_path / "out", ConvertOptions())
