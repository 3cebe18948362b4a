"""Which more units fit in memory beside a full ring: pure functions of sizes, called by `placement.py`.

A tape may have 12,000 units, and hundreds of placements are compared. So what is streamed beside a set of resident
units is found out once (`Streamed`) for all placements that begin with it, and then only what changes.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from heapq import heapify, heappop, heapreplace
from itertools import pairwise
from operator import add

Kinds = Sequence[Mapping[int, Sequence[int]]]
"""Units that are alike in bytes, by the numbers of their blocks."""


def kinds_of(nbytes: Sequence[int], file_nbytes: Sequence[int], blocks: Sequence[range]) -> Kinds:
    """Kinds of units, in the order in which `fill` adds them."""
    kinds: dict[tuple[int, int], dict[int, list[int]]] = {}
    for number, block in enumerate(blocks):
        for unit in block:
            kinds.setdefault((nbytes[unit], file_nbytes[unit]), {}).setdefault(number, []).append(unit)
    # Those that save most bytes per byte held, then the largest.
    return [kinds[kind] for kind in sorted(kinds, key=lambda kind: (kind[1] / kind[0], kind[0]), reverse=True)]


def fill(
    streamed: "Streamed",
    kinds: Kinds,
    ring_of: Callable[[int, int], int],
    fits: Callable[[int, int], bool],
) -> tuple[frozenset[int], int, int]:
    """Add units to those that are resident until none fits: first those that save most bytes per byte held, then the
    largest; of equal ones that of the block with most bytes to read. Gives them all, their bytes, and those of the ring
    beside them.

    `ring_of` tells the ring by bytes of a full one and of all that is
    streamed; `fits` whether resident bytes and a ring do.
    """
    left = copy(streamed)
    ring = ring_of(left.full_ring, left.nbytes)
    resident = streamed.resident
    for kind in kinds:
        units = {number: iter(alike) for number, alike in kind.items()}
        # The block with most bytes to read is the first one.
        order = [(-left.unread[number], number) for number in units]
        heapify(order)
        while order:
            number = order[0][1]
            for unit in units[number]:
                if unit not in resident:
                    break
            else:
                heappop(order)
                continue
            left.flip(unit)
            ring_after = ring_of(left.full_ring, left.nbytes)
            if not fits(left.total - left.nbytes, ring_after):
                left.flip(unit)
                break
            heapreplace(order, (-left.unread[number], number))
            ring = ring_after
    return streamed.resident | left.taken, left.total - left.nbytes, ring


class Streamed:
    """What passes through the ring beside `resident` units. Copies are cheap, and changed one unit after the other.

    `nbytes` are those of each unit in memory; `starts` are the first units of pieces, which are in memory together.
    """

    def __init__(
        self, nbytes: Sequence[int], blocks: Sequence[range], starts: Sequence[int], resident: frozenset[int]
    ) -> None:
        self.resident = resident
        self.taken: set[int] = set()
        """Units that have become resident since."""
        self.sizes, self.blocks = nbytes, blocks
        units = [unit for unit in range(len(nbytes)) if unit not in resident]
        sizes = [nbytes[unit] for unit in units]
        self.nbytes = sum(sizes)
        """Bytes of all that is streamed."""
        self.total = sum(nbytes)
        cuts = [bisect_left(units, block.start) for block in blocks] + [len(units)]
        self.unread = [sum(sizes[start:stop]) for start, stop in pairwise(cuts)]
        """Bytes that are streamed of each block."""
        self._block_starts = [block.start for block in blocks]
        self._starts = starts
        """Of every piece, even if none of its units is streamed."""
        self._sums, firsts = list(nbytes), sizes
        """Bytes that are streamed of each piece."""
        if len(starts) == len(nbytes):
            for unit in resident:
                self._sums[unit] = 0
            sums = sizes
        else:
            cuts = [bisect_left(units, start) for start in starts] + [len(units)]
            self._sums = [sum(sizes[start:stop]) for start, stop in pairwise(cuts)]
            sums = [nbytes for nbytes in self._sums if nbytes]
            firsts = [sizes[start] for start, nbytes in zip(cuts, self._sums, strict=False) if nbytes]
        self._pairs = Counter(map(add, sums, firsts[1:] + firsts[:1]))
        """Bytes of each piece and of the unit after it, and how often they occur."""

    def __copy__(self) -> "Streamed":
        other = object.__new__(Streamed)
        other.__dict__ |= self.__dict__
        other.taken, other.unread = set(self.taken), list(self.unread)
        other._sums, other._pairs = list(self._sums), Counter(self._pairs)
        return other

    @property
    def largest(self) -> int:
        """Bytes of the largest piece: with a smaller ring a pass cannot run at all."""
        return max(self._sums, default=0)

    @property
    def full_ring(self) -> int:
        """Bytes for any piece and the unit after it, on the cyclic tape."""
        return max(self._pairs, default=0)

    def flip(self, unit: int) -> None:
        """`unit` becomes resident, or, if it has become so before, is streamed again."""
        piece, size = bisect_right(self._starts, unit) - 1, self.sizes[unit]
        changed = {piece, self._next(piece, -1)}
        self._count(-1, changed)
        if unit in self.taken:
            self.taken.remove(unit)
        else:
            self.taken.add(unit)
            size = -size
        self._sums[piece] += size
        self.nbytes += size
        self.unread[bisect_right(self._block_starts, unit) - 1] += size
        self._count(1, changed)

    def _next(self, piece: int, step: int = 1) -> int:
        """The next piece of which something is streamed, or, with a `step` of -1, the last one before it."""
        count, other = len(self._sums), (piece + step) % len(self._sums)
        while other != piece and not self._sums[other]:
            other = (other + step) % count
        return other

    def _count(self, by: int, pieces: Iterable[int]) -> None:
        for piece in pieces:
            if self._sums[piece]:
                pair = self._sums[piece] + self.sizes[self._first(self._next(piece))]
                self._pairs[pair] += by
                if not self._pairs[pair]:
                    del self._pairs[pair]

    def _first(self, piece: int) -> int:
        """The first unit of `piece` that is streamed."""
        unit = self._starts[piece]
        while unit in self.resident or unit in self.taken:
            unit += 1
        return unit
