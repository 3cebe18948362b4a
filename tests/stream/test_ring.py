"""The ring: spans never overlap, and a request that fits at all is served in the end."""

import asyncio
from collections import deque
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.waiting import SECONDS
from tiered.store import PAGE
from tiered.stream import Ring
from tiered.stream.ring import RingSpan


def run(scenario: object) -> None:
    asyncio.run(asyncio.wait_for(scenario, SECONDS))  # type: ignore[arg-type]


@st.composite
def requests(draw: st.DrawFn) -> tuple[int, list[int]]:
    """A ring's size in pages and blocks of at most that size."""
    pages = draw(st.integers(1, 20))
    return pages, draw(st.lists(st.integers(1, pages), min_size=1, max_size=30))


@settings(deadline=None)
@given(requests(), st.lists(st.booleans(), max_size=60))
def test_blocks_in_order_never_overlap_and_never_wait_for_ever(case: tuple[int, list[int]], eager: list[bool]) -> None:
    pages, sizes = case

    async def scenario() -> None:
        ring = Ring(pages * PAGE)
        lent: deque[RingSpan] = deque()
        decisions = deque(eager)
        for size in sizes:
            borrowing = asyncio.ensure_future(ring.borrow(size * PAGE))
            await asyncio.sleep(0)
            # The consumer gives back some early, and whatever must come back for the request to be served.
            while lent and ((decisions and decisions.popleft()) or not borrowing.done()):
                ring.release(lent.popleft())
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            span = await asyncio.wait_for(borrowing, SECONDS)
            lent.append(span)
            assert span.start % PAGE == 0 and span.stop - span.start == size * PAGE
            assert 0 <= span.start < span.stop <= pages * PAGE
            spans = sorted((s.start, s.stop) for s in lent)
            assert all(a[1] <= b[0] for a, b in pairwise(spans))
            assert ring.in_use == sum(s.stop - s.start for s in lent)
        while lent:
            ring.release(lent.popleft())
        assert ring.in_use == 0

    run(scenario())


def test_a_request_waits_until_its_bytes_are_free() -> None:
    async def scenario() -> None:
        ring = Ring(3 * PAGE)
        first, _ = await ring.borrow(PAGE), await ring.borrow(PAGE)
        waiting = asyncio.ensure_future(ring.borrow(2 * PAGE))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        ring.release(first)
        assert (await waiting).start == 0  # the second lies at the other end

    run(scenario())


@pytest.mark.parametrize(("layers", "layer", "head"), [(24, 10, 16), (40, 17, 27), (12, 7, 39), (5, 3, 3)])
def test_any_two_neighbours_on_the_tape_are_in_the_ring_together(layers: int, layer: int, head: int) -> None:
    async def scenario() -> None:
        ring = Ring((layer + max(layer, head)) * PAGE)
        sizes = [*[layer] * layers, head] * 4
        previous = await ring.borrow(sizes[0] * PAGE)
        for size in sizes[1:]:
            # At once, while the block before it is still being computed.
            span = await asyncio.wait_for(ring.borrow(size * PAGE), 0.01)
            ring.release(previous)
            previous = span

    run(scenario())


def test_equal_blocks_pass_two_by_two() -> None:
    async def scenario() -> None:
        ring = Ring(2 * PAGE)
        spans = deque([await ring.borrow(PAGE)])
        for _ in range(10):
            spans.append(await ring.borrow(PAGE))  # while the one before is still in use
            ring.release(spans.popleft())

    run(scenario())


def test_bytes_are_lent_as_whole_pages() -> None:
    async def scenario() -> None:
        span = await Ring(2 * PAGE).borrow(PAGE + 1)
        assert (span.start, span.stop) == (0, 2 * PAGE)

    run(scenario())


def test_a_block_larger_than_the_ring_is_a_bug_that_shows() -> None:
    async def scenario() -> None:
        with pytest.raises(AssertionError, match="a block of 8192 bytes in a ring of 4096"):
            await Ring(PAGE).borrow(2 * PAGE)

    run(scenario())


def test_a_cancelled_request_takes_nothing() -> None:
    async def scenario() -> None:
        ring = Ring(PAGE)
        span = await ring.borrow(PAGE)
        waiting = asyncio.ensure_future(ring.borrow(PAGE))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait([waiting])
        ring.release(span)
        assert ring.in_use == 0
        await ring.borrow(PAGE)

    run(scenario())


def test_places_are_lent_while_they_are_free() -> None:
    ring = Ring(3 * PAGE)
    first, second = ring.borrow_at(0, PAGE), ring.borrow_at(PAGE, PAGE)
    assert first is not None and second is not None
    assert ring.borrow_at(0, 3 * PAGE) is None and ring.borrow_at(PAGE, PAGE) is None
    ring.release(first)  # in any order
    assert ring.borrow_at(0, PAGE) is not None and ring.in_use == 2 * PAGE
    with pytest.raises(AssertionError, match="of a ring of"):
        ring.borrow_at(PAGE, 3 * PAGE)
