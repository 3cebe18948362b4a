"""Which more units fit in memory beside a full ring: pure functions of sizes, called by `placement.py`.

A tape may have 12,000 units, and hundreds of placements are compared. So what is streamed beside a set of resident
units is found out once (`Streamed`) for all placements that begin with it, and then only what changes.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from heapq import heapify, heappop, heapreplace
from itertools import accumulate, compress
from operator import add, mul, sub

Kinds = Sequence[Mapping[int, tuple[int, Sequence[int]]]]
"""For each kind of units, which are alike in bytes, and each block that has any: the block's first unit, and the
offsets of these from it."""


def kinds_of(nbytes: Sequence[int], file_nbytes: Sequence[int], blocks: Sequence[range]) -> Kinds:
    """Kinds of units, in the order in which `fill` adds them."""
    kinds: dict[tuple[int, int], dict[int, tuple[int, Sequence[int]]]] = {}
    # Most blocks are alike.
    patterns: dict[tuple[Sequence[int], Sequence[int]], dict[tuple[int, int], list[int]]] = {}
    for number, block in enumerate(blocks):
        sizes = tuple(nbytes[block.start : block.stop]), tuple(file_nbytes[block.start : block.stop])
        if sizes not in patterns:
            patterns[sizes] = {}
            for place, kind in enumerate(zip(*sizes, strict=True)):
                patterns[sizes].setdefault(kind, []).append(place)
        for kind, places in patterns[sizes].items():
            kinds.setdefault(kind, {})[number] = block.start, places
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
        units = dict[int, Iterator[int]]()
        # The block with most bytes to read is the first one.
        order = [(-left.unread[number], number) for number in kind]
        heapify(order)
        while order:
            number = order[0][1]
            if number not in units:
                start, places = kind[number]
                units[number] = map(start.__add__, places)
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


def mask_without(count: int, units: Iterable[int]) -> bytearray:
    """A byte for each of `count` units: 0 for those in `units`, 1 for the others."""
    mask = bytearray(b"\1") * count
    for unit in units:
        mask[unit] = 0
    return mask


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
        left = mask_without(len(nbytes), resident)
        sizes = list(compress(nbytes, left))
        # Units that are streamed before each unit, and bytes before each of those.
        counts, before = list(accumulate(left, initial=0)), list(accumulate(sizes, initial=0))

        def sums(firsts: Iterable[int]) -> list[int]:
            at = [before[counts[first]] for first in firsts] + before[-1:]
            return list(map(sub, at[1:], at))

        self.nbytes = before[-1]
        """Bytes of all that is streamed."""
        self.total = sum(nbytes)
        self._block_starts = [block.start for block in blocks]
        self.unread = sums(self._block_starts)
        """Bytes that are streamed of each block."""
        self._starts = starts
        """Of every piece, even if none of its units is streamed."""
        self._sums = list(map(mul, nbytes, left)) if len(starts) == len(nbytes) else sums(starts)
        """Bytes that are streamed of each piece."""
        streamed = list(filter(None, self._sums))
        firsts = streamed
        if len(starts) != len(nbytes):
            firsts = [sizes[counts[start]] for start, size in zip(starts, self._sums, strict=True) if size]
        self._pairs = Counter(map(add, streamed, firsts[1:] + firsts[:1]))
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
