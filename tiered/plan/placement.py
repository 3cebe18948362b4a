"""Which units stay in memory and how large the ring for the others is: pure functions of sizes.

Layers are visited in a cycle, so keeping a fixed set and streaming the rest reads S - M per pass, the least any
policy can (Belady, "A study of replacement algorithms for a virtual-storage computer", 1966); an LRU would hit
almost never. The set is spread evenly through the depth so that the disk never idles while a run of resident
units computes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, compress, pairwise
from operator import add
from typing import Final

from tiered.plan.fill import Kinds, Streamed, fill, kinds_of, mask_without

_SPREADS: Final = 128
"""How many numbers of resident units are compared: all of them on a tape that has no more units."""


@dataclass(frozen=True)
class Held:
    """What is in memory as a whole while it computes, because several micro-batches use it one after the other; and how
    far reading goes ahead of that."""

    layers: bool = False
    head: bool = False
    ahead_nbytes: int = 0
    """Bytes of the ring beyond a full one, where there is room, so that reading goes on while a unit takes longer to
    compute than others do."""


UNHELD: Final = Held()


@dataclass(frozen=True)
class Tape:
    """The units of one pass in the order of use, as numbers."""

    nbytes: tuple[int, ...]
    """Bytes of each unit in memory."""
    file_nbytes: tuple[int, ...]
    """Bytes that reading each unit takes, which are fewer where it is compressed."""
    counts: tuple[int, ...]
    """Units of each block; the last block is the head."""

    def __hash__(self) -> int:
        # What is found out about a tape is kept by it, and it may have 12,000 units.
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.nbytes, self.file_nbytes, self.counts))

    @cached_property
    def units(self) -> frozenset[int]:
        """The numbers of all."""
        return frozenset(range(len(self.nbytes)))

    @cached_property
    def total(self) -> int:
        """Bytes of all units in memory."""
        return sum(self.nbytes)

    @cached_property
    def file_total(self) -> int:
        """Bytes that reading all units takes."""
        return sum(self.file_nbytes)

    @cached_property
    def _is_plain(self) -> bool:
        """Whether files hold units as they are in memory."""
        return self.nbytes == self.file_nbytes

    @cached_property
    def most_packed(self) -> float:
        """Bytes of its file that a byte of any unit in memory stands for, at most."""
        pairs = zip(self.file_nbytes, self.nbytes, strict=True)
        return max((file / nbytes for file, nbytes in pairs if nbytes), default=1.0)

    @cached_property
    def blocks(self) -> tuple[range, ...]:
        """The units of each block, by their numbers."""
        return tuple(range(start, stop) for start, stop in pairwise(accumulate(self.counts, initial=0)))

    def without(self, units: frozenset[int]) -> "Tape":
        """The tape of the other units, in the same blocks, some of which may have none left. Its unit i is the i-th
        number of `numbers_without(units)` on this one."""
        return _without(self, units)[0] if units else self

    def numbers_without(self, units: frozenset[int]) -> tuple[int, ...]:
        """The numbers of all other units, in order."""
        return _without(self, units)[1]

    def full_ring(self, held: Held, resident: frozenset[int] = frozenset()) -> int:
        """Bytes of a full ring for all units that are not resident."""
        return _full_ring(self, replace(held, ahead_nbytes=0), resident)

    def smallest_ring(self, held: Held) -> int:
        """Bytes of the largest piece: with a smaller ring a pass cannot run at all."""
        return _smallest_ring(self, replace(held, ahead_nbytes=0))

    def nbytes_of(self, units: frozenset[int]) -> int:
        """Bytes of these units in memory."""
        return sum(map(self.nbytes.__getitem__, units))

    def file_nbytes_of(self, units: frozenset[int], nbytes: int) -> int:
        """Bytes that reading these units takes, which have `nbytes` bytes in memory."""
        return nbytes if self._is_plain else sum(map(self.file_nbytes.__getitem__, units))

    def pieces(self, held: Held) -> tuple[range, ...]:
        """Units that are in memory together, in order: those of a block that is held, else each by itself."""
        return tuple(piece for number, block in enumerate(self.blocks) for piece in self._cut(number, block, held))

    def _cut(self, number: int, block: range, held: Held) -> Iterator[range]:
        if held.head if number == len(self.counts) - 1 else held.layers:
            if block:
                yield block
        else:
            yield from (range(unit, unit + 1) for unit in block)

    def streamed(self, held: Held, resident: frozenset[int] = frozenset()) -> list[list[int]]:
        """Bytes of the units of each piece that are not resident; pieces without any are left out."""
        if held.layers:
            sizes = ([self.nbytes[unit] for unit in piece if unit not in resident] for piece in self.pieces(held))
            return [piece for piece in sizes if piece]
        # A store may have 12,000 units: each is a piece, without ranges.
        head = self.blocks[-1]
        alone = head.start if held.head else head.stop
        pieces = [[nbytes] for unit, nbytes in enumerate(self.nbytes[:alone]) if unit not in resident]
        last = [self.nbytes[unit] for unit in range(alone, head.stop) if unit not in resident]
        return [*pieces, last] if last else pieces


@lru_cache(maxsize=64)
def _without(tape: Tape, units: frozenset[int]) -> tuple[Tape, tuple[int, ...]]:
    """The tape of the other units, and their numbers: many plans leave the same ones out."""
    kept = mask_without(len(tape.nbytes), units)
    counts = tuple(kept.count(1, block.start, block.stop) for block in tape.blocks)
    nbytes, file_nbytes, numbers = (
        tuple(compress(each, kept)) for each in (tape.nbytes, tape.file_nbytes, range(len(kept)))
    )
    return Tape(nbytes, file_nbytes, counts), numbers


@lru_cache(maxsize=256)
def _full_ring(tape: Tape, held: Held, resident: frozenset[int]) -> int:
    return Streamed(tape.nbytes, tape.blocks, _starts(tape, held), resident).full_ring


@lru_cache(maxsize=32)
def _streamed(tape: Tape, held: Held, resident: frozenset[int]) -> Streamed:
    """What is streamed beside `resident` units: many placements begin with the same ones."""
    return Streamed(tape.nbytes, tape.blocks, _starts(tape, held), resident)


@lru_cache(maxsize=32)
def _kinds(tape: Tape) -> Kinds:
    return kinds_of(tape.nbytes, tape.file_nbytes, tape.blocks)


@lru_cache(maxsize=32)
def _starts(tape: Tape, held: Held) -> Sequence[int]:
    """The first unit of each piece."""
    return [piece.start for piece in tape.pieces(held)] if held.layers or held.head else range(len(tape.nbytes))


@lru_cache(maxsize=32)
def _smallest_ring(tape: Tape, held: Held) -> int:
    return _streamed(tape, held, frozenset()).largest


@dataclass(frozen=True)
class Placement:
    """Where every unit of the tape lives, by its number."""

    resident: frozenset[int]
    resident_nbytes: int
    ring_nbytes: int
    """Memory through which all other units pass; 0 where there are none."""
    is_wished: bool = False
    """Whether as many bytes were to be resident as somebody has wished for, however many fit."""

    @property
    def nbytes(self) -> int:
        return self.resident_nbytes + self.ring_nbytes


@lru_cache(maxsize=16)
def interleave(count: int, of: int) -> frozenset[int]:
    """`count` of `of` positions, spread evenly: i is in where floor((i + 1) f) > floor(i f), f = count / of."""
    # The least i with (i + 1) f >= k, for each k: a tape may have 12,000 units, and many spreads are compared.
    return frozenset([last // count for last in range(of - 1, count * of, of)])


def smallest_ring(pieces: Sequence[Sequence[int]]) -> int:
    """Bytes of the largest piece: with a smaller ring a pass cannot run at all."""
    return max(map(sum, pieces), default=0)


def full_ring(pieces: Sequence[Sequence[int]]) -> int:
    """Bytes for any piece that computes and the unit after it, which is read meanwhile, on the cyclic tape."""
    firsts = [piece[0] for piece in pieces]
    return max(map(add, map(sum, pieces), firsts[1:] + firsts[:1]), default=0)


@lru_cache(maxsize=256)
def place(
    tape: Tape, available: int, held: Held = UNHELD, least_ring: int = 0, most: int | None = None
) -> Placement | None:
    """The placement of `tape` in `available` bytes that reads least, or None if none fits.

    Residency never takes the ring below a full one, because a smaller one reads and computes in turn. Reading further
    ahead is given up where no unit could be resident otherwise. The ring has `least_ring` bytes at least, whatever is
    streamed; resident units take `most` bytes at most.
    """
    most = tape.total if most is None else most
    if tape.total <= most and tape.total + least_ring <= available:
        return Placement(tape.units, tape.total, least_ring)
    # What is read ahead differs from batch size to batch size, the spreads do not.
    least = replace(held, ahead_nbytes=0)
    if max(_smallest_ring(tape, least), least_ring) > available:
        return None
    spreads = _spreads(tape, least)
    for wanted in dict.fromkeys((held, least)):
        room = _Room(tape, wanted, available, least_ring, most)
        best = spreads.best(room)
        if best is not None:
            placement = _fill(room, best.units)
            if placement.resident:
                return placement
    return Placement(frozenset(), 0, min(available, _Room(tape, held, available, least_ring, most).wanted_ring()))


def wished(tape: Tape, available: int, held: Held, nbytes: int, least_ring: int = 0) -> Placement | None:
    """The placement of `tape` in which as many units are resident as `nbytes` bytes hold, whatever more there is; None
    if those, beside a full ring, do not fit in `available` bytes."""
    # With room for all of it beside any ring, `nbytes` alone decides.
    unlimited = 3 * tape.total + least_ring
    found = place(tape, unlimited, replace(held, ahead_nbytes=0), least_ring, nbytes)
    assert found is not None
    if not found.resident:
        placed = place(tape, available, held, least_ring, nbytes)
        return None if placed is None else replace(placed, is_wished=True)
    if found.nbytes > available:
        return None
    ahead = _Room(tape, held, available, least_ring, nbytes).wanted_ring(found.resident)
    return replace(found, ring_nbytes=min(available - found.resident_nbytes, ahead), is_wished=True)


@dataclass(frozen=True)
class _Spread:
    """So many resident units of a tape, spread evenly."""

    tape: Tape
    held: Held
    count: int

    @property
    def units(self) -> frozenset[int]:
        return interleave(self.count, len(self.tape.nbytes))

    @cached_property
    def nbytes(self) -> int:
        return self.tape.nbytes_of(self.units)

    @cached_property
    def saved_nbytes(self) -> int:
        """Bytes that a pass need not read."""
        return self.tape.file_nbytes_of(self.units, self.nbytes)

    @cached_property
    def full_ring_nbytes(self) -> int:
        return _streamed(self.tape, self.held, self.units).full_ring


@dataclass(frozen=True)
class _Room:
    """What a placement may take."""

    tape: Tape
    held: Held
    available: int
    least_ring: int
    most: int
    """Bytes of resident units."""

    def ring(self, spread: _Spread) -> int:
        """Bytes of the ring beside `spread`."""
        return self.ring_of(spread.full_ring_nbytes, self.tape.total - spread.nbytes)

    def wanted_ring(self, resident: frozenset[int] = frozenset()) -> int:
        """Bytes of the ring beside `resident`."""
        return self.ring_of(self.tape.full_ring(self.held, resident), self.tape.total - self.tape.nbytes_of(resident))

    def ring_of(self, full: int, streamed: int) -> int:
        """A full ring, and what is to be read ahead beyond it: half as much at most, and not more than is streamed."""
        return max(full, min(full + min(self.held.ahead_nbytes, full // 2), streamed), self.least_ring)

    def holds(self, nbytes: int, ring: int) -> bool:
        """Whether resident units of `nbytes` bytes fit beside a ring of `ring`."""
        return nbytes <= self.most and nbytes + ring <= self.available


class _Spreads:
    """Spreads to choose from. More units are not always more bytes (units differ), so the choice is by bytes."""

    def __init__(self, tape: Tape, held: Held) -> None:
        units = len(tape.nbytes)
        self._tape, self._held = tape, held
        self._counts = sorted(
            {number * units // _SPREADS for number in range(_SPREADS)} if units > _SPREADS else range(units)
        )
        self._least = list(accumulate(sorted(tape.nbytes), initial=0))
        """Bytes that so many units take at least."""
        self._most_saved = list(accumulate(sorted(tape.file_nbytes, reverse=True), initial=0))
        """Bytes that so many units save at most."""
        self._found: dict[int, _Spread] = {}

    def best(self, room: _Room) -> _Spread | None:
        """The one that saves most of those that fit; of equal ones that of fewest units. None where none fits."""
        best: _Spread | None = None
        for count in reversed(self._counts):
            if best is not None and self._most_saved[count] < best.saved_nbytes:
                break
            if not room.holds(self._least[count], room.least_ring):
                continue
            spread = self._spread(count)
            saves_most = best is None or spread.saved_nbytes >= best.saved_nbytes
            # How large a ring is wanted takes longer to find out.
            if (
                saves_most
                and room.holds(spread.nbytes, room.least_ring)
                and room.holds(spread.nbytes, room.ring(spread))
            ):
                best = spread
        return best

    def _spread(self, count: int) -> _Spread:
        if count not in self._found:
            self._found[count] = _Spread(self._tape, self._held, count)
        return self._found[count]


@lru_cache(maxsize=32)
def _spreads(tape: Tape, held: Held) -> _Spreads:
    """The same for every room: what it has found is kept."""
    return _Spreads(tape, held)


def _fill(room: _Room, resident: frozenset[int]) -> Placement:
    """Add units to `resident` until none fits beside a full ring."""
    streamed = _streamed(room.tape, replace(room.held, ahead_nbytes=0), resident)
    return Placement(*fill(streamed, _kinds(room.tape), room.ring_of, room.holds))
