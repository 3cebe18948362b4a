"""The order of reading: every unit in turn, residents with memory of their own; places in the ring that units have for
good keep apart what must be in memory together."""

from itertools import islice, pairwise

from hypothesis import given
from hypothesis import strategies as st

from tests.plan.plans import tape_of
from tiered.plan import Held, full_ring
from tiered.plan.order import feed_order, ring_starts
from tiered.plan.placement import UNHELD, smallest_ring
from tiered.units import PAGE


@st.composite
def pieces(draw: st.DrawFn) -> list[list[int]]:
    """What is streamed of some tape, in pages: layers that are held or not, and a head."""
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    units = draw(st.lists(st.integers(1, 20), min_size=sum(counts), max_size=sum(counts)))
    resident = draw(st.frozensets(st.integers(0, len(units) - 1), max_size=len(units) - 1))
    return tape_of(units, counts=counts).streamed(Held(draw(st.booleans()), draw(st.booleans())), resident)


@given(pieces(), st.integers(0, 80))
def test_a_piece_and_the_unit_after_it_never_overlap_in_a_full_ring(pieces: list[list[int]], more: int) -> None:
    nbytes = full_ring(pieces) + more
    check_starts(pieces, nbytes, is_full=True)


@given(pieces(), st.data())
def test_a_piece_never_overlaps_itself_in_the_smallest_ring(pieces: list[list[int]], data: st.DataObject) -> None:
    nbytes = data.draw(st.integers(smallest_ring(pieces), full_ring(pieces)))
    check_starts(pieces, nbytes, is_full=False)


def check_starts(pieces: list[list[int]], nbytes: int, is_full: bool) -> None:
    rounds = [*pieces * 4, pieces[0]]
    starts = ring_starts(pieces, nbytes)
    places = [[(start, start + size) for size, start in zip(piece, starts, strict=False)] for piece in rounds]
    for piece, following in pairwise(places):
        together = sorted([*piece, *(following[:1] if is_full else [])])
        assert together[0][0] >= 0 and together[-1][1] <= nbytes
        assert all(a[1] <= b[0] for a, b in pairwise(together))


def test_memory_is_used_in_turn_so_that_much_is_read_ahead() -> None:
    # Four small units and two large ones, two of which fill the ring: each place is free again soon.
    layer = [14, 14, 14, 14, 57, 57]
    starts = list(islice(ring_starts([[size] for size in layer], 114), 18))
    assert starts == [0, 14, 28, 42, 57, 0, 57, 71, 85, 100, 0, 57, 0, 14, 28, 42, 57, 0]


def test_a_layer_that_fills_the_ring_begins_where_the_one_before_has_left_room() -> None:
    starts = list(islice(ring_starts([[2, 3, 4]], 11), 9))
    assert starts == [2, 4, 7, 0, 2, 5, 9, 2, 5]


def test_the_feed_goes_round_and_round_and_residents_have_no_place_in_the_ring() -> None:
    tape = tape_of([PAGE] * 3)
    turns = list(islice(feed_order(tape, UNHELD, frozenset({1}), 2 * PAGE), 7))
    assert [(turn.number, turn.passed, turn.position) for turn in turns] == [
        (number, number // 3, number % 3) for number in range(7)
    ]
    assert [turn.start for turn in turns] == [0, None, PAGE, 0, None, PAGE, 0]


def test_what_is_resident_as_a_whole_is_read_in_the_first_pass_only() -> None:
    turns = feed_order(tape_of([PAGE] * 3), UNHELD, frozenset(range(3)), 0)
    assert [turn.position for turn in turns] == [0, 1, 2]
