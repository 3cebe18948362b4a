"""How far a job is, how fast it goes, and how long it will take: figures for people, from counts and a clock."""

from collections import deque
from dataclasses import dataclass
from typing import Final

from tiered.units import format_seconds

_WINDOW_SECONDS: Final = 60.0
"""Rates are averages over the last minute, or over the last few passes where those take longer."""
_LEAST_PASSES: Final = 4
_MOST_MARKS: Final = 128


@dataclass(frozen=True)
class Counts:
    """What has been done; only ever grows."""

    sequences: int = 0
    """Sequences that have ended."""
    running: float = 0.0
    """Sequences that are running, each counted as a fraction: its tokens over the most that it may have."""
    prompt_tokens: int = 0
    generated_tokens: int = 0


class Progress:
    """Follows one run of a job. `earlier` sequences were done before it, out of `total`."""

    def __init__(self, total: int, earlier: int, now: float) -> None:
        self._total, self._earlier, self._began = total, earlier, now
        self._marks: deque[tuple[float, Counts]] = deque([(now, Counts())], maxlen=_MOST_MARKS)

    def update(self, now: float, counts: Counts) -> None:
        """A pass has ended at `now`, in seconds of the same clock."""
        self._marks.append((now, counts))
        while len(self._marks) > _LEAST_PASSES and self._marks[1][0] <= now - _WINDOW_SECONDS:
            self._marks.popleft()

    @property
    def rates(self) -> tuple[float, float]:
        """Tokens per second: prompts read, and tokens generated."""
        (then, before), (now, after) = self._marks[0], self._marks[-1]
        seconds = now - then
        if seconds <= 0:
            return 0.0, 0.0
        prompts, generated = (
            after.prompt_tokens - before.prompt_tokens,
            after.generated_tokens - before.generated_tokens,
        )
        return prompts / seconds, generated / seconds

    @property
    def seconds_left(self) -> float | None:
        """At the speed of this run so far; None while nothing has been computed."""
        now, counts = self._marks[-1]
        achieved = counts.sequences + counts.running
        if achieved <= 0:
            return None
        return (now - self._began) * (self._total - self._earlier - achieved) / achieved

    def line(self) -> str:
        """One line for a person."""
        counts = self._marks[-1][1]
        prefill, decode = self.rates
        text = f"{self._earlier + counts.sequences}/{self._total} sequences"
        text += f"  prefill {prefill:.3g}, decode {decode:.3g} tokens/s"
        left = self.seconds_left
        return text if left is None else f"{text}  {format_seconds(left)} left"
