"""A command that could not do all it was asked for ends with a failing code, and names what it could not."""

import click
import pytest

from tests.commands import run_here
from tiered.cli.lines import end_failed
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
