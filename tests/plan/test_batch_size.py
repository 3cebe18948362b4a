"""How many sequences at once are compared, and how many windows are scored in a pass: those that read fewest bytes."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered.plan.batch_size import candidates, choose_windows_per_pass, even_candidates


@given(st.integers(1, 5000))
def test_candidates_ascend_from_one_to_all(most: int) -> None:
    found = candidates(most)
    assert found[0] == 1 and found[-1] == most and found == sorted(set(found))
    assert all(later <= 2 * earlier for earlier, later in pairwise(found))


@given(st.integers(1, 5000), st.integers(1, 600))
def test_waves_of_a_job_are_about_equal(sequences: int, most: int) -> None:
    found = even_candidates(sequences, most)
    assert found[0] == 1 and found[-1] <= min(most, sequences) and found == sorted(set(found))
    for count in candidates(min(sequences, most)):
        waves = -(-sequences // count)
        # Some candidate takes as many waves, with no more sequences at once than that needs.
        assert any(-(-sequences // each) == waves and (each - 1) * waves < sequences for each in found)


# Windows that are scored share a pass where that spares the disk, and not where it only takes memory.

STORE = 1000


def reads(free: int, each: int) -> dict[int, int | None]:
    """Bytes a pass reads with so many windows, of which each takes memory that weights could have."""
    left = {count: free - count * each for count in range(1, 2000)}
    return {count: max(0, STORE - most) if most >= 0 else None for count, most in left.items()}


def test_many_windows_share_a_pass_of_a_model_that_does_not_fit() -> None:
    assert choose_windows_per_pass(reads(free=500, each=1).get, windows=12, context=1024) == 12


def test_windows_that_cost_more_weights_than_they_spare_are_left_out() -> None:
    # After the first pass, which reads everything: seven of 90, three of 100, or two of 300.
    table = {1: 90, 2: 100, 3: 300}
    assert choose_windows_per_pass(table.get, windows=8, context=1024) == 2
    assert choose_windows_per_pass(table.get, windows=8, context=16) == 2


def test_one_pass_is_best_wherever_it_fits() -> None:
    assert choose_windows_per_pass({1: 1, 2: 1, 3: 999}.get, windows=3, context=1024) == 3


def test_with_all_weights_in_memory_windows_are_few_but_not_tiny() -> None:
    assert choose_windows_per_pass(lambda _: 0, windows=50, context=2048) == 1
    assert choose_windows_per_pass(lambda _: 0, windows=50, context=128) == 4


def test_a_pass_is_never_longer_than_any_disk_needs() -> None:
    assert choose_windows_per_pass(lambda _: STORE, windows=10_000, context=2048) == 8


def test_passes_are_about_equal() -> None:
    table = {count: STORE if count <= 8 else None for count in range(1, 11)}
    assert choose_windows_per_pass(table.get, windows=10, context=512) == 5


def test_where_nothing_fits_the_plan_of_one_window_tells() -> None:
    assert choose_windows_per_pass(lambda _: None, windows=10, context=512) == 1


@given(windows=st.integers(1, 300), context=st.integers(1, 4096), free=st.integers(1, 1500), each=st.integers(1, 40))
def test_the_choice_fits_and_no_pass_is_empty(windows: int, context: int, free: int, each: int) -> None:
    table = reads(free, each)
    found = choose_windows_per_pass(table.get, windows, context)
    assert 1 <= found <= windows
    assert found == 1 or table[found] is not None


@pytest.mark.parametrize("windows", [1, 2, 7, 100])
def test_fewer_bytes_are_read_than_by_one_window_at_a_time(windows: int) -> None:
    table = reads(free=600, each=3)
    found = choose_windows_per_pass(table.get, windows, 1024)
    alone, together = table[1], table[found]
    assert alone is not None and together is not None
    assert (-(-windows // found) - 1) * together <= (windows - 1) * alone
