"""The KV cache's memory: who holds which pages of it.

A page is 64 tokens of one sequence; its *KV block*, or block here, holds their keys and values in one layer. A
sequence holds a run of neighbouring blocks, the same numbers in every layer, for as long as it lives: nothing is copied
when it grows, and on disk what one layer needs of a sequence is one extent. Layers with a sliding window form a group
of their own, whose runs are rings: page j lies in block j modulo the length of the run.

Where blocks are quantized, or on disk, the page that is being filled lies in the sequence's *tail*, in memory and in
the compute dtype. A page is quantized once, when it is complete.
"""

import bisect
from dataclasses import dataclass, field

import torch

from tiered.cache.layout import PageLayout
from tiered.cache.outbox import Outbox
from tiered.cache.state import AwayStates, StatePool
from tiered.errors import ConfigError
from tiered.plan.kv import CachePlan


@dataclass(eq=False)
class SequenceKV:
    """One sequence's place in the cache, from `KVPool.reserve` to `release`."""

    capacity: int
    """Tokens there is room for."""
    first: tuple[int, ...]
    """Its first block in each group."""
    pages: tuple[int, ...]
    """How many blocks it holds in each group."""
    tail: int
    """Number of its tail, and of its slot among recurrent states."""
    length: int = 0
    """Tokens stored in every layer. It grows when a pass has ended. After one that failed the sequence must be
    released: some layers may have overwritten what another try would need."""

    def block(self, group: int, page: int) -> int:
        """The block of page number `page` in a group's layers."""
        assert self.pages[group], "it never completes a page"
        return self.first[group] + page % self.pages[group]


@dataclass
class _Runs:
    """Numbers 0 to `count` - 1, lent in runs of consecutive ones."""

    count: int
    taken: list[tuple[int, int]] = field(default_factory=list)
    """Starts and stops, ascending."""

    def find(self, wanted: int) -> int | None:
        """The number at which the first free run of `wanted` begins; None if there is none."""
        position = 0
        for start, stop in self.taken:
            if start - position >= wanted:
                return position
            position = stop
        return position if self.count - position >= wanted else None

    def take(self, start: int, wanted: int) -> None:
        bisect.insort(self.taken, (start, start + wanted))

    def give_back(self, start: int, wanted: int) -> None:
        self.taken.remove((start, start + wanted))


