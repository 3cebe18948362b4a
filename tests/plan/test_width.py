"""How wide a batch runs: most tokens per second, by hand-made machines."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered.plan.width import WidthOption, candidates, choose_width

GB = 10**9


def options(most: int, weights: int, kv: int, room: int, on_disk: bool = False) -> list[WidthOption]:
    """A model of `weights` bytes in `room` bytes of memory, where a sequence's cache takes `kv`."""
    found = []
    for count in candidates(most):
        if on_disk:
            found.append(WidthOption(count, True, weights - room + count * kv))
        elif count * kv <= room:
            found.append(WidthOption(count, False, weights - room + count * kv))
    return found


def test_while_the_disk_is_the_bound_all_sequences_share_a_pass() -> None:
    width = choose_width(options(64, 10 * GB, 1 << 20, GB), 2e9, lambda rows: 0.01 * rows)
    assert width is not None
    assert (width.option.sequences, width.bottleneck) == (64, "disk")
    assert width.tokens_per_second == pytest.approx(64 / 4.53, rel=0.01)


def test_a_batch_is_no_wider_than_what_computing_gains_from() -> None:
    # Beyond 8 sequences a pass takes proportionally longer.
    width = choose_width(options(64, 10 * GB, 0, GB), 2e9, lambda rows: 4.5 * rows / 8)
    assert width is not None
    assert width.option.sequences == 8


def test_a_cache_that_takes_the_room_of_weights_is_weighed_against_them() -> None:
    # Everything is resident without a cache: each sequence makes the disk slower than its token is worth.
    resident = options(64, 10 * GB, GB // 2, 10 * GB)
    width = choose_width(resident, 1e9, lambda rows: 0.2 + 0.01 * rows)
    assert width is not None
    rates = {o.sequences: o.sequences / max(o.disk_nbytes / 1e9, 0.2 + 0.01 * o.sequences) for o in resident}
    assert rates[width.option.sequences] * 1.02 >= max(rates.values())


def test_of_equal_ways_memory_is_taken_before_disk() -> None:
    both = [WidthOption(4, False, GB), WidthOption(4, True, GB)]
    width = choose_width(both, 1e9, lambda rows: 0.1)
    assert width is not None and not width.option.kv_on_disk


def test_a_cache_on_disk_is_used_where_memory_holds_too_few_sequences() -> None:
    kv, weights, room = GB // 10, 10 * GB, GB
    both = options(64, weights, kv, room) + options(64, weights, kv, room, on_disk=True)
    width = choose_width(both, 2e9, lambda rows: 0.01 * rows)
    assert width is not None and width.option.kv_on_disk and width.option.sequences == 64


def test_without_options_there_is_no_choice() -> None:
    assert choose_width([], 1e9, lambda rows: 1.0) is None


def test_where_nothing_is_read_only_computing_counts() -> None:
    width = choose_width(options(16, GB, 0, GB), None, lambda rows: 1.0)
    assert width is not None
    assert (width.option.sequences, width.bottleneck) == (16, "compute")


@given(st.integers(1, 5000))
def test_candidates_ascend_from_one_to_all(most: int) -> None:
    found = candidates(most)
    assert found[0] == 1 and found[-1] == most and found == sorted(set(found))
    assert all(later <= 2 * earlier for earlier, later in pairwise(found))
