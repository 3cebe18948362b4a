"""Recurrent state: a slot of fixed size for each sequence in each layer that has one, beside the pages.

    StatePool      the slots, in memory or in the file behind the KV blocks
    BundleStates   transformers' cache as a mixer sees it: the states of the sequences that it computes together
    AwayStates     copies on a device, of slots that are in the host's memory: brought there and back in each layer

A state follows its sequence: it is looked up when a layer computes, not when a pass is recorded, and is zero at the
first token. Some kernels write into the tensor that they were given, and tell nobody: what is lent is either the slot
itself, or a copy that is written back after the mixer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tiered.cache.outbox import Outbox
from tiered.device import Event, Lease
from tiered.plan.kv import CachePlan
from tiered.plan.state import StateGroup, StateKind, StatePart


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A sequence as it was after `length` tokens. Pages are not copied: later tokens only add to them, as long as they
    are no more than one micro-batch has."""

    length: int
    in_memory: tuple[torch.Tensor, ...]
    """Copies of what `KVPool.overwritten` lists."""
    on_disk: tuple[torch.Tensor, ...]
    """Copies of the states that `StatePool.extents` lists, if they are on disk."""


class StatePool:
    """Slots for the sequences of `plan`, which has a state. `memory` (uint8) is `plan.states_nbytes` long, and where
    the KV blocks are."""

    def __init__(self, plan: CachePlan, memory: torch.Tensor) -> None:
        assert plan.state is not None
        self.group_of: dict[int, StateGroup] = {}
        """By layer."""
        self._memory, self._sequences = memory, plan.sequences
        self._start: dict[int, int] = {}
        """Bytes from the start of the memory, or of the states in the file, to each layer's slots."""
        position = 0
        for group in plan.state.groups:
            for layer in group.layers:
                self.group_of[layer], self._start[layer] = group, position
                if not plan.shares_layers:
                    position += plan.sequences * group.nbytes
        self._file_start = plan.blocks_nbytes

    def slots(self, layer: int) -> torch.Tensor:
        """uint8 [sequences, nbytes]: the slots of `layer`, in memory."""
        nbytes, start = self.group_of[layer].nbytes, self._start[layer]
        return self._memory[start : start + self._sequences * nbytes].view(self._sequences, nbytes)

    def file_offset(self, layer: int, slot: int) -> int:
        """Where a slot of `layer` lies in the file."""
        return self._file_start + self._start[layer] + slot * self.group_of[layer].nbytes

    def extents(self, slot: int) -> dict[int, tuple[int, int]]:
        """For each layer, where in the file the states of `slot` are: offset and bytes."""
        return {layer: (self.file_offset(layer, slot), group.nbytes) for layer, group in self.group_of.items()}


@dataclass(frozen=True)
class StateRows:
    """Where the states of some sequences are in one layer."""

    memory: torch.Tensor
    """uint8 [rows, nbytes]."""
    rows: Sequence[int]
    """The row of each sequence."""
    group: StateGroup

    def view(self, part: StatePart, offset: int) -> torch.Tensor:
        """[all rows, *shape]: `part` of every row."""
        flat = self.memory[:, offset : offset + part.nbytes].view(getattr(torch, part.dtype))
        states: torch.Tensor = flat.unflatten(1, part.shape)
        return states


FindRows = Callable[[int], StateRows]
"""Finds the rows of a layer, by its number."""


class AwayStates:
    """Rows of `row_nbytes` in a device's memory for states that it computes with: `memory` has room for some. `outbox`
    waits for copies back, and knows the device. For the thread that computes."""

    def __init__(self, outbox: Outbox, memory: Lease, row_nbytes: int) -> None:
        self._outbox, self._device, self._lease, self._row_nbytes = outbox, outbox.device, memory, row_nbytes
        self._sent: dict[int, Event] = {}
        """By row, the end of the copy of what has been computed there last, if that has been sent."""

    def bring(self, home: StateRows, rows: range, fresh: Sequence[int]) -> None:
        """Have in `rows` what the rows of `home` hold, or zeros for those with the indices `fresh`, for all that is
        computed from here on."""
        for index in fresh:
            row = self._row(rows[index], home)
            self._device.wait_for(self._unused(rows[index]))
            self._device.uses(row, writes=True)
            row.zero_()
        kept = [index for index in range(len(rows)) if index not in fresh]
        arrived = None
        for there, here in self._together(home, [(home.rows[index], rows[index]) for index in kept]):
            unused = [self._unused(row) for row in here]
            arrived = self._device.copy_in(_bytes(home.memory, there), self._bytes(here, home), unused)
            self._outbox.follow(arrived, is_in=True)
        if arrived is not None:
            self._device.wait_for(arrived)  # copies to the device end in order

    def at(self, home: StateRows, rows: range) -> StateRows:
        """`rows` in the form of those of `home`."""
        return StateRows(self._memory[:, : home.group.nbytes], rows, home.group)

    def send_back(self, home: StateRows, rows: range) -> None:
        """What has been computed in `rows` goes to the rows of `home`: it is there when the outbox has been flushed."""
        for there, here in self._together(home, list(zip(home.rows, rows, strict=True))):
            source = self._bytes(here, home)
            self._device.uses(source, writes=True)
            event = self._device.copy_out(source, _bytes(home.memory, there), after=[self._device.record()])
            self._outbox.follow(event)
            self._sent.update(dict.fromkeys(here, event))

    def rest(self) -> None:
        """Give the device's memory back until states are brought again. `Outbox.rest` comes first: it waits
        for the copies back, which read that memory."""
        self._device.record().wait()
        self._sent.clear()
        self._lease.end()

    @property
    def _memory(self) -> torch.Tensor:
        """uint8 [rows, nbytes]"""
        return self._lease.take().view(-1, self._row_nbytes)

    def _unused(self, row: int) -> Event:
        """Comes when nothing that was given to the device before uses `row`: after a pass that failed, what it has
        computed there was never sent."""
        return self._sent.pop(row, None) or self._device.record()

    def _row(self, row: int, home: StateRows) -> torch.Tensor:
        return self._memory[row, : home.group.nbytes]

    def _bytes(self, rows: range, home: StateRows) -> torch.Tensor:
        """uint8 of the device: the states of neighbouring `rows`."""
        return self._row(rows[0], home) if len(rows) == 1 else _bytes(self._memory, rows)

    def _together(self, home: StateRows, pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[range, range]]:
        """`pairs` of rows, there and here, as runs of rows that are neighbours in both, each of which is one copy."""
        is_dense, start = home.group.nbytes == self._memory.shape[1], 0
        for stop in range(1, len(pairs) + 1):
            there, here = pairs[start]
            count = stop - start
            if stop < len(pairs) and is_dense and pairs[stop] == (there + count, here + count):
                continue
            yield range(there, there + count), range(here, here + count)
            start = stop


