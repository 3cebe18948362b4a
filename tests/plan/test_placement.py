"""Placements: within the memory, evenly spread, never worse with more; and rings that hold what they must."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plan.plans import tape_of
from tiered.plan import Held, Tape, full_ring, interleave, place
from tiered.plan.fill import Streamed, fill, kinds_of
from tiered.plan.placement import UNHELD, smallest_ring

SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=24)
HELD = st.builds(Held, st.booleans(), st.booleans())


@st.composite
def tapes(draw: st.DrawFn) -> Tape:
    """Blocks of five units at most, each of which may be compressed; some blocks may have none left."""
    counts = draw(st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any))
    units = draw(st.lists(st.integers(1, 1000), min_size=sum(counts), max_size=sum(counts)))
    return tape_of(units, [draw(st.integers(1, nbytes)) for nbytes in units], counts)


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


@given(tapes(), st.integers(1, 60_000), HELD)
def test_the_ring_beside_resident_units_is_a_full_one_of_the_others(tape: Tape, available: int, held: Held) -> None:
    placement = place(tape, available, held)
    if placement is not None and placement.resident:
        pieces = tape.streamed(held, placement.resident)
        assert placement.ring_nbytes == min(full_ring(pieces), sum(map(sum, pieces)))
        assert placement.resident_nbytes == tape.total - sum(map(sum, pieces))


@given(tapes(), st.integers(0, 60_000), HELD)
def test_a_placement_never_takes_more_than_there_is(tape: Tape, available: int, held: Held) -> None:
    placement = place(tape, available, held)
    if placement is not None:
        assert placement.nbytes == placement.resident_nbytes + placement.ring_nbytes <= available
        assert placement.resident_nbytes == sum(tape.nbytes[i] for i in placement.resident)


@given(tapes(), st.integers(-100, 60_000), HELD)
def test_there_is_a_placement_exactly_where_the_largest_piece_fits(tape: Tape, available: int, held: Held) -> None:
    assert (place(tape, available, held) is None) == (available < smallest_ring(tape.streamed(held)))


@given(tapes(), st.integers(0, 60_000), HELD)
def test_the_ring_holds_every_streamed_piece_and_the_unit_after_it_if_anything_is_resident(
    tape: Tape, available: int, held: Held
) -> None:
    placement = place(tape, available, held)
    if placement is not None:
        left = tape.streamed(held, placement.resident)
        assert (placement.ring_nbytes == 0) == (not left)
        assert placement.ring_nbytes >= smallest_ring(left)
        if placement.resident and left:
            assert placement.ring_nbytes >= full_ring(left)


@given(tapes(), st.integers(0, 60_000), HELD)
def test_less_is_left_over_than_any_unit_takes(tape: Tape, available: int, held: Held) -> None:
    placement = place(tape, available, held)
    if placement is not None and placement.ring_nbytes >= full_ring(tape.streamed(held, placement.resident)):
        for unit in set(range(len(tape.nbytes))) - placement.resident:
            more = placement.resident | {unit}
            taken = sum(tape.nbytes[i] for i in more) + full_ring(tape.streamed(held, more))
            assert taken > available or len(more) == len(tape.nbytes)


@given(tapes(), st.integers(0, 6_000), HELD, st.data())
def test_what_best_saves_reading_is_added_where_most_is_left_to_read(
    tape: Tape, available: int, held: Held, data: st.DataObject
) -> None:
    first = interleave(data.draw(st.integers(0, len(tape.nbytes))), len(tape.nbytes))
    streamed = Streamed(tape.nbytes, tape.blocks, [piece.start for piece in tape.pieces(held)], first)
    sizes = list(zip(tape.nbytes, tape.file_nbytes, strict=True))
    expected, left = first, set(zip(sizes, _blocks_of(tape), range(len(sizes)), strict=True))

    def taken(resident: frozenset[int]) -> int:
        return tape.nbytes_of(resident) + full_ring(tape.streamed(held, resident))

    for size, saved in sorted(set(sizes), key=lambda kind: (kind[1] / kind[0], kind[0]), reverse=True):
        while alike := [(block, unit) for kind, block, unit in left if kind == (size, saved) and unit not in expected]:
            unread = [tape.nbytes_of(frozenset(block) - expected) for block in tape.blocks]
            _, unit = min(alike, key=lambda each: (-unread[each[0]], each))
            if taken(expected | {unit}) > available:
                break
            expected |= {unit}
    for _ in range(2):  # what is kept for the next placement has not changed
        filled = fill(
            streamed,
            kinds_of(tape.nbytes, tape.file_nbytes, tape.blocks),
            lambda full, _: full,
            lambda nbytes, ring: nbytes + ring <= available,
        )
        assert filled == (expected, tape.nbytes_of(expected), full_ring(tape.streamed(held, expected)))


def _blocks_of(tape: Tape) -> list[int]:
    """The block of each unit, by its number."""
    return [number for number, block in enumerate(tape.blocks) for _ in block]


@given(SIZES, st.integers(0, 30_000), st.integers(0, 3_000))
def test_more_memory_never_streams_more_by_a_unit(sizes: list[int], available: int, more: int) -> None:
    less, greater = place(tape_of(sizes), available), place(tape_of(sizes), available + more)
    if less is not None:
        assert greater is not None
        assert greater.resident_nbytes > less.resident_nbytes - max(sizes)


@given(st.integers(1, 1000), st.integers(1, 40), st.integers(0, 30_000))
def test_equal_units_are_evenly_spread(nbytes: int, count: int, available: int) -> None:
    placement = place(tape_of([nbytes] * count), available)
    if placement is not None:
        assert placement.resident == interleave(len(placement.resident), count)


@given(st.lists(st.integers(1, 300), min_size=2, max_size=6), st.integers(8, 30), st.floats(0.1, 0.9))
def test_equal_layers_have_as_much_to_read_as_each_other_to_a_unit_or_two(
    layer: list[int], count: int, share: float
) -> None:
    tape = tape_of(layer * count, counts=[len(layer)] * count)
    placement = place(tape, int(tape.total * share))
    if placement is not None:
        unread = [sum(tape.nbytes[i] for i in block if i not in placement.resident) for block in tape.blocks]
        halves = sum(unread[: count // 2]) / (count // 2), sum(unread[-(count // 2) :]) / (count // 2)
        assert abs(halves[0] - halves[1]) <= 2 * max(layer)


@given(tapes())
def test_where_all_fits_nothing_is_streamed(tape: Tape) -> None:
    placement = place(tape, tape.total)
    assert placement is not None
    assert placement.resident == frozenset(range(len(tape.nbytes)))
    assert (placement.ring_nbytes, placement.nbytes) == (0, tape.total)


def test_a_ring_is_two_neighbours_on_the_cyclic_tape() -> None:
    assert full_ring([[5], [1], [2], [4]]) == 9  # the last unit is followed by the first
    assert full_ring([[1], [5], [2]]) == 7
    assert full_ring([[3]]) == 6
    assert smallest_ring([[5], [1], [2], [4]]) == 5


def test_a_layer_that_is_held_shares_the_ring_with_one_unit_of_the_next() -> None:
    tape = tape_of([3, 1, 2, 3, 1, 2, 4, 4], counts=(3, 3, 2))
    assert tape.streamed(Held(layers=True)) == [[3, 1, 2], [3, 1, 2], [4], [4]]
    assert full_ring(tape.streamed(Held(layers=True))) == 6 + 4
    assert full_ring(tape.streamed(Held(layers=True, head=True))) == 8 + 3
    assert full_ring(tape.streamed(UNHELD)) == 8
    # What is resident of a layer is no part of what the ring must hold.
    assert tape.streamed(Held(layers=True, head=True), frozenset((0, 4, 6, 7))) == [[1, 2], [3, 2]]


@pytest.mark.parametrize(("available", "resident"), [(10, 0), (20, 0), (29, 0), (30, 1), (99, 7), (100, 10)])
def test_equal_units_fill_what_two_leave(available: int, resident: int) -> None:
    placement = place(tape_of([10] * 10), available)
    assert placement is not None and len(placement.resident) == resident


def test_a_large_head_may_be_what_stays() -> None:
    placement = place(tape_of([10, 10, 10, 100]), 120)
    assert placement is not None and placement.resident == {3} and placement.ring_nbytes == 20


def test_what_is_left_goes_to_units_that_fit() -> None:
    # A layer is 40 and 10 and 10: with 125 no second large unit fits beside a ring of 80.
    placement = place(tape_of([40, 10, 10] * 3, counts=[3] * 3), 125)
    assert placement is not None and placement.nbytes > 115
    assert [unit for unit in placement.resident if unit % 3 == 0] in ([], [0], [3], [6])


def test_units_that_save_more_than_they_hold_come_first() -> None:
    # Twelve of equal size; half of them are compressed on disk.
    tape = tape_of([10] * 12, [4, 10] * 6)
    placement = place(tape, 39)
    assert placement is not None and all(tape.file_nbytes[unit] == 10 for unit in placement.resident)


@pytest.mark.slow
def test_large_tapes_are_placed_in_no_time() -> None:
    tape = tape_of([14, 14, 14, 14, 57, 57] * 500, counts=[6] * 500)
    for held, available in itertools.product((UNHELD, Held(True, True)), range(200, tape.total, tape.total // 20)):
        placement = place(tape, available, held)
        assert placement is not None and available - placement.nbytes < 57
