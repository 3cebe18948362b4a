"""The KV cache on disk in a simulation: reads ahead of computing, writes behind it, as `stream/kv.py` has them."""

from collections.abc import Sequence
from functools import partial

from tiered.plan.inputs import Machine
from tiered.plan.kv import LayerGroup
from tiered.plan.lanes import Clock, Process, Server, Transfer
from tiered.plan.plan import Plan
from tiered.units import PAGE_TOKENS


class KVPlayer:
    """Moves the pages and recurrent states of each pass, layer by layer, group by group, in a ring that lends bytes."""

    def __init__(self, plan: Plan, clock: Clock, disk: Server, machine: Machine) -> None:
        assert machine.disk_bytes_per_second is not None
        self._plan, self._clock, self._disk, self._read_rate = plan, clock, disk, machine.disk_bytes_per_second
        self._write_rate = machine.disk_write_bytes_per_second or self._read_rate
        self._group_of = {layer: group for group in plan.cache.groups for layer in group.layers}
        state = plan.cache.state
        self._state_of = {} if state is None else {n: group.nbytes for group in state.groups for n in group.layers}
        """Bytes of a sequence's recurrent state, by layer."""
        self._layers = sorted(self._group_of.keys() | self._state_of.keys())
        self._ring_nbytes = plan.cache.ring_nbytes + plan.cache.states_memory_nbytes
        self._lent = 0
        """Bytes of the ring in use."""
        self._writes: dict[int, list[Transfer]] = {}
        """Of each layer, those that have not been waited for."""
        self._reads: dict[tuple[int, int], Transfer] = {}
        self._sequences: list[list[range]] = []
        """Of each group, all tokens of its sequences in this pass."""

    def begin(self, segments: Sequence[range], groups: Sequence[list[dict[int, range]]]) -> None:
        """A pass begins."""
        self._reads = {}
        self._sequences = [[segments[number] for number in sorted(set().union(*group))] for group in groups]
        self._clock.start(self._feed())

    def has_come(self, layer: int, group: int) -> bool:
        """Whether a group's pages and states of a layer, if it has any, are in memory."""
        read = self._reads.get((layer, group))
        return layer not in self._layers or (read is not None and read.is_done)

    def give_back(self, layer: int, group: int) -> None:
        """A group has been computed through a layer: what it has completed is written, then its memory is free."""
        if layer not in self._layers:
            return
        of, nbytes = self._group_of.get(layer), len(self._sequences[group]) * self._state_of.get(layer, 0)
        if of is not None:
            pages = sum(
                min(tokens.stop // PAGE_TOKENS - tokens.start // PAGE_TOKENS, self._plan.cache.pages(of, tokens.stop))
                for tokens in self._sequences[group]
            )
            nbytes += pages * self._plan.cache.block_nbytes(of)
        write = self._disk.move("kv write", f"kv of layer {layer}", "kv", nbytes, self._write_rate)
        self._writes.setdefault(layer, []).append(write)
        self._clock.start(self._free(write, self._nbytes(layer, group)))

    def _feed(self) -> Process:
        for layer in self._layers:
            writes = self._writes.pop(layer, [])
            yield partial(_have_ended, writes)
            for group, sequences in enumerate(self._sequences):
                yield partial(self._lend, self._nbytes(layer, group))
                nbytes = sum(tokens.start > 0 for tokens in sequences) * self._state_of.get(layer, 0)
                if (of := self._group_of.get(layer)) is not None:
                    pages = sum(tokens.start // PAGE_TOKENS - _oldest(of, tokens) for tokens in sequences)
                    nbytes += pages * self._plan.cache.block_nbytes(of)
                name = f"kv of layer {layer}"
                self._reads[layer, group] = self._disk.move("kv read", name, "kv", nbytes, self._read_rate)

    def _lend(self, nbytes: int) -> bool:
        """Lend bytes of the ring if they are free."""
        if self._lent + nbytes > self._ring_nbytes:
            return False
        self._lent += nbytes
        return True

    def _free(self, write: Transfer, nbytes: int) -> Process:
        yield lambda: write.is_done
        self._lent -= nbytes

    def _nbytes(self, layer: int, group: int) -> int:
        """Bytes of the ring for a group's pages and states in a layer."""
        sequences, of = self._sequences[group], self._group_of.get(layer)
        nbytes = len(sequences) * self._state_of.get(layer, 0)
        if of is None:
            return nbytes
        pages = sum(tokens.stop // PAGE_TOKENS - _oldest(of, tokens) for tokens in sequences)
        return nbytes + pages * self._plan.cache.block_nbytes(of)


def _have_ended(transfers: Sequence[Transfer]) -> bool:
    return all(transfer.is_done for transfer in transfers)


def _oldest(of: LayerGroup, tokens: range) -> int:
    """The first page that these tokens see."""
    return of.first_seen(tokens.start) // PAGE_TOKENS
