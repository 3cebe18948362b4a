"""The order in which a tape's units are read, for ever, and where in the ring each of them goes.

Pure functions of sizes, which the feed (`stream/feed.py`) and the simulator walk through.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tiered.plan.placement import Held, Tape
from tiered.units import PAGE, round_down


@dataclass(frozen=True)
class Reading:
    """One unit's turn to be read."""

    number: int
    """On the endless tape: it goes on counting from pass to pass."""
    passed: int
    """Number of the pass that uses it."""
    position: int
    """On the tape."""
    start: int | None
    """Byte of the ring where it goes; None: it is resident, and once it has been read there is nothing to do."""


def feed_order(tape: Tape, held: Held, resident: frozenset[int], ring_nbytes: int) -> Iterator[Reading]:
    """The turns of all units, pass after pass; they end with the first pass where every unit is `resident`."""
    pieces = tape.streamed(held, resident)
    starts = ring_starts(pieces, round_down(ring_nbytes, PAGE))
    for number in itertools.count():
        passed, position = divmod(number, len(tape.nbytes))
        if passed and not pieces:
            return
        yield Reading(number, passed, position, None if position in resident else next(starts))


def ring_starts(pieces: Sequence[Sequence[int]], nbytes: int) -> Iterator[int]:
    """Where units go in a ring of `nbytes` bytes, without end: the start of each unit of each piece, again and again.

    `pieces` are the sizes of units that are in memory together. The units of a piece never overlap if the ring holds
    the largest piece, and the unit after it does not overlap them either if the ring is a full one
    (`plan/placement.py`). Otherwise memory is used again in the order in which it was first used, so that much can be
    read ahead: pieces follow each other, and the last one before the ring's end lies against it. A piece that has the
    whole ring but for one unit begins there, at the end, and goes on where the piece before it began.
    """
    begin = end = 0
    for number in itertools.count():
        piece, following = pieces[number % len(pieces)], pieces[(number + 1) % len(pieces)]
        size = sum(piece)
        starts = list(itertools.accumulate(piece, initial=0))[:-1]
        if end + size <= nbytes:
            begin = end if end + size + sum(following) <= nbytes else nbytes - size
        elif begin == 0:
            begin = nbytes - size
            starts = [size - piece[0], *(start - piece[0] for start in starts[1:])]
        else:
            begin = 0
        yield from (begin + start for start in starts)
        end = begin + size
