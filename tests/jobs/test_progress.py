"""Progress: rates of the last minute, and a time left that is right when the speed stays as it is."""

import pytest

from tiered.jobs.progress import Counts, Progress


def test_rates_are_tokens_per_second() -> None:
    progress = Progress(100, 0, 1000.0)
    progress.update(1010.0, Counts(prompt_tokens=500, generated_tokens=20))
    assert progress.rates == (50.0, 2.0)


def test_rates_forget_what_was_more_than_a_minute_ago() -> None:
    progress = Progress(100, 0, 0.0)
    for second in range(0, 201, 10):
        # Prompts are read in the first minute only.
        progress.update(float(second), Counts(prompt_tokens=min(second, 60) * 7, generated_tokens=second * 3))
    assert progress.rates == pytest.approx((0.0, 3.0))


def test_passes_longer_than_a_minute_have_rates_too() -> None:
    progress = Progress(100, 0, 0.0)
    for number in range(1, 20):
        progress.update(number * 100.0, Counts(generated_tokens=number * 50))
    assert progress.rates[1] == pytest.approx(0.5)


def test_the_time_left_counts_what_is_under_way_and_not_what_was_done_before() -> None:
    progress = Progress(total=110, earlier=10, now=0.0)
    assert progress.seconds_left is None
    progress.update(100.0, Counts(running=4.0))
    assert progress.seconds_left == pytest.approx(2400)
    progress.update(200.0, Counts(sequences=20, running=5.0))
    assert progress.seconds_left == pytest.approx(600)
    progress.update(900.0, Counts(sequences=100))
    assert progress.seconds_left == 0


def test_the_line_says_how_many_how_fast_and_how_long() -> None:
    progress = Progress(total=200, earlier=12, now=0.0)
    progress.update(10.0, Counts(sequences=8, prompt_tokens=1000, generated_tokens=250))
    assert progress.line() == "20/200 sequences  prefill 100, decode 25 tokens/s  3 min 45 s left"