class KVPool:
    """Lends out the blocks of `plan`. `memory` (uint8) is `plan.pool_nbytes` long, in the host's memory or a device's.

    `outbox`: how states that a device has computed come to the pool, if that is in the host's memory. `states`: uint8
    of `plan.states_nbytes`, where the pool is, if the model has recurrent layers and they are in memory. `away`: what
    brings them to a device that computes, and is elsewhere.
    """

    def __init__(
        self,
        plan: CachePlan,
        memory: torch.Tensor,
        outbox: Outbox | None = None,
        states: torch.Tensor | None = None,
        away: AwayStates | None = None,
    ) -> None:
        assert not (plan.on_device and outbox), "what is on the device need not be copied out"
        self.plan, self.outbox, self.away = plan, outbox, away
        self.where = memory.device
        """Where the blocks are; where tails and scratch are, if blocks are on disk."""
        self.states = None if plan.state is None else StatePool(plan, memory.new_empty(0) if states is None else states)
        """Those of recurrent layers, if the model has any."""
        self.layouts = [PageLayout(group.shape, plan.bits, plan.slots) for group in plan.groups]
        """For each group, how its blocks lie."""
        self.exact = [PageLayout(group.shape, 16, plan.slots) for group in plan.groups]
        """For each group, how its tails lie, and pages that are being put together."""
        self._runs = [_Runs(plan.blocks(group)) for group in plan.groups]
        self._tails = _Runs(plan.sequences)
        self.group_of: list[int | None] = [None] * plan.layers
        """For each layer, the number of its group; None: it keeps no keys and values of its own."""
        self.source_of = [*range(plan.layers)]
        """For each layer, the one whose keys and values it reads: another's, if it keeps none."""
        self._layer_start, self._tails_start = [0] * plan.layers, [0] * plan.layers
        """Bytes from the start of the memory, or of the file, to each layer's blocks; and from that of the tails."""
        blocks = tails = 0
        for number, group in enumerate(plan.groups):
            for reader in group.readers:
                self.source_of[reader] = group.layers[0]
            for layer in group.layers:
                self.group_of[layer], self._layer_start[layer], self._tails_start[layer] = number, blocks, tails
                if not plan.shares_layers:
                    blocks += plan.blocks(group) * plan.block_nbytes(group)
                    tails += plan.sequences * plan.exact_nbytes(group)
        self._memory = None if plan.on_disk else memory[plan.tails_nbytes : plan.tails_nbytes + plan.blocks_nbytes]
        self._tails_memory = memory[: plan.tails_nbytes]
        self._scratch = memory.new_empty(0)

    def reserve(self, tokens: int) -> SequenceKV | None:
        """Room for a sequence of `tokens` tokens; None while other sequences hold too much.

        Raises ConfigError where it would not fit an empty cache either.
        """
        if not 0 < tokens <= self.plan.context:
            raise ConfigError(f"KV cache: a sequence of {tokens} tokens, planned for 1 to {self.plan.context}")
        pages = tuple(self.plan.pages(group, tokens) for group in self.plan.groups)
        first = [runs.find(count) for runs, count in zip(self._runs, pages, strict=True)]
        tail = self._tails.find(1)
        if tail is None or None in first:
            return None
        starts = tuple(start for start in first if start is not None)
        for runs, start, count in zip(self._runs, starts, pages, strict=True):
            runs.take(start, count)
        self._tails.take(tail, 1)
        return SequenceKV(tokens, starts, pages, tail)

    def release(self, kv: SequenceKV) -> None:
        """Take a sequence's blocks back."""
        for runs, start, count in zip(self._runs, kv.first, kv.pages, strict=True):
            runs.give_back(start, count)
        self._tails.give_back(kv.tail, 1)

    def overwritten(self, kv: SequenceKV) -> list[torch.Tensor]:
        """uint8: what lies in memory of a sequence and later tokens overwrite, as it is: tails and recurrent states."""
        found = []
        if self.plan.has_tails and not self.plan.shares_layers:
            kept = [layer for layer, group in enumerate(self.group_of) if group is not None]
            found = [self.tails(layer).view(self.plan.sequences, -1)[kv.tail] for layer in kept]
        if self.states is not None and not self.plan.on_disk:
            found += [self.states.slots(layer)[kv.tail] for layer in self.states.group_of]
        return found

    @property
    def is_empty(self) -> bool:
        """Whether no sequence holds anything."""
        return not self._tails.taken

    def group(self, layer: int) -> int:
        """The number of the group of `layer`, which must keep keys and values."""
        found = self.group_of[layer]
        assert found is not None, f"layer {layer} keeps no keys and values of its own"
        return found

    def layer_blocks(self, layer: int) -> torch.Tensor:
        """uint8: the blocks of `layer`, in memory."""
        assert self._memory is not None, "the blocks are on disk"
        start, group = self._layer_start[layer], self.group(layer)
        return self._memory[start : start + self._runs[group].count * self.layouts[group].block_nbytes]

    def file_offset(self, layer: int, block: int) -> int:
        """Where a block of `layer` lies in the file."""
        return self._layer_start[layer] + block * self.layouts[self.group(layer)].block_nbytes

    def tails(self, layer: int) -> torch.Tensor:
        """uint8: the tails of `layer`, one block in the compute dtype per sequence."""
        assert self.plan.has_tails, "blocks hold the compute dtype themselves"
        start, nbytes = self._tails_start[layer], self.exact[self.group(layer)].block_nbytes
        return self._tails_memory[start : start + self.plan.sequences * nbytes]

    def scratch(self, nbytes: int) -> torch.Tensor:
        """uint8: memory in which a micro-batch puts pages together. All share it, as they compute one by one."""
        if self._scratch.numel() < nbytes:
            self._scratch = self._scratch.new_empty(nbytes)
        return self._scratch[:nbytes]
