"""Placements: within the memory, evenly spread, never worse with more."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered.plan import interleave, place
from tiered.plan.placement import full_ring, smallest_ring

SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=24)


def streamed(sizes: list[int], resident: frozenset[int]) -> list[int]:
    return [nbytes for i, nbytes in enumerate(sizes) if i not in resident]


@given(st.integers(0, 60), st.integers(1, 60))
def test_the_spread_is_that_of_the_formula(count: int, of: int) -> None:
    count = min(count, of)
    found = interleave(count, of)
    assert len(found) == count
    for i in range(of):
        assert (i in found) == (math.floor((i + 1) * count / of + 1e-9) > math.floor(i * count / of + 1e-9))


@given(st.integers(1, 60), st.integers(1, 60))
def test_gaps_of_the_spread_differ_by_one_at_most(count: int, of: int) -> None:
    positions = sorted(interleave(min(count, of), of))
    gaps = [b - a for a, b in zip(positions, [*positions[1:], positions[0] + of], strict=True)]
    assert max(gaps) - min(gaps) <= 1


@given(SIZES, st.integers(0, 30_000))
def test_a_placement_never_takes_more_than_there_is(sizes: list[int], available: int) -> None:
    placement = place(sizes, available)
    if placement is not None:
        assert placement.nbytes == placement.resident_nbytes + placement.ring_nbytes <= available
        assert placement.resident_nbytes == sum(sizes[i] for i in placement.resident)


@given(SIZES, st.integers(-100, 30_000))
def test_there_is_a_placement_exactly_where_the_largest_block_fits(sizes: list[int], available: int) -> None:
    assert (place(sizes, available) is None) == (available < max(sizes))


@given(SIZES, st.integers(0, 30_000))
def test_residents_are_evenly_spread(sizes: list[int], available: int) -> None:
    placement = place(sizes, available)
    if placement is not None:
        assert placement.resident == interleave(len(placement.resident), len(sizes))


@given(SIZES, st.integers(0, 30_000))
def test_the_ring_holds_every_streamed_block(sizes: list[int], available: int) -> None:
    placement = place(sizes, available)
    if placement is not None:
        left = streamed(sizes, placement.resident)
        assert (placement.ring_nbytes == 0) == (not left)
        assert placement.ring_nbytes >= max(left, default=0)
        if placement.resident and left:
            assert placement.ring_nbytes >= full_ring(left)


@given(SIZES, st.integers(0, 30_000), st.integers(0, 3_000))
def test_more_memory_never_streams_more(sizes: list[int], available: int, more: int) -> None:
    less, greater = place(sizes, available), place(sizes, available + more)
    if less is not None:
        assert greater is not None
        assert greater.resident_nbytes >= less.resident_nbytes


@given(SIZES)
def test_where_all_fits_nothing_is_streamed(sizes: list[int]) -> None:
    placement = place(sizes, sum(sizes))
    assert placement is not None
    assert placement.resident == frozenset(range(len(sizes)))
    assert (placement.ring_nbytes, placement.nbytes) == (0, sum(sizes))


def test_a_ring_is_two_neighbours_on_the_cyclic_tape() -> None:
    assert full_ring([5, 1, 2, 4]) == 9  # the last block is followed by the first
    assert full_ring([1, 5, 2]) == 7
    assert full_ring([3]) == 6
    assert smallest_ring([5, 1, 2, 4]) == 5


@pytest.mark.parametrize(("available", "resident"), [(10, 0), (20, 0), (29, 0), (30, 1), (99, 7), (100, 10)])
def test_equal_blocks_fill_what_two_leave(available: int, resident: int) -> None:
    placement = place([10] * 10, available)
    assert placement is not None and len(placement.resident) == resident


def test_a_large_head_may_be_what_stays() -> None:
    placement = place([10, 10, 10, 100], 120)
    assert placement is not None and placement.resident == {3} and placement.ring_nbytes == 20
