"""How many prompt tokens may share a pass with sequences that decode, so that these do not wait long.

    seconds of a pass <= SLACK * max(disk, computing the decoding rows)          but LEAST tokens always pass

In: what the passes so far have cost, and rates measured beforehand where there are some. Pure arithmetic.
"""

from collections import deque
from collections.abc import Callable
from typing import Final

SLACK: Final = 1.25
"""A pass with prompts may take so many times what it takes without."""
LEAST: Final = 64
"""Prompt tokens that pass even if that takes longer: newcomers must get on, and fewer rows are computed badly."""
_RECENT: Final = 4
_WEIGHT: Final = 0.5
"""Of the newest pass, in averages."""


class Pace:
    """Learns from passes. `compute_seconds`, of so many rows, is what it goes by before it has seen any."""

    def __init__(self, compute_seconds: Callable[[int], float] | None = None) -> None:
        self._calibrated = compute_seconds
        self._disk: deque[float] = deque(maxlen=_RECENT)
        """Seconds in which the disk was busy, of the last passes."""
        self._decoding: float | None = None
        """Compute seconds of a pass without prompts."""
        self._per_token: float | None = None
        """Compute seconds that a prompt's token adds."""

    def note(self, decoding: int, prompt_tokens: int, compute_seconds: float, disk_seconds: float) -> None:
        """A pass over `decoding` rows that decode, and `prompt_tokens`, has taken this."""
        self._disk.append(disk_seconds)
        if not prompt_tokens:
            self._decoding = _average(self._decoding, compute_seconds)
            return
        added = max(compute_seconds - self._base(decoding), 0.0) if decoding else compute_seconds
        self._per_token = _average(self._per_token, added / prompt_tokens)

    def prompt_tokens(self, decoding: int) -> int:
        """How many prompt tokens the next pass may take beside `decoding` rows that decode."""
        base = self._base(decoding)
        # The first pass reads what stays in memory too, so of several the least is what the disk takes.
        room = SLACK * max(min(self._disk, default=0.0), base) - base
        if self._per_token is not None:
            found = room / max(self._per_token, 1e-9)
        elif self._calibrated is not None:
            found = room / max((self._calibrated(decoding + LEAST) - base) / LEAST, 1e-9)
        else:
            found = 0.0
        return max(LEAST, int(min(found, 1e9)))

    def _base(self, decoding: int) -> float:
        """Compute seconds of the decoding rows alone."""
        if self._decoding is not None:
            return self._decoding
        if self._calibrated is not None:
            return self._calibrated(decoding)
        return (self._per_token or 0.0) * decoding


def _average(before: float | None, new: float) -> float:
    return new if before is None else _WEIGHT * new + (1 - _WEIGHT) * before
