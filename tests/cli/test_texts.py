"""Texts come from what has an end, and is not too large."""

import os
import threading
from pathlib import Path

import click
import pytest

from tests.commands import run_here
from tiered.cli import texts
from tiered.cli.texts import read_text


@pytest.mark.parametrize("command", ["generate", "score"])
def test_texts_come_from_what_has_an_end(command: str, tmp_path: Path) -> None:
    for device in ("/dev/zero", "/dev/full"):
        done = run_here(command, "no-store", "-f", device)
        assert done.code == 2 and f"{device}: a device, expected a text" in done.err, done
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("Some text",))
    writer.start()
    # What is read, an empty device too, gets as far as the store.
    for path in (pipe, os.devnull):
        done = run_here(command, "no-store", "-f", path)
        assert done.code == 4 and "no-store" in done.err, done
    writer.join()


def test_a_text_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(texts, "_MOST_TEXT_NBYTES", 1 << 20)
    path = tmp_path / "text"
    path.write_bytes(bytes(1 << 20))
    assert read_text(path) == (str(path), "\0" * (1 << 20))
    path.write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(click.UsageError, match="more than 1 MiB; split it"):
        read_text(path)
