"""How many sequences run at once: those that get most tokens per second out of disk, memory and processor together.

    throughput = n / max((streamed(n) + kv(n)) / B, C(n))

More sequences share each reading of the weights, until computing takes longer than reading. Their KV cache takes
memory that could hold weights (`cpu`), or is read in every pass like them (`disk`). Pure functions: what each width
streams comes from the planner, B and C are measured (`bench/rates.py`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

_WORTH: Final = 1.02
"""A greater width must gain this much: what it gains less is within the error of the estimate, and each sequence of a
wider batch is finished later."""


@dataclass(frozen=True)
class WidthOption:
    """What one way to run takes per pass."""

    sequences: int
    kv_on_disk: bool
    disk_nbytes: int
    """Weights that are not resident, and the KV cache where it is on disk."""


@dataclass(frozen=True)
class Width:
    """A choice, and what it is expected to take."""

    option: WidthOption
    disk_seconds: float
    compute_seconds: float

    @property
    def pass_seconds(self) -> float:
        return max(self.disk_seconds, self.compute_seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.option.sequences / self.pass_seconds

    @property
    def bottleneck(self) -> str:
        return "disk" if self.disk_seconds >= self.compute_seconds else "compute"


def candidates(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16 and so on up to `most`, which is the last."""
    doublings = [1 << n for n in range(most.bit_length())]
    return sorted({*doublings, *(3 * n // 2 for n in doublings[1:] if 3 * n // 2 < most), most})


def choose_width(
    options: Iterable[WidthOption], bytes_per_second: float | None, compute_seconds: Callable[[int], float]
) -> Width | None:
    """The option with most tokens per second; of nearly equal ones that with fewest sequences, then the first.

    `bytes_per_second` None: nothing is read. None where there are no options.
    """
    found = [
        Width(
            option,
            option.disk_nbytes / bytes_per_second if bytes_per_second else 0.0,
            max(compute_seconds(option.sequences), 1e-9),
        )
        for option in options
    ]
    if not found:
        return None
    most = max(width.tokens_per_second for width in found)
    enough = [width for width in found if width.tokens_per_second * _WORTH >= most]
    return min(enough, key=lambda width: width.option.sequences)
