"""Which errors concern one sequence, and what foreign ones become."""

import pytest
import torch

from tiered.errors import (
    ConfigError,
    DiskFullError,
    InterruptedRun,
    ModelError,
    ReadError,
    TieredError,
    contained,
    error_of_one,
    shortened,
)


class Panic(BaseException):
    """As tokenizers' are."""


def test_an_error_of_our_own_stays_what_it_is() -> None:
    for error in (ModelError("NaN"), ConfigError("empty")):
        assert error_of_one(error) is error


@pytest.mark.parametrize(
    "error", [ValueError("no\nsuch  token"), Panic("no such token"), RecursionError("no such token")]
)
def test_a_foreign_error_is_named_in_one_line(error: BaseException) -> None:
    found = error_of_one(error)
    assert type(found) is TieredError and found.__cause__ is error
    assert str(found) == f"{type(error).__name__}: no such token"


def test_a_foreign_error_is_not_repeated_at_any_length() -> None:
    assert len(str(error_of_one(ValueError("x" * 10_000)))) < 250


@pytest.mark.parametrize(
    "error",
    [
        *(KeyboardInterrupt(), SystemExit(1), GeneratorExit(), MemoryError(), OSError(28, "full")),
        *(InterruptedRun("enough"), ReadError("gone"), DiskFullError("full")),
    ],
)
def test_what_concerns_everything_is_of_no_one(error: BaseException) -> None:
    assert error_of_one(error) is None


def test_torch_s_lack_of_memory_is_one() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert error_of_one(caught.value) is None


def test_what_is_contained_is_of_one_and_all_else_is_raised() -> None:
    found = list[TieredError]()
    with contained(found.append):
        raise Panic("no such token")
    assert [str(error) for error in found] == ["Panic: no such token"]
    with pytest.raises(MemoryError), contained(found.append):
        raise MemoryError
    assert len(found) == 1


def test_an_error_whose_text_alone_says_nothing_is_named() -> None:
    assert shortened(KeyError("nope")) == "KeyError: 'nope'"
    assert shortened(ValueError("no such\ntoken")) == "no such token"
    assert str(error_of_one(KeyError("nope"))) == "KeyError: 'nope'"
