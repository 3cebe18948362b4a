"""The pace of prompts beside decoding: a pass stays near what it takes without them, and newcomers always get on."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plan.plans import model_of
from tiered.plan import Budgets, Machine, Tier, Workload, make_plan
from tiered.plan.hardware import GpuRates
from tiered.plan.pace import LEAST, SLACK, Copies, Pace, pace_for
from tiered.units import GIB, MIB


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


def copying(bus: float, waited: float = 0.0, rate: float | None = 1e9, decoding: int = 4) -> Pace:
    """What a pace knows after a first pass and passes without prompts, which need next to nothing, while weights take
    `bus` seconds to a device that computes prompts, and others `waited`, for which that waits."""
    pace = Pace(copies=Copies(int(bus * 1e9), int(waited * 1e9), rate))
    pace.note(0, 500, compute(500), 0.0, int(5e9), 5.0)
    for _ in range(6):
        pace.note(decoding, 0, compute(decoding), 0.0)
    return pace


@pytest.mark.parametrize("rate", [1e9, None])
def test_prompts_compute_while_weights_cross_the_bus(rate: float | None) -> None:
    tokens = copying(2.0, rate=rate).prompt_tokens(4)
    assert tokens > 900 and compute(4 + tokens) <= SLACK * 2.0 + 0.1
    assert copying(0.02, rate=rate).prompt_tokens(4) == LEAST


def test_what_computing_waits_for_lengthens_a_pass_by_a_quarter_of_it_at_most() -> None:
    tokens = copying(0.5, waited=4.0).prompt_tokens(4)
    assert 0.95 < (compute(4 + tokens) + 4.0) / (SLACK * 4.5) <= 1.02


def test_a_bus_that_becomes_faster_or_slower_is_learnt_at_once_unless_it_is_known() -> None:
    learning, knowing = copying(2.0, rate=None), copying(2.0)
    before = knowing.prompt_tokens(4)
    for pace in (learning, knowing):
        pace.note(4, 900, compute(904), 0.0, int(2e9), 0.2)
    assert learning.prompt_tokens(4) < 1.2 * LEAST
    assert knowing.prompt_tokens(4) >= before


def test_rows_that_decode_slowly_do_not_pass_for_a_slow_bus() -> None:
    pace = copying(0.05, rate=None, decoding=256)
    for _ in range(5):
        pace.note(256, 64, compute(320) + 5, 0.0, int(5e7), 0.05)
    assert pace.prompt_tokens(2) == LEAST


@pytest.mark.parametrize("rate", [4e9, None])
def test_a_plan_for_a_device_paces_by_what_it_copies(rate: float | None) -> None:
    model = model_of([100 * MIB] * 20)
    budgets = Budgets(4 * GIB, 0, tuple(Tier), vram=GIB, decode_device="cpu")
    plan = make_plan(model, Machine(MIB), Workload(8, 512, 400, max_batched_tokens=4096), budgets)
    pace = pace_for(plan, model, None if rate is None else GpuRates("", GIB, rate, rate, 1e12, 1e14), None)
    pace.note(0, 3000, 1.0, 0.0)
    pace.note(8, 0, 0.001, 0.0)
    assert plan.bus_nbytes == 2000 * MIB
    expected = SLACK * plan.bus_nbytes / 4e9 * 3000
    if rate is None:
        assert pace.prompt_tokens(8) == LEAST  # nothing has said how fast it is copied to
        pace.note(8, 64, 0.02, 0.0, plan.bus_nbytes, plan.bus_nbytes / 4e9)
    assert pace.prompt_tokens(8) == pytest.approx(expected, rel=0.05)
