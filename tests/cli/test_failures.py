"""A command that could not do all it was asked for ends with a failing code, and names what it could not."""

import os
import threading
from pathlib import Path

import click
import pytest

from tests.commands import run_here
from tiered.cli import run_options
from tiered.cli.failures import end_failed
from tiered.cli.run_options import read_text
from tiered.errors import ConfigError, ModelError


def test_without_a_failure_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    end_failed([], 3)
    assert capsys.readouterr() == ("", "")


def test_the_only_one_raises_its_own_error() -> None:
    error = ConfigError("empty")
    with pytest.raises(ConfigError) as caught:
        end_failed([("prompt 1", error)], 1)
    assert caught.value is error


def test_some_of_several_are_named_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(click.exceptions.Exit) as caught:
        end_failed([("prompt 1", ConfigError("empty")), ("prompt 3", ModelError("NaN"))], 3)
    assert caught.value.exit_code == 1
    assert capsys.readouterr() == ("", "tiered: prompt 1: empty\ntiered: prompt 3: NaN\n")


def test_they_cannot_write_on_the_screen_what_they_like(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(click.exceptions.Exit):
        end_failed([("a\x1b[2J", ConfigError("b\nc"))], 2)
    assert capsys.readouterr().err == "tiered: a\\x1b[2J: b c\n"


def test_what_is_wrong_with_arguments_is_one_line_too() -> None:
    done = run_here("verify", "store", "a\u2028\x07b")
    assert done.code == 2 and done.err.splitlines()[-1] == r"Error: Got unexpected extra argument (a\u2028\x07b)"


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
    monkeypatch.setattr(run_options, "_MOST_TEXT_NBYTES", 1 << 20)
    path = tmp_path / "text"
    path.write_bytes(bytes(1 << 20))
    assert read_text(path) == (str(path), "\0" * (1 << 20))
    path.write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(click.UsageError, match="more than 1 MiB; split it"):
        read_text(path)
