"""Which blocks stay in memory and how large the ring for the others is: pure functions of sizes.

Layers are visited in a cycle, so keeping a fixed set and streaming the rest reads S - M per pass, the least any
policy can (Belady, "A study of replacement algorithms for a virtual-storage computer", 1966); an LRU would hit
almost never. The set is spread evenly through the depth so that the disk never idles while a run of resident
blocks computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """Where every block of the tape lives, by its position."""

    resident: frozenset[int]
    resident_nbytes: int
    ring_nbytes: int
    """Memory through which all other blocks pass; 0 where every block is resident."""

    @property
    def nbytes(self) -> int:
        return self.resident_nbytes + self.ring_nbytes


def interleave(count: int, of: int) -> frozenset[int]:
    """`count` of `of` positions, spread evenly: i is in where floor((i + 1) f) > floor(i f), f = count / of."""
    return frozenset(i for i in range(of) if (i + 1) * count // of > i * count // of)


def smallest_ring(sizes: Sequence[int]) -> int:
    """Bytes of the largest block: with a smaller ring a pass cannot run at all."""
    return max(sizes)


def full_ring(sizes: Sequence[int]) -> int:
    """Bytes for one block that computes and the next that is read: the largest two neighbours on the cyclic tape."""
    return max(a + b for a, b in zip(sizes, [*sizes[1:], sizes[0]], strict=True))


def place(sizes: Sequence[int], available: int) -> Placement | None:
    """The placement of blocks of `sizes` bytes in `available` bytes that streams least, or None if none fits.

    Residency never takes the ring below two blocks, because a ring of one reads and computes in turn.
    """
    if sum(sizes) <= available:
        return Placement(frozenset(range(len(sizes))), sum(sizes), 0)
    if smallest_ring(sizes) > available:
        return None
    best = Placement(frozenset(), 0, min(available, full_ring(sizes)))
    # More resident blocks are not always more bytes (the head is larger than a layer), so all counts are tried.
    for count in range(1, len(sizes)):
        resident = interleave(count, len(sizes))
        streamed = [nbytes for i, nbytes in enumerate(sizes) if i not in resident]
        nbytes, ring = sum(sizes) - sum(streamed), full_ring(streamed)
        if nbytes + ring <= available and nbytes > best.resident_nbytes:
            best = Placement(resident, nbytes, ring)
    return best
