"""Sizes and durations: what people type is understood, what is printed can be typed again."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered.errors import ConfigError
from tiered.units import (
    GIB,
    KIB,
    MIB,
    format_budget,
    format_rate,
    format_seconds,
    format_size,
    parse_size,
    round_down,
    round_up,
)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4096", 4096),
        ("4096B", 4096),
        ("8GiB", 8 * GIB),
        ("8G", 8 * GIB),
        ("8g", 8 * GIB),
        ("8gib", 8 * GIB),
        ("8GB", 8 * 10**9),
        ("8 GB", 8 * 10**9),
        (" 512 MiB ", 512 * MIB),
        ("1.5K", 1536),
        (".5k", 512),
        ("2.KiB", 2048),
        ("3TiB", 3 << 40),
        ("3TB", 3 * 10**12),
        ("1e", None),
        ("", None),
        ("GiB", None),
        ("-1GiB", None),
        ("1,5GiB", None),
        ("8 bits", None),
        ("8i", None),
        ("8iB", None),
        ("8PiB", None),
        ("0", None),
        ("0GiB", None),
        ("0.0001", None),
        ("nan", None),
        ("inf", None),
    ],
)
def test_sizes_mean_what_memory_sizes_mean(text: str, nbytes: int | None) -> None:
    if nbytes is None:
        with pytest.raises(ConfigError, match=r"size .*: expected"):
            parse_size(text)
    else:
        assert parse_size(text) == nbytes


def test_the_message_quotes_what_was_typed_and_shows_what_would_do() -> None:
    with pytest.raises(ConfigError, match="'eight': expected a number with a unit, such as 8GiB"):
        parse_size("eight")


def test_huge_numbers_are_sizes_too() -> None:
    assert parse_size("9" * 20) == int("9" * 20)
    assert parse_size("9" * 400) > 10**399


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_bad_usage(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_size(text) > 0


@given(st.integers(1, 1 << 62))
def test_a_number_of_bytes_is_itself(nbytes: int) -> None:
    assert parse_size(str(nbytes)) == nbytes


@given(st.integers(1, 1 << 50))
def test_a_printed_size_reads_back_within_its_three_digits(nbytes: int) -> None:
    assert parse_size(format_size(nbytes)) == pytest.approx(nbytes, rel=0.006)


@given(st.integers(1, 1 << 50))
def test_a_printed_budget_reads_back_as_at_least_as_much(nbytes: int) -> None:
    assert nbytes <= parse_size(format_budget(nbytes)) < nbytes + MIB


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1 KiB"),
        (1536, "1.5 KiB"),
        (999.4 * MIB, "999 MiB"),
        (1023 * MIB, "1023 MiB"),
        (1.98 * GIB, "1.98 GiB"),
        (2000 * (1 << 40), "2000 TiB"),
        (-3 * GIB, "-3 GiB"),
    ],
)
def test_sizes_are_printed_with_three_digits(nbytes: float, text: str) -> None:
    assert format_size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "840 ms"),
        (0.9996, "1.0 s"),
        (12.34, "12.3 s"),
        (59.97, "1 min 00 s"),
        (250, "4 min 10 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_are_printed_for_a_glance(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_rates_are_decimal_as_disks_are_sold() -> None:
    assert format_rate(1.874e9) == "1.87 GB/s"
    assert [format_rate(rate) for rate in (1e7, 4.2e6, 2500.0, 0.0)] == [
        "0.01 GB/s",
        "4.20 MB/s",
        "2.50 kB/s",
        "0.00 kB/s",
    ]


@given(st.integers(0, 1 << 60), st.integers(1, 1 << 20))
def test_rounding_brackets_the_value(value: int, multiple: int) -> None:
    low, high = round_down(value, multiple), round_up(value, multiple)
    assert low % multiple == high % multiple == 0
    assert low <= value <= high < low + 2 * multiple
    assert (low == high) == (value % multiple == 0)
