"""The pace of prompts beside decoding: a pass stays near what it takes without them, and newcomers always get on."""

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


def test_rates_measured_beforehand_serve_until_passes_have_been_seen() -> None:
    pace = Pace(lambda rows: 0.5 + 0.001 * rows)
    assert pace.prompt_tokens(10) == pytest.approx(0.25 * 0.51 / 0.001, abs=1)
    pace.note(10, 100, 0.5 + 0.001 * 10 + 100 * 0.01, 0.1)
    assert pace.prompt_tokens(10) == LEAST
