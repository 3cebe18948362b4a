"""The ring: a bounded stretch of memory that what is streamed passes through.

Units of weights come in an order that is known for ever, so where each of them goes is known too:
`plan/order.py: ring_starts` says.
The KV cache's blocks come in sizes that a pass decides; the ring itself finds a gap for them.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tiered.store import PAGE
from tiered.units import round_up


@dataclass(frozen=True, eq=False)
class RingSpan:
    """Bytes [start, stop) of the ring, lent for one thing."""

    start: int
    stop: int


class Ring:
    """Lends contiguous spans. For one event loop, not thread-safe."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._lent: deque[RingSpan] = deque()
        """In the order in which they were lent."""
        self._freed = asyncio.Event()

    @property
    def in_use(self) -> int:
        """Bytes lent now."""
        return sum(span.stop - span.start for span in self._lent)

    def borrow_at(self, start: int, nbytes: int) -> RingSpan | None:
        """Lend `nbytes` from `start`; None while any of them is lent."""
        wanted = RingSpan(start, start + nbytes)
        assert start >= 0 and wanted.stop <= self._nbytes, f"bytes {start} to {wanted.stop} of a ring of {self._nbytes}"
        if any(span.start < wanted.stop and wanted.start < span.stop for span in self._lent):
            return None
        self._lent.append(wanted)
        return wanted

    async def borrow(self, nbytes: int) -> RingSpan:
        """Wait until `nbytes` contiguous bytes are free, and lend them. For one task at a time.

        Takes the end of a gap that leaves the most room in one piece once the oldest span has come back. Two spans then
        lie at opposite ends of the ring, so any two that are not larger than it together do fit, whatever came before.
        """
        wanted = round_up(nbytes, PAGE)
        assert wanted <= self._nbytes, f"a block of {wanted} bytes in a ring of {self._nbytes}"
        while (start := self._find(wanted)) is None:
            self._freed.clear()
            await self._freed.wait()
        span = RingSpan(start, start + wanted)
        self._lent.append(span)
        return span

    def release(self, span: RingSpan) -> None:
        """Take back a span."""
        self._lent.remove(span)
        self._freed.set()

    def _find(self, wanted: int) -> int | None:
        """Where to put `wanted` bytes, or None while no gap is large enough."""
        ends = (start for low, high in self._gaps(self._lent) if high - low >= wanted for start in (low, high - wanted))
        return max(ends, key=lambda start: self._room_after(start, wanted), default=None)

    def _room_after(self, start: int, wanted: int) -> int:
        """The largest gap once the oldest span has been released, if [start, start + wanted) is taken now."""
        later = [*list(self._lent)[1:], RingSpan(start, start + wanted)]
        return max((high - low for low, high in self._gaps(later)), default=0)

    def _gaps(self, spans: Iterable[RingSpan]) -> Iterator[tuple[int, int]]:
        """The free stretches between `spans`, ascending."""
        position = 0
        for span in sorted(spans, key=lambda span: span.start):
            if span.start > position:
                yield position, span.start
            position = span.stop
        if position < self._nbytes:
            yield position, self._nbytes
