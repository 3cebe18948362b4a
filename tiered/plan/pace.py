"""How many prompt tokens may share a pass with sequences that decode, so that these do not wait long.

    seconds of a pass <= SLACK * (max(disk, bus, computing the decoding rows) + waiting for copies)
                                                                                 but LEAST tokens always pass

In: what the passes so far have cost, and rates measured beforehand where there are some. Pure arithmetic. With a KV
cache on disk, the time to read a long prompt's own pages is added to the pass, and so is that of reading the experts of
its tokens where these are read on demand: the rule does not count them.

Where a device computes prompts, all weights that do not stay there cross the bus for them, be they of one token or of
thousands, even if the processor decodes without: tokens that compute meanwhile cost nobody anything, and fewer would
only make more such passes. Experts on demand are copied for each pass, too, but computing waits for them.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final

from tiered.plan.cost import HALFWAY, decode_computing
from tiered.plan.hardware import GpuRates
from tiered.plan.inputs import Machine, ModelShape
from tiered.plan.plan import Plan
from tiered.plan.way import expected_bus_nbytes

SLACK: Final = 1.25
"""A pass with prompt tokens may take so many times as long as it does with next to none."""
LEAST: Final = 64
"""Prompt tokens that pass even if that takes longer: prompts must get on, and fewer rows are inefficient."""
_RECENT: Final = 4
"""Passes whose disk seconds are remembered."""
_KEPT: Final = 0.5
"""The share that sums and averages keep of older passes when a new one is added."""
_GROWTH: Final = 2
"""A pass takes at most so many times the tokens that have been timed: the cost of few says little about many."""


@dataclass(frozen=True)
class Copies:
    """What is copied to a device for a pass with prompt tokens, however few they are."""

    beside_nbytes: int = 0
    """Bytes that are copied while others are computed with."""
    waited_nbytes: int = 0
    """Bytes that computing waits for."""
    bytes_per_second: float | None = None
    """None: learnt from passes."""


NO_COPIES: Final = Copies()


class Pace:
    """Learns from passes. Before it has seen any, it goes by `compute_seconds(rows)`."""

    def __init__(self, compute_seconds: Callable[[int], float] | None = None, copies: Copies = NO_COPIES) -> None:
        # Asked once or more for every pass, and for few numbers of rows.
        self._calibrated = None if compute_seconds is None else cache(compute_seconds)
        self._copies, self._copied_per_second = copies, copies.bytes_per_second
        self._passes = 0
        self._disk: deque[float] = deque(maxlen=_RECENT)
        """Seconds the disk was busy in each of the last passes without prompts; before there are any, in others."""
        self._decoding = (0.0, 0.0)
        """Rows and compute seconds of passes without prompts, on average; 0 rows: none has been seen."""
        self._added = self._tokens = 0.0
        """Compute seconds that prompts added, and their tokens: sums in which newer passes count more."""
        self._timed = 0
        """Prompt tokens of the largest recent pass in these sums."""

    def note(
        self,
        decoding: int,
        prompt_tokens: int,
        compute_seconds: float,
        disk_seconds: float,
        bus_nbytes: int = 0,
        bus_seconds: float = 0.0,
    ) -> None:
        """Learn from a pass over `decoding` rows that decode and `prompt_tokens` tokens of prompts, in which so many
        bytes were copied to a device in so many seconds."""
        self._passes += 1
        if self._copies.bytes_per_second is None and bus_nbytes and bus_seconds > 0:
            self._copied_per_second = bus_nbytes / bus_seconds
        rows, seconds = self._decoding
        if not prompt_tokens:
            if not rows:
                self._disk.clear()
                rows, seconds = float(decoding), compute_seconds
            self._disk.append(disk_seconds)
            self._decoding = _average(rows, decoding), _average(seconds, compute_seconds)
            return
        # The first pass also reads what stays in memory.
        if not rows and self._passes > 1:
            self._disk.append(disk_seconds)
        # Passes vary by more than few tokens add, so these count only while nothing else is known.
        if prompt_tokens >= LEAST or not self._tokens:
            self._added = _KEPT * self._added + compute_seconds - self._base(decoding)
            self._tokens = _KEPT * self._tokens + prompt_tokens
            self._timed = max(prompt_tokens, int(_KEPT * self._timed))

    def prompt_tokens(self, decoding: int) -> int:
        """How many prompt tokens the next pass may take beside `decoding` rows that decode."""
        base = self._base(decoding)
        each_byte = 0.0 if self._copied_per_second is None else 1 / self._copied_per_second
        beside, waited = self._copies.beside_nbytes * each_byte, self._copies.waited_nbytes * each_byte
        room = SLACK * (max(min(self._disk, default=0.0), beside, base) + waited) - waited - base
        if self._tokens:
            each, most = max(self._added, 0.0) / self._tokens, _GROWTH * self._timed
        elif self._calibrated is not None:
            each, most = (self._calibrated(decoding + LEAST) - base) / LEAST, 1 << 30
        else:
            return LEAST
        return max(LEAST, min(most, int(room / max(each, 1e-9))))

    def _base(self, decoding: int) -> float:
        """Compute seconds of the decoding rows alone; an estimate, rather too low than too high."""
        rows, seconds = self._decoding
        if rows:
            return seconds * min(1.0, decoding / rows)
        if self._calibrated is not None:
            return self._calibrated(decoding)
        return self._added / self._tokens * decoding if self._tokens else 0.0


def pace_for(plan: Plan, model: ModelShape, gpu: GpuRates | None, calibration: Callable[[int], float] | None) -> Pace:
    """The pace of prompts beside decoding in runs, predictions and simulations of `plan`. Until it has seen passes it
    goes by `calibration` (`calibration_of`), whose rates are the processor's. Where a device computes it knows none,
    but how fast is copied to it, if the rates of `gpu` are known; else that is learnt."""
    if plan.device is None:
        return Pace(calibration)
    beside, waited = plan.bus_nbytes, expected_bus_nbytes(model, plan, LEAST)
    if plan.copies_in_turns:
        beside, waited = 0, beside + waited
    return Pace(copies=Copies(beside, waited, None if gpu is None else gpu.host_to_device))


def calibration_of(
    model: ModelShape, machine: Machine, mean_context: float, bits: int = 16
) -> Callable[[int], float] | None:
    """Seconds that so many decoding rows compute, of sequences that have `mean_context` tokens in the end, with a KV
    cache of so many bits; None where the machine's rates are not known."""
    if machine.linear is None:
        return None
    machine = machine.keeping(bits)
    return lambda rows: decode_computing(model, machine, rows, mean_context * HALFWAY, rows).seconds


def _average(before: float, new: float) -> float:
    return _KEPT * before + (1 - _KEPT) * new