def _bytes(memory: torch.Tensor, rows: range) -> torch.Tensor:
    """uint8: neighbouring `rows` of memory [rows, nbytes]."""
    return memory[rows.start : rows.stop].view(-1)


@dataclass(frozen=True, eq=False)
class Trip:
    """How the states of a bundle come to a device, and back."""

    away: AwayStates
    rows: range
    """Of the device's: one for each sequence."""
    is_there: bool
    """An earlier micro-batch of the pass has left them there."""
    stays: bool
    """A later one goes on with them."""


class BundleStates:
    """The states of sequences that a mixer computes together, for one micro-batch. It serves one layer after the other;
    `settle` ends a layer.

    `find` gives the rows of a layer; `fresh` are the indices of the sequences that begin. `trip`: they are computed
    with on a device, whose memory the rows are not in.
    """

    def __init__(
        self, find: FindRows, sequences: int, tokens: int, fresh: Sequence[int], trip: Trip | None = None
    ) -> None:
        self.sequences, self.tokens = sequences, tokens
        """Tokens of each sequence."""
        self._find, self._fresh, self._trip = find, tuple(fresh), trip
        self._layer: int | None = None
        self._home: StateRows | None = None
        """Where the states are between two layers."""
        self._found: StateRows | None = None
        """Where they are in the layer that computes."""
        self._dtype = torch.float32
        self._lent: dict[tuple[StateKind, int], tuple[torch.Tensor, torch.Tensor | None]] = {}
        """What was lent, and what it is a copy of; None: it is the slots themselves."""

    # What mixers call.

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        return self._lend(layer_idx, "conv", state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        return self._lend(layer_idx, "recurrent", state_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """[sequences, channels, kept + tokens]: what the convolution sees; the newest are kept."""
        kept = self._lend(layer_idx, "conv", state_idx)
        whole = torch.cat([kept, conv_states], dim=-1)
        kept.copy_(whole[..., -kept.shape[-1] :])
        return whole

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        lent = self._lend(layer_idx, "recurrent", state_idx)
        # A step may have updated it where it lies.
        return lent if recurrent_states is lent else lent.copy_(recurrent_states)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    # What calls mixers.

    def begin(self, dtype: torch.dtype) -> None:
        """A mixer is about to compute in `dtype`. States in 16 bits are lent in it, whichever 16 bits they are kept in:
        processor and device may have other ones."""
        self._dtype = dtype

    def settle(self) -> None:
        """The mixer has computed: keep what was written into copies, and send back what is elsewhere."""
        found, home, trip = self._found, self._home, self._trip
        for lent, slots in self._lent.values():
            if slots is not None and found is not None:
                slots[_index(found)] = lent.to(slots.dtype)
        if trip is not None and home is not None and not trip.stays:
            trip.away.send_back(home, trip.rows)
        self._lent.clear()
        self._layer = self._home = self._found = None

    def _lend(self, layer: int, kind: StateKind, number: int) -> torch.Tensor:
        """[sequences, *shape]"""
        found = self._open(layer)
        known = self._lent.get((kind, number))
        if known is None:
            known = self._lent[kind, number] = self._take(found, kind, number)
        return known[0]

    def _open(self, layer: int) -> StateRows:
        if self._found is None or layer != self._layer:
            assert not self._lent, f"layer {layer} begins, layer {self._layer} is not settled"
            self._layer, self._home, trip = layer, self._find(layer), self._trip
            self._found = self._home if trip is None else trip.away.at(self._home, trip.rows)
            if trip is None:
                for index in self._fresh:
                    self._found.memory[self._found.rows[index]] = 0
            elif not trip.is_there:
                trip.away.bring(self._home, trip.rows, self._fresh)
        return self._found

    def _take(self, found: StateRows, kind: StateKind, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        parts = zip(found.group.parts, found.group.offsets, strict=True)
        part, offset = next(each for each in parts if (each[0].kind, each[0].number) == (kind, number))
        slots, rows = found.view(part, offset), found.rows
        dtype = self._dtype if slots.dtype.itemsize == self._dtype.itemsize == 2 else slots.dtype
        if dtype == slots.dtype and list(rows) == list(range(rows[0], rows[0] + len(rows))):
            return slots[rows[0] : rows[0] + len(rows)], None
        return slots[_index(found)].to(dtype), slots


def _index(found: StateRows) -> torch.Tensor:
    """The rows, where their memory is."""
    return torch.tensor(found.rows).to(found.memory.device)
