"""How many sequences run at once: most tokens per second, or fewest bytes read, by hand-made machines."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered.plan.batch_size import (
    BatchOption,
    candidates,
    choose_batch_size,
    choose_windows_per_pass,
    even_candidates,
)

GB = 10**9


def options(most: int, weights: int, kv: int, room: int, on_disk: bool = False) -> list[BatchOption]:
    """A model of `weights` bytes in `room` bytes of memory, where a sequence's cache takes `kv`."""
    found = []
    for count in candidates(most):
        if on_disk:
            found.append(BatchOption(count, True, weights - room + count * kv))
        elif count * kv <= room:
            found.append(BatchOption(count, False, weights - room + count * kv))
    return found


def test_while_the_disk_is_the_bound_all_sequences_share_a_pass() -> None:
    choice = choose_batch_size(options(64, 10 * GB, 1 << 20, GB), 2e9, lambda rows: 0.01 * rows)
    assert choice is not None
    assert (choice.option.sequences, choice.bottleneck) == (64, "disk")
    assert choice.tokens_per_second == pytest.approx(64 / 4.53, rel=0.01)


def test_a_batch_is_no_larger_than_what_computing_gains_from() -> None:
    # Beyond 8 sequences a pass takes proportionally longer.
    choice = choose_batch_size(options(64, 10 * GB, 0, GB), 2e9, lambda rows: 4.5 * rows / 8)
    assert choice is not None
    assert choice.option.sequences == 8


def test_a_cache_that_takes_the_room_of_weights_is_weighed_against_them() -> None:
    # Everything is resident without a cache: each sequence makes the disk slower than its token is worth.
    resident = options(64, 10 * GB, GB // 2, 10 * GB)
    choice = choose_batch_size(resident, 1e9, lambda rows: 0.2 + 0.01 * rows)
    assert choice is not None
    rates = {o.sequences: o.sequences / max(o.disk_nbytes / 1e9, 0.2 + 0.01 * o.sequences) for o in resident}
    assert rates[choice.option.sequences] * 1.02 >= max(rates.values())


def test_of_equal_ways_memory_is_taken_before_disk() -> None:
    both = [BatchOption(4, False, GB), BatchOption(4, True, GB)]
    choice = choose_batch_size(both, 1e9, lambda rows: 0.1)
    assert choice is not None and not choice.option.kv_on_disk


def test_a_cache_on_disk_is_used_where_memory_holds_too_few_sequences() -> None:
    kv, weights, room = GB // 10, 10 * GB, GB
    both = options(64, weights, kv, room) + options(64, weights, kv, room, on_disk=True)
    choice = choose_batch_size(both, 2e9, lambda rows: 0.01 * rows)
    assert choice is not None and choice.option.kv_on_disk and choice.option.sequences == 64


def test_experts_that_are_waited_for_take_their_time_beside_computing() -> None:
    waited, ahead = BatchOption(4, False, GB, expert_nbytes=GB), BatchOption(4, False, GB)
    choice = choose_batch_size([waited, ahead], 1e9, lambda rows: 1.0)
    assert choice is not None and choice.option == ahead and choice.pass_seconds == 1
    choice = choose_batch_size([waited], 1e9, lambda rows: 1.0)
    assert choice is not None and choice.pass_seconds == 2


def test_without_options_there_is_no_choice() -> None:
    assert choose_batch_size([], 1e9, lambda rows: 1.0) is None


def test_where_nothing_is_read_only_computing_counts() -> None:
    choice = choose_batch_size(options(16, GB, 0, GB), None, lambda rows: 1.0)
    assert choice is not None
    assert (choice.option.sequences, choice.bottleneck) == (16, "compute")


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


def test_a_last_wave_that_is_nearly_empty_counts_as_a_whole_one() -> None:
    sizes = [BatchOption(count, False, GB) for count in (50, 96, 100)]
    for sequences, chosen in ((100, 100), (96, 96), (None, 100)):
        choice = choose_batch_size(sizes, 1e9, lambda rows: 0.001, sequences=sequences)
        assert choice is not None and choice.option.sequences == chosen
    choice = choose_batch_size(sizes[:2], 1e9, lambda rows: 0.001, sequences=100)
    assert choice is not None and choice.option.sequences == 50


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
