"""Experts on demand: those that a layer's router has chosen are read into a cache of their own, all at once."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class ExpertUse:
    """What experts have cost, in a pass or several."""

    hits: int = 0
    """Experts that were in memory when a micro-batch chose them."""
    misses: int = 0
    """Those that had to be read."""
    nbytes: int = 0
    """Bytes read for them."""
    compute_seconds: float = 0.0
    """Seconds of computing between a router's choice and the sum of its experts."""

    def __add__(self, other: "ExpertUse") -> "ExpertUse":
        return ExpertUse(
            self.hits + other.hits,
            self.misses + other.misses,
            self.nbytes + other.nbytes,
            self.compute_seconds + other.compute_seconds,
        )

    def __sub__(self, other: "ExpertUse") -> "ExpertUse":
        return ExpertUse(
            self.hits - other.hits,
            self.misses - other.misses,
            self.nbytes - other.nbytes,
            self.compute_seconds - other.compute_seconds,
        )


NO_EXPERTS: Final = ExpertUse()
