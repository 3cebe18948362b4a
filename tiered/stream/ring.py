"""The ring: a bounded stretch of memory that streamed blocks pass through, first in, first out.

Blocks differ in size, so there are no fixed slots: a block takes one end of a gap, the one that leaves the most room
in one piece once the oldest block has gone. Two blocks then lie at opposite ends of the ring, so any two that are not
larger than it together do fit, whatever came before. Going round in address order would leave holes before a large one.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tiered.store import PAGE
from tiered.units import round_up


@dataclass(frozen=True, eq=False)
class RingSpan:
    """Bytes [start, stop) of the ring, lent to one block."""

    start: int
    stop: int


class Ring:
    """Lends contiguous spans in order; they come back in the same order. For one event loop, not thread-safe."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._lent: deque[RingSpan] = deque()
        self._freed = asyncio.Event()

    @property
    def in_use(self) -> int:
        """Bytes lent now."""
        return sum(span.stop - span.start for span in self._lent)

    async def borrow(self, nbytes: int) -> RingSpan:
        """Wait until `nbytes` contiguous bytes are free, and lend them. For one task at a time."""
        wanted = round_up(nbytes, PAGE)
        assert wanted <= self._nbytes, f"a block of {wanted} bytes in a ring of {self._nbytes}"
        while (start := self._find(wanted)) is None:
            self._freed.clear()
            await self._freed.wait()
        span = RingSpan(start, start + wanted)
        self._lent.append(span)
        return span

    def release(self, span: RingSpan) -> None:
        """Take back the oldest span."""
        assert self._lent and self._lent[0] is span, "ring spans come back in the order they were lent"
        self._lent.popleft()
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
