"""The ring: a bounded stretch of memory that streamed blocks pass through, first in, first out.

Blocks differ in size, so there are no fixed slots: a block takes the next contiguous bytes, or the start of the
ring where the end is too short, and waits while they are still in use.
"""

import asyncio
from collections import deque
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
        self._freed = asyncio.Condition()

    @property
    def in_use(self) -> int:
        """Bytes lent now."""
        return sum(span.stop - span.start for span in self._lent)

    async def borrow(self, nbytes: int) -> RingSpan:
        """Wait until `nbytes` contiguous bytes are free, and lend them."""
        wanted = round_up(nbytes, PAGE)
        assert wanted <= self._nbytes, f"a block of {wanted} bytes in a ring of {self._nbytes}"
        async with self._freed:
            while (start := self._find(wanted)) is None:
                await self._freed.wait()
            span = RingSpan(start, start + wanted)
            self._lent.append(span)
            return span

    async def release(self, span: RingSpan) -> None:
        """Take back the oldest span."""
        async with self._freed:
            assert self._lent and self._lent[0] is span, "ring spans come back in the order they were lent"
            self._lent.popleft()
            self._freed.notify_all()

    def _find(self, wanted: int) -> int | None:
        if not self._lent:
            return 0
        oldest, newest = self._lent[0].start, self._lent[-1].stop
        if self._lent[-1].start >= oldest:  # not wrapped: free are [newest, end) and [0, oldest)
            if newest + wanted <= self._nbytes:
                return newest
            return 0 if wanted <= oldest else None
        return newest if newest + wanted <= oldest else None
