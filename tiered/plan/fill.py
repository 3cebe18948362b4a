"""Which more units fit in memory beside a full ring: pure functions of sizes, called by `placement.py`.

Of the ring only what changes is computed anew, as a tape may have 12,000 units and many placements are compared.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence


def fill(
    sizes: Sequence[tuple[int, int]],
    blocks: Sequence[range],
    pieces: Sequence[range],
    resident: frozenset[int],
    ring_of: Callable[[int, int], int],
    fits: Callable[[int, int], bool],
) -> tuple[frozenset[int], int, int]:
    """Add units to `resident` until none fits: first those that save most bytes per byte held, then the largest; of
    equal ones that of the block with most bytes to read. Gives them, their bytes, and those of the ring beside them.

    `sizes` are bytes in memory and in the file of each unit; `pieces` are units that are in memory together. `ring_of`
    tells the ring by bytes of a full one and of all that is streamed; `fits` whether resident bytes and a ring do.
    """
    streamed = _Streamed([size for size, _ in sizes], pieces, resident)
    held, nbytes = set(resident), sum(sizes[unit][0] for unit in resident)
    total = sum(size for size, _ in sizes)
    ring = ring_of(streamed.full_ring, total - nbytes)
    unread = [sum(sizes[unit][0] for unit in block if unit not in resident) for block in blocks]
    kinds: dict[tuple[float, int], dict[int, list[int]]] = {}
    for number, block in enumerate(blocks):
        for unit in reversed(block):
            if unit not in resident:
                size, saved = sizes[unit]
                kinds.setdefault((saved / size, size), {}).setdefault(number, []).append(unit)
    for (_, size), left in sorted(kinds.items(), reverse=True):
        while left:
            number = max(left, key=unread.__getitem__)
            put_back = streamed.take(left[number][-1])
            ring_after = ring_of(streamed.full_ring, total - nbytes - size)
            if not fits(nbytes + size, ring_after):
                put_back()
                break
            held.add(left[number].pop())
            if not left[number]:
                del left[number]
            unread[number] -= size
            nbytes, ring = nbytes + size, ring_after
    return frozenset(held), nbytes, ring


class _Streamed:
    """The pieces that pass through the ring, as their units become resident one after the other."""

    def __init__(self, nbytes: Sequence[int], pieces: Sequence[range], resident: Iterable[int]) -> None:
        resident = frozenset(resident)
        self._nbytes = nbytes
        self._pieces = [kept for piece in pieces if (kept := [unit for unit in piece if unit not in resident])]
        self._number_of = {unit: number for number, piece in enumerate(self._pieces) for unit in piece}
        self._sums = [sum(map(nbytes.__getitem__, piece)) for piece in self._pieces]
        count = len(self._pieces)
        self._after = {number: (number + 1) % count for number in range(count)}
        self._before = {after: number for number, after in self._after.items()}
        self._pairs = Counter(map(self._pair, self._after))

    @property
    def full_ring(self) -> int:
        """Bytes for any piece and the unit after it, on the cyclic tape."""
        return max(self._pairs, default=0)

    def take(self, unit: int) -> Callable[[], None]:
        """`unit` becomes resident. Called at once, what is returned undoes that."""
        number = self._number_of.pop(unit)
        before, after = self._before[number], self._after[number]
        self._count(-1, {before, number})
        place = self._pieces[number].index(unit)
        del self._pieces[number][place]
        self._sums[number] -= self._nbytes[unit]
        if not self._pieces[number]:
            del self._after[number], self._before[number]
            if before != number:
                self._after[before], self._before[after] = after, before
        self._count(1, {before, number} & self._after.keys())

        def put_back() -> None:
            self._count(-1, {before, number} & self._after.keys())
            self._number_of[unit] = number
            self._pieces[number].insert(place, unit)
            self._sums[number] += self._nbytes[unit]
            self._after[before], self._before[after] = number, number
            self._after[number], self._before[number] = after, before
            self._count(1, {before, number})

        return put_back

    def _pair(self, number: int) -> int:
        """Bytes of a piece and of the unit after it."""
        return self._sums[number] + self._nbytes[self._pieces[self._after[number]][0]]

    def _count(self, by: int, numbers: Iterable[int]) -> None:
        for pair in map(self._pair, numbers):
            self._pairs[pair] += by
            if not self._pairs[pair]:
                del self._pairs[pair]
