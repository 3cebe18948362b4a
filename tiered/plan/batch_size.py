"""How many sequences run at once: those that get most tokens per second out of disk, memory and processor together.

    throughput = rows(n) / max((streamed(n) + kv(n) + experts(n)) / B, copied(n) / P, C(n) + experts(n) / B)

N sequences that are about equally long take ceil(N / n) waves, the last of which may be nearly empty: so rows(n) is
N / ceil(N / n), and sizes are compared that make waves about equal (of 100 sequences 50 at once rather than 64 or 96,
which take as many waves and more memory). Others make no waves: each that ends makes room for the next one, so rows(n)
is n, and all sizes are compared.
More sequences share each reading of the weights, until computing takes longer than reading. Their KV cache takes
memory that could hold weights (`cpu`), or is read in every pass like them (`disk`). Experts that are read when they are
chosen are waited for; more sequences choose more of them. Pure functions: what each batch
size streams comes from the planner, B and C are measured (`bench/rates.py`). Scoring, where nothing is sampled, needs
no rates: there the bytes read decide.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from tiered.plan.cost import pass_seconds

_WORTH: Final = 1.02
"""A larger batch size must give so many times the throughput: a smaller gain is within the error of the estimate, and
each of its sequences is finished later."""
_FEW_ROWS: Final = 512
"""Tokens below which a pass computes slower per token, even with all weights in memory."""
_ENOUGH_TOKENS: Final = 16384
"""Tokens in a pass that take any processor far longer than any disk takes for the weights: more gains nothing, and
the first results come later."""


@dataclass(frozen=True)
class BatchOption:
    """One way to run."""

    sequences: int
    kv_on_disk: bool
    disk_nbytes: int
    """Bytes read per pass: weights that are not resident, and the KV cache where it is on disk."""
    expert_nbytes: int = 0
    """Of these, the bytes of experts that are read when they are chosen, while nothing computes."""
    bus_nbytes: int = 0
    """Bytes copied to the device per pass."""
    kv_on_device: bool = False

    @property
    def ahead_nbytes(self) -> int:
        """Bytes that are read while others are computed with."""
        return self.disk_nbytes - self.expert_nbytes


@dataclass(frozen=True)
class BatchChoice:
    """An option, and the seconds that a pass is expected to take."""

    option: BatchOption
    disk_seconds: float
    compute_seconds: float
    expert_seconds: float = 0.0
    """Of the disk's seconds, those in which nothing computes."""
    bus_seconds: float = 0.0

    @property
    def pass_seconds(self) -> float:
        return max(self.bus_seconds, pass_seconds(self.disk_seconds, self.compute_seconds, self.expert_seconds))

    @property
    def tokens_per_second(self) -> float:
        return self.option.sequences / self.pass_seconds

    @property
    def bottleneck(self) -> str:
        if self.bus_seconds > max(self.disk_seconds, self.compute_seconds):
            return "bus"
        return "disk" if self.disk_seconds >= self.compute_seconds else "compute"


def candidates(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16 and so on up to `most`, which is the last."""
    doublings = [1 << n for n in range(most.bit_length())]
    return sorted({*doublings, *(3 * n // 2 for n in doublings[1:] if 3 * n // 2 < most), most})


def even_candidates(sequences: int, most: int) -> list[int]:
    """`candidates` up to `most` for so many sequences in all, each lowered as far as it takes no more waves."""
    return sorted({-(-sequences // _passes(sequences, count)) for count in candidates(min(sequences, most))})


def all_candidates(sequences: int, most: int) -> list[int]:
    """`candidates` up to `most` for so many sequences in all, and those that would make waves about equal."""
    return sorted({*candidates(min(sequences, most)), *even_candidates(sequences, most)})


def choose_batch_size(
    options: Iterable[BatchOption],
    bytes_per_second: float | None,
    compute_seconds: Callable[[int], float],
    bus_bytes_per_second: float | None = None,
    reading_seconds: float = 0.0,
    sequences: int | None = None,
) -> BatchChoice | None:
    """The option with most tokens per second; of nearly equal ones the one with fewest sequences, then the first.

    `sequences` are those of the whole job, whose last wave counts as a whole one; None: there are no waves.
    `bytes_per_second` None: nothing is read; `bus_bytes_per_second` None: nothing is copied, or nobody knows how fast.
    By `reading_seconds` computing takes longer for each byte that is read ahead. None where there are no options.
    """
    found = [
        BatchChoice(
            option,
            option.disk_nbytes / bytes_per_second if bytes_per_second else 0.0,
            max(compute_seconds(option.sequences) + option.ahead_nbytes * reading_seconds, 1e-9),
            option.expert_nbytes / bytes_per_second if bytes_per_second else 0.0,
            option.bus_nbytes / bus_bytes_per_second if bus_bytes_per_second else 0.0,
        )
        for option in options
    ]
    if not found:
        return None

    def speed(choice: BatchChoice) -> float:
        if sequences is None:
            return choice.tokens_per_second
        return sequences / _passes(sequences, choice.option.sequences) / choice.pass_seconds

    most = max(map(speed, found))
    enough = [choice for choice in found if speed(choice) * _WORTH >= most]
    return min(enough, key=lambda choice: choice.option.sequences)


def choose_windows_per_pass(read_nbytes: Callable[[int], int | None], windows: int, context: int) -> int:
    """Windows per pass for `windows` windows of `context` tokens that are only scored.

    `read_nbytes` tells how many bytes a later pass with so many windows reads, None where memory does not suffice.
    More windows make fewer passes but leave less memory for weights, so each pass reads more; the product decides. Of
    numbers with equal products the smallest that is not slow to compute is taken, and the windows are spread evenly
    over the passes. 1 where nothing fits: making the plan then says why.
    """
    most = max(1, min(windows, _ENOUGH_TOKENS // context))
    least = min(most, -(-_FEW_ROWS // context))
    best, best_cost = 1, math.inf
    for count in candidates(most):
        read = read_nbytes(count)
        if read is None:
            break
        # The first pass reads everything, whatever will be resident.
        cost = (_passes(windows, count) - 1) * read
        if cost < best_cost or (cost == best_cost and best < least):
            best, best_cost = count, cost
    return -(-windows // _passes(windows, best))


def _passes(windows: int, per_pass: int) -> int:
    return -(-windows // per_pass)
