"""The pace of prompts beside decoding: a pass stays near what it takes without them, and newcomers always get on."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered.plan.pace import LEAST, SLACK, Pace


def compute(rows: int, fixed: float = 0.1, each: float = 0.002) -> float:
    return fixed + each * rows


def learnt(disk: float, decoding: int = 4, fixed: float = 0.1, each: float = 0.002) -> Pace:
    """What a pace knows after a prompt's pass, the first to read all, and a few without."""
    pace = Pace()
    pace.note(0, 500, compute(500, fixed, each), 5 * disk + 0.01)
    for _ in range(6):
        pace.note(decoding, 0, compute(decoding, fixed, each), disk)
    return pace


def test_before_anything_is_known_the_least_passes() -> None:
    assert Pace().prompt_tokens(3) == LEAST


def test_where_the_disk_takes_longer_prompts_compute_in_its_time() -> None:
    pace = learnt(disk=2.0)
    tokens = pace.prompt_tokens(4)
    assert compute(4 + tokens) <= SLACK * 2.0 + 0.1
    assert tokens > 900


def test_where_computing_takes_longer_a_quarter_of_it_is_left() -> None:
    pace = learnt(disk=0.01, fixed=1.0, each=0.001)
    tokens = pace.prompt_tokens(4)
    assert compute(4 + tokens, 1.0, 0.001) <= SLACK * compute(4, 1.0, 0.001)
    assert LEAST < tokens < 260


def test_a_slow_machine_still_takes_the_least() -> None:
    assert learnt(disk=0.01, fixed=0.0, each=0.1).prompt_tokens(4) == LEAST


@given(
    disk=st.floats(0.01, 5),
    fixed=st.floats(0.001, 2),
    each=st.floats(0.0001, 0.05),
    decoding=st.integers(1, 64),
)
def test_whatever_the_machine_it_settles_within_the_bound(
    disk: float, fixed: float, each: float, decoding: int
) -> None:
    pace = learnt(disk, decoding, fixed, each)
    for _ in range(12):
        tokens = pace.prompt_tokens(decoding)
        pace.note(decoding, tokens, compute(decoding + tokens, fixed, each), disk)
    tokens = pace.prompt_tokens(decoding)
    bound = SLACK * max(disk, compute(decoding, fixed, each))
    assert tokens == LEAST or compute(decoding + tokens, fixed, each) <= bound * 1.02


def test_fewer_rows_that_decode_are_not_given_the_time_of_many() -> None:
    pace = learnt(disk=0.01, decoding=256, fixed=1.0, each=0.01)
    for _ in range(5):
        tokens = pace.prompt_tokens(2)
        pace.note(2, tokens, compute(2 + tokens, 1.0, 0.01), 0.01)
        assert tokens == LEAST  # 0.64 s, more than a quarter of 1.02 s


def test_short_prompts_do_not_decide_what_long_ones_get() -> None:
    pace, expected = learnt(disk=2.0), learnt(disk=2.0).prompt_tokens(4)
    for noise in (-0.03, 0.03, -0.03, 0.02) * 5:
        pace.note(4, 5, compute(9) + noise, 2.0)
    assert pace.prompt_tokens(4) == expected


def test_what_is_learnt_from_few_tokens_is_not_believed_of_many() -> None:
    pace = Pace()
    pace.note(0, 10, 0.1, 9.0)
    pace.note(2, 0, 0.1, 2.0)
    seen = []
    for _ in range(8):
        seen.append(pace.prompt_tokens(2))
        pace.note(2, seen[-1], compute(2 + seen[-1]), 2.0)
    assert all(later <= 2 * max(before, LEAST) for before, later in pairwise(seen))
    assert compute(2 + seen[-1]) == pytest.approx(SLACK * 2.0, rel=0.1)


def test_the_first_pass_reads_all_and_says_nothing_of_the_others() -> None:
    pace = Pace()
    pace.note(0, 500, compute(500), 30.0)
    assert compute(2 + pace.prompt_tokens(2)) < 1.0


def test_pages_that_prompts_read_are_not_taken_for_the_disk() -> None:
    pace = learnt(disk=0.5)
    for piece in range(10):
        pace.note(4, 200, compute(204), 0.5 + piece)
    assert compute(4 + pace.prompt_tokens(4)) <= SLACK * 0.5


def test_rates_measured_beforehand_serve_until_passes_have_been_seen() -> None:
    pace = Pace(lambda rows: 0.5 + 0.001 * rows)
    assert pace.prompt_tokens(10) == pytest.approx(0.25 * 0.51 / 0.001, abs=1)
    pace.note(10, 100, 0.5 + 0.001 * 10 + 100 * 0.01, 0.1)
    assert pace.prompt_tokens(10) == LEAST


def learns(bus_seconds: float | None, bus: float, decoding: int = 4) -> Pace:
    """What a pace knows after a first pass and passes without prompts, where these need next to nothing and weights
    take `bus` seconds to a device that computes prompts."""
    pace = Pace(bus_seconds=bus_seconds)
    pace.note(0, 500, compute(500), 0.0, stalled=3 * bus)
    for _ in range(6):
        pace.note(decoding, 0, compute(decoding), 0.0)
    return pace


def test_prompts_compute_while_weights_cross_the_bus() -> None:
    tokens = learns(2.0, 2.0).prompt_tokens(4)
    assert tokens > 900
    assert compute(4 + tokens) <= SLACK * 2.0 + 0.1


@pytest.mark.parametrize("bus", [0.02, 2.0])
def test_how_long_the_bus_takes_is_learnt(bus: float) -> None:
    pace = learns(None, bus)
    assert pace.prompt_tokens(4) == LEAST  # the first pass also copied what stays
    for _ in range(12):
        tokens = pace.prompt_tokens(4)
        seconds = compute(4 + tokens)
        pace.note(4, tokens, seconds, 0.0, stalled=max(0.0, bus - seconds))
    bound = SLACK * max(bus, compute(4))
    assert tokens == LEAST or 0.7 * bound < compute(4 + tokens) <= 1.02 * bound
    assert tokens > 900 or bus < 1


def test_a_known_bus_is_not_learnt_anew() -> None:
    pace = learns(2.0, 2.0)
    for _ in range(3):
        pace.note(4, 900, compute(904), 0.0, stalled=50.0)
    assert compute(4 + pace.prompt_tokens(4)) <= 1.02 * SLACK * 2.0
