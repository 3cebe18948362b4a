"""What passes cost: pass by pass for the last ones, and sums for all."""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from tiered.model import Pass

_RECENT_PASSES: Final = 256
"""Kept one by one: a job may have millions."""


@dataclass(frozen=True)
class PassCost:
    """One pass: what it did and what it took."""

    pass_: Pass
    seconds: float
    """With what came between it and the pass before: results handed over, newcomers."""
    prompt_tokens: int
    new_tokens: int
    """Tokens sampled."""
    bytes_read: int
    """Of weights."""
    kv_bytes: int
    """Read and written, of a KV cache on disk."""
    disk_idle_seconds: float

    @property
    def is_decode(self) -> bool:
        """Whether no prompt was in it."""
        return self.prompt_tokens == 0


@dataclass
class PassTotals:
    """Sums over passes: what a job of any length costs, in the memory of one pass."""

    passes: int = 0
    seconds: float = 0.0
    """With what comes between passes."""
    pass_seconds: float = 0.0
    """Without it."""
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    new_tokens: int = 0
    bytes_read: int = 0
    """Of weights."""
    kv_bytes: int = 0
    disk_idle_seconds: float = 0.0

    def add(self, cost: PassCost) -> None:
        """Count one more pass."""
        self.passes += 1
        self.seconds += cost.seconds
        self.pass_seconds += cost.pass_.seconds
        self.compute_seconds += cost.pass_.compute_seconds
        self.wait_seconds += cost.pass_.wait_seconds
        self.new_tokens += cost.new_tokens
        self.bytes_read += cost.bytes_read
        self.kv_bytes += cost.kv_bytes
        self.disk_idle_seconds += cost.disk_idle_seconds


@dataclass
class Generation:
    """What a run cost."""

    prefill: PassTotals = field(default_factory=PassTotals)
    """Of the passes with prompts; other sequences may have decoded in them."""
    decode: PassTotals = field(default_factory=PassTotals)
    """Of the passes without."""
    recent: deque[PassCost] = field(default_factory=lambda: deque(maxlen=_RECENT_PASSES))
    """The last passes, for figures that sums cannot give."""
    first_token_seconds: float = 0.0
    sequences: int = 0
    """That have begun."""
    prompt_tokens: int = 0
    """Of all prompts that have begun."""

    def add(self, cost: PassCost) -> None:
        """Count one more pass."""
        (self.decode if cost.is_decode else self.prefill).add(cost)
        self.recent.append(cost)

    @property
    def passes(self) -> int:
        return self.prefill.passes + self.decode.passes

    @property
    def generated_tokens(self) -> int:
        return self.prefill.new_tokens + self.decode.new_tokens
