"""What a pass computes, in the form the engine takes: micro-batches of rows that go through every block together.

    Work.ids -> rows of tables read -> Work.record -> groups of micro-batches -> layers -> Work.finish

Two kinds: `Segments` (`segments.py`), tokens of many sequences over the paged cache, and `ForwardWork`
(`forward.py`), what transformers' own `generate` passes, over whatever cache it brings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tiered.cache import LentBlocks, MicroBatchKV
from tiered.model.record import LayerCall
from tiered.model.seat import Seat
from tiered.model.waiting import Place, WaitingRoom
from tiered.stream import FetchedRows


@dataclass(eq=False)
class MicroBatch:
    """Rows on their way through the layers."""

    hidden: torch.Tensor  # [rows, tokens, hidden]; anything while they wait in `place`
    calls: tuple[LayerCall, ...]
    number: int
    """Number of the `ForwardBatch` it belongs to; with `Segments`, its own number in the pass."""
    kv: MicroBatchKV | None = None
    """Its view of the paged cache; None where the calls hold a cache of their own."""
    place: Place | None = None
    """Where its hidden states wait between two layers; None: they stay where they are computed."""

    def wait_in(self, room: WaitingRoom) -> None:
        """From now on the hidden states wait in `room`."""
        self.place = room.add(self.hidden)
        self.hidden = self.hidden.new_empty(0)

    def take(self) -> torch.Tensor:
        """What the next layer is given."""
        return self.hidden if self.place is None else self.place.take()

    def put(self, hidden: torch.Tensor) -> None:
        """What a layer has made of it."""
        if self.place is None:
            self.hidden = hidden
        else:
            self.place.put(hidden)

    def settle(self) -> None:
        """All layers have computed: `hidden` is what they have made of it, on the device or in the host's memory."""
        if self.place is not None:
            self.hidden, self.place = self.place.settled(), None


@dataclass(frozen=True, eq=False)
class Group:
    """Micro-batches that compute one after the other, in one place, with the same KV blocks in memory."""

    seat: Seat
    micro_batches: tuple[MicroBatch, ...]
    blocks: LentBlocks | None = None


class Embedded:
    """Gives what tables that are read row by row have for a pass's tokens. `fetched` are the rows that were read of
    each, by its block, in the host's memory; a micro-batch's become numbers of `dtype` when it is recorded."""

    def __init__(self, fetched: Mapping[str, FetchedRows], dtype: torch.dtype) -> None:
        self._fetched, self._dtype = fetched, dtype

    def __call__(self, seat: Seat, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Arguments of the model's forward for `input_ids` [rows, tokens] in the host's memory: the embeddings
        [rows, tokens, width] and what it makes of other tables, where `seat` is."""
        model = seat.model
        arguments = {"inputs_embeds": model.embed(*self._rows("embed", seat, input_ids))}
        for name, table in model.skeleton.tables.items():
            arguments[table.argument] = model.skeleton.look_up(table, *self._rows(name, seat, input_ids))
        return arguments

    def _rows(self, table: str, seat: Seat, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, index = self._fetched[table].of(input_ids, self._dtype)
        return rows.to(seat.where, seat.model.dtype), index.to(seat.where)


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

    def record(self, embedded: Embedded, room: WaitingRoom | None = None) -> list[Group]:
        """The micro-batches, ready for the first layer; a device's wait in `room`, if there is one. In the compute
        thread."""

    def head_steps(self, groups: Sequence[Group]) -> int:
        """How often `finish` uses the head's weights."""

    def finish(self, groups: Sequence[Group]) -> tuple[torch.Tensor, ...]:
        """Compute logits while the head's weights are lent; returns those for `Pass.logits`, in the host's memory. In
        the compute thread."""

    def commit(self) -> None:
        """Called when the pass has reached its end."""
