"""Recurrent state: a slot of fixed size for each sequence in each layer that has one, beside the pages.

    StatePool      the slots, in memory or in the file behind the KV blocks
    BundleStates   transformers' cache as a mixer sees it: the states of the sequences that it computes together

A state follows its sequence: it is looked up when a layer computes, not when a pass is recorded, and is zero at the
first token. Some kernels write into the tensor that they were given, and tell nobody: what is lent is either the slot
itself, or a copy that is written back after the mixer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

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
    """Slots for the sequences of `plan`, which has a state. `memory` (uint8) is `plan.states_nbytes` long."""

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


class BundleStates:
    """The states of sequences that a mixer computes together, for one micro-batch. It serves one layer after the other;
    `settle` ends a layer.

    `find` gives the rows of a layer; `fresh` are the indices of the sequences that begin.
    """

    def __init__(self, find: FindRows, sequences: int, tokens: int, fresh: Sequence[int]) -> None:
        self.sequences, self.tokens = sequences, tokens
        """Tokens of each sequence."""
        self._find, self._fresh = find, tuple(fresh)
        self._layer: int | None = None
        self._found: StateRows | None = None
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

    def settle(self) -> None:
        """The mixer has computed: keep what was written into copies."""
        found = self._found
        for lent, slots in self._lent.values():
            if slots is not None and found is not None:
                slots[torch.tensor(found.rows)] = lent
        self._lent.clear()
        self._layer = self._found = None

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
            self._layer, self._found = layer, self._find(layer)
            for index in self._fresh:
                self._found.memory[self._found.rows[index]] = 0
        return self._found

    def _take(self, found: StateRows, kind: StateKind, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        parts = zip(found.group.parts, found.group.offsets, strict=True)
        part, offset = next(each for each in parts if (each[0].kind, each[0].number) == (kind, number))
        slots, rows = found.view(part, offset), found.rows
        if list(rows) == list(range(rows[0], rows[0] + len(rows))):
            return slots[rows[0] : rows[0] + len(rows)], None
        return slots[torch.tensor(rows)], slots
