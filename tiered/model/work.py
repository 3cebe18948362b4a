"""What a pass computes, in the form the engine takes: micro-batches of rows that go through every block together.

    Work.ids -> embedding rows read -> Work.record -> groups of micro-batches -> layers -> Work.finish

Two kinds: `Segments` (`segments.py`), tokens of many sequences over the paged cache, and `ForwardWork`
(`forward.py`), what transformers' own `generate` passes, over whatever cache it brings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tiered.cache import LentBlocks, MicroBatchKV
from tiered.model.record import LayerCall
from tiered.model.seat import Seat


@dataclass(eq=False)
class MicroBatch:
    """Rows on their way through the layers."""

    hidden: torch.Tensor  # [rows, tokens, hidden]
    calls: tuple[LayerCall, ...]
    number: int
    """Number of the `ForwardBatch` it belongs to; with `Segments`, its own number in the pass."""
    kv: MicroBatchKV | None = None
    """Its view of the paged cache; None where the calls hold a cache of their own."""


@dataclass(frozen=True, eq=False)
class Group:
    """Micro-batches that compute one after the other, in one place, with the same KV blocks in memory."""

    seat: Seat
    micro_batches: tuple[MicroBatch, ...]
    blocks: LentBlocks | None = None


class Embedded:
    """Gives the embeddings of a pass's tokens. `rows` [len(ids), width] are the table's rows of `ids`, ascending, in
    the host's memory."""

    def __init__(self, rows: torch.Tensor, ids: Sequence[int]) -> None:
        self._rows, self._table = rows, torch.tensor(ids)
        self._at: dict[Seat, torch.Tensor] = {}
        """The rows where each seat is, moved there once for all micro-batches."""

    def __call__(self, seat: Seat, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [rows, tokens, width], where `seat` is, of `input_ids` [rows, tokens] in the host's memory."""
        if seat not in self._at:
            self._at[seat] = self._rows.to(seat.where, seat.model.dtype)
        index = torch.searchsorted(self._table, input_ids.contiguous())
        return seat.model.embed(self._at[seat], index.to(seat.where))


class Work(Protocol):
    """One pass's worth of tokens."""

    @property
    def ids(self) -> list[int]:
        """The distinct token ids, ascending."""

    @property
    def seats(self) -> Sequence[Seat]:
        """Who computes it, a device before the processor: it does what it has been given while the processor does its
        own."""

    @property
    def head(self) -> Seat:
        """Which of them computes logits. It may have nothing else to compute."""

    def record(self, embedded: Embedded) -> list[Group]:
        """The micro-batches, ready for the first layer. In the compute thread."""

    def head_steps(self, groups: Sequence[Group]) -> int:
        """How often `finish` uses the head's weights."""

    def finish(self, groups: Sequence[Group]) -> tuple[torch.Tensor, ...]:
        """Compute logits while the head's weights are lent; returns those for `Pass.logits`, in the host's memory. In
        the compute thread."""

    def commit(self) -> None:
        """Called when the pass has reached its end."""
