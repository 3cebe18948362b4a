"""What passes cost: pass by pass for the last ones, and sums for all."""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from tiered.model import Pass
from tiered.stream import NO_EXPERTS, ExpertUse

_RECENT_PASSES: Final = 256
"""How many passes are kept one by one; a job may have millions."""


@dataclass(frozen=True)
class PassCost:
    """One pass: what it did and what it took."""

    pass_: Pass
    seconds: float
    """From the end of the pass before: includes handing over results and adding items."""
    prompt_tokens: int
    new_tokens: int
    """Tokens sampled."""
    bytes_read: int
    """Bytes of weights."""
    kv_bytes: int
    """Bytes read and written of a KV cache on disk."""
    disk_idle_seconds: float
    bus_bytes: int = 0
    """Bytes of weights copied to a device."""
    bus_wait_seconds: float = 0.0
    """Of the seconds in which computing waited, those for copies to the device of what was in memory."""

    @property
    def is_decode(self) -> bool:
        """Whether it had no prompt tokens."""
        return self.prompt_tokens == 0


@dataclass
class PassTotals:
    """Sums over passes, which take the memory of one pass for a job of any length."""

    passes: int = 0
    seconds: float = 0.0
    """Including the time between passes."""
    pass_seconds: float = 0.0
    """Of the passes alone."""
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    new_tokens: int = 0
    bytes_read: int = 0
    """Bytes of weights."""
    kv_bytes: int = 0
    disk_idle_seconds: float = 0.0
    experts: ExpertUse = NO_EXPERTS
    """Of experts that are read when they are chosen; their bytes are among `bytes_read`."""
    bus_bytes: int = 0
    bus_wait_seconds: float = 0.0
    """Of `wait_seconds`."""
    waiting_bytes: int = 0
    """Of hidden states that came back to a device, having waited in the host's memory."""

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
        self.experts += cost.pass_.experts
        self.bus_bytes += cost.bus_bytes
        self.bus_wait_seconds += cost.bus_wait_seconds
        self.waiting_bytes += cost.pass_.waiting_nbytes


@dataclass
class Generation:
    """What a run cost."""

    prefill: PassTotals = field(default_factory=PassTotals)
    """Sums over passes with prompt tokens; other sequences may have decoded in them."""
    decode: PassTotals = field(default_factory=PassTotals)
    """Sums over passes without prompt tokens."""
    recent: deque[PassCost] = field(default_factory=lambda: deque(maxlen=_RECENT_PASSES))
    """The last passes, for figures that sums cannot give."""
    first_token_seconds: float = 0.0
    sequences: int = 0
    """Sequences that have begun."""
    prompt_tokens: int = 0
    """Prompt tokens of all sequences that have begun."""

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
