"""The seats of a simulation (`play.py`): what computes in it, and how a seat takes micro-batches through a layer.

In: costs, the servers that move bytes, what has come. Out: processes of `lanes.py`. `model/engine.py` runs so.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Self

from tiered.plan.hardware import GpuRates
from tiered.plan.inputs import Machine, ModelShape
from tiered.plan.lanes import Clock, Event, Kind, Process, Server, Transfer
from tiered.plan.plan import Plan
from tiered.plan.play_kv import KVPlayer
from tiered.plan.unit_cost import UnitCosts

_LEAST_SECONDS: Final = 1e-7
"""What is not worth a look at the disk."""
Group = list[dict[int, range]]
"""Micro-batches with the same KV blocks in memory: tokens by number of their segment."""


@dataclass(frozen=True)
class Device:
    """A processor with memory of its own, to which all weights are copied."""

    rates: GpuRates
    resident: frozenset[int]
    """Units that stay there, by their number on the tape: they are read and copied once."""
    ring_nbytes: int
    """Memory through which the others pass."""

    @classmethod
    def of(cls, plan: Plan, rates: GpuRates) -> Self:
        """The device of `plan`, which has one."""
        assert plan.device is not None
        return cls(rates, plan.device.placement.resident, plan.device.placement.ring_nbytes)


class Computer:
    """One that computes, on a lane of its own. Each byte that the disk reads meanwhile delays it by so many seconds."""

    def __init__(self, clock: Clock, disk: Server, lane: str, reading_seconds: float) -> None:
        self.lane = lane
        self._clock, self._disk, self._reading_seconds = clock, disk, reading_seconds
        self.busy_seconds = 0.0
        """So far."""

    def busy(self, name: str, kind: Kind, seconds: float) -> Process:
        """Compute, and as much longer as the bytes that are read meanwhile take of the processor."""
        start, left = self._clock.now, seconds
        while True:
            before = self._disk.nbytes
            yield left
            left = (self._disk.nbytes - before) * self._reading_seconds
            if left < _LEAST_SECONDS:
                break
        seconds = self._clock.now - start
        self.busy_seconds += seconds
        self._clock.events.append(Event(self.lane, name, kind, start, seconds))


class Waits:
    """Seconds that something waits, by what for."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds: dict[Kind, float] = {}
        """Of this pass."""

    def until(self, lane: str, has_come: Callable[[], bool], name: str, kind: Kind) -> Process:
        """Wait, and note for what."""
        if not has_come():
            start = self._clock.now
            yield has_come
            seconds = self._clock.now - start
            self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds
            self._clock.events.append(Event(lane, name, kind, start, seconds))


class ExpertReads:
    """The cache of experts, in numbers: how many are in memory, whichever they are."""

    def __init__(self, plan: Plan, model: ModelShape, machine: Machine, disk: Server) -> None:
        rate = machine.expert_bytes_per_second or machine.disk_bytes_per_second
        assert rate is not None
        self._plan, self._model, self._machine, self._disk, self._rate = plan, model, machine, disk, rate
        self._cached, self._missing = 0.0, 0.0
        """Experts in memory, and the fraction of one that has not been read yet."""
        # What is copied to a device has been touched before.
        self._untouched = 0 if plan.experts is None or plan.device is not None else plan.experts.slots
        """Slots whose memory has not been touched."""

    def read(self, name: str, chosen: float) -> tuple[float, list[Transfer]]:
        """Of `chosen` experts, how many are not in memory, and the reads that bring them."""
        cache, experts = self._plan.experts, self._model.experts
        assert cache is not None and experts is not None
        lacking = chosen * (1 - self._cached / experts.total)
        self._cached = min(cache.slots, self._cached + lacking)
        count = int(self._missing + lacking + 1e-9)
        self._missing += lacking - count
        return lacking, [self._read(name, experts.file_nbytes, cache.slot_nbytes) for _ in range(count)]

    def _read(self, name: str, nbytes: int, slot_nbytes: int) -> Transfer:
        """Begin to read an expert into a slot, which is touched meanwhile if nothing has been in it."""
        seconds = nbytes / self._rate
        if self._untouched:
            self._untouched -= 1
            seconds += self._machine.touch_seconds(slot_nbytes)
        return self._disk.move("urgent", name, "experts", nbytes, nbytes / seconds)


@dataclass(frozen=True, eq=False)
class Turn:
    """What one seat does in a pass."""

    seat: "Seat"
    groups: Sequence[tuple[int, Group]]
    """With their numbers among those of all seats."""
    prompts: Collection[int]
    """Segments that are of prompts."""

    @property
    def micro_batches(self) -> list[dict[int, range]]:
        return [part for _, group in self.groups for part in group]

    @property
    def tokens(self) -> int:
        return sum(len(tokens) for part in self.micro_batches for tokens in part.values())

    @property
    def is_held(self) -> bool:
        """Whether a layer's units are used more than once."""
        return len(self.micro_batches) > 1

    def attends_elsewhere(self) -> bool:
        """Whether any queries of it follow the cache to the processor."""
        return any(self.seat.leaves(number, self.prompts) for part in self.micro_batches for number in part)


@dataclass(frozen=True)
class Lanes:
    """What all seats of a simulation share."""

    clock: Clock
    disk: Server
    bus: Server
    waits: Waits
    processor: Computer
    experts: ExpertReads | None
    names: Sequence[str]
    """Of units."""


class Seat:
    """Where micro-batches compute: the processor, or `device`. `there` is what has come to where it computes,
    `give_back` is called with the number of a pass and units that it has computed with in it, and `pages` are for a KV
    cache on disk: whether those of a layer and group have come, and what gives them back.
    """

    def __init__(
        self,
        plan: Plan,
        model: ModelShape,
        costs: UnitCosts,
        elsewhere: UnitCosts,
        lanes: Lanes,
        there: dict[int, Transfer],
        give_back: Callable[["Seat", int, Iterable[int]], None],
        pages: KVPlayer | None,
        device: Device | None = None,
    ) -> None:
        self._plan, self._model, self._costs, self._elsewhere = plan, model, costs, elsewhere
        self._lanes, self.there, self._returned, self._pages, self.device = lanes, there, give_back, pages, device
        self.computer = lanes.processor
        self._wait_lane = "wait"
        if device is not None:
            # Whoever reads takes nothing from it.
            self.computer = Computer(lanes.clock, lanes.disk, "gpu", 0.0)
            self._wait_lane = "gpu wait"
        self.passed_by = 0
        """Units before this number on the endless tape are not wanted any more, come or not: a pass without logits
        needs no head."""
        self.is_away = device is not None and not plan.cache.on_device
        """Whether the KV cache is elsewhere."""
        state = plan.cache.state if self.is_away else None
        self._state_of = {} if state is None else {n: group.nbytes for group in state.groups for n in group.layers}
        """Bytes of a sequence's recurrent state, by layer, where it crosses the bus."""
        groups = plan.cache.groups if self.is_away else ()
        self._kv_of = {layer: group.shape.token_nbytes for group in groups for layer in group.layers}
        """Bytes of a token's keys and values, by layer, where they go back over it."""
        self._leaving: list[Transfer] = []
        """States, keys and values of the layer that is computed, on their way back."""
        self._at = (-1, -1)
        """The pass and the layer that are computed."""
        self._sent = self._attended = 0
        """Micro-batches that have been computed so far that these are on their way, or that attention is done."""
        self._hidden: Iterator[int] = iter(())
        """Rows of the hidden states of the pass that wait in the host's memory, and still have to come back."""
        self._returning: Transfer | None = None
        """The copy of those that are next."""

    def begin(self, turn: Turn, layers: int) -> None:
        """A pass begins, of which the seat computes `turn`."""
        rows_of = [sum(map(len, part.values())) for part in turn.micro_batches]
        waits = self.device is not None and self._plan.waiting_nbytes(turn.tokens) > 0
        self._hidden = iter(rows_of * layers if waits else ())

    def leaves(self, number: int, prompts: Collection[int]) -> bool:
        """Whether queries of segment `number` follow the cache to the processor; those of `prompts` do not."""
        return self.is_away and number not in prompts

    def layer(self, number: int, layer: int, units: range, turn: Turn) -> Process:
        """All micro-batches of `turn` through a layer in pass `number`."""
        self._at, self._leaving, self._sent, self._attended = (number, layer), [], 0, 0
        is_first = True
        for index, group in turn.groups:
            if self._pages is not None:
                has_come = partial(self._pages.has_come, layer, index)
                yield from self.wait(has_come, f"kv of layer {layer}", "kv")
            for at in range(len(group)):
                yield from self._micro_batch(number, layer, units, turn, group, at, is_first)
                is_first = False
            if self._pages is not None:
                self._pages.give_back(layer, index)
        self._returned(self, number, units)

    def has_stored(self, number: int, layer: int, turn: Turn) -> bool:
        """Whether all that the KV cache gets of a layer in pass `number` has come to the host."""
        if layer not in self._kv_of and layer not in self._state_of:
            return True
        is_sent = self._at == (number, layer) and self._sent >= len(turn.micro_batches)
        return is_sent and all(transfer.is_done for transfer in self._leaving)

    def has_attended(self, number: int, layer: int, turn: Turn) -> bool:
        """Whether nothing of a layer in pass `number` needs the processor any more for attention."""
        return self._at == (number, layer) and self._attended >= len(turn.micro_batches)

    def _micro_batch(
        self, number: int, layer: int, units: range, turn: Turn, group: Group, at: int, is_first: bool
    ) -> Process:
        parts = group[at]
        rows = sum(map(len, parts.values()))
        yield from self._hidden_states(layer)
        yield from self._states(layer, group, at)
        attend = partial(self._attend, layer, parts, turn.prompts, rows)
        if is_first:
            yield from self.units(number, units, rows, turn.is_held, attend)
        else:
            yield from self._again(layer, units, rows, attend)
        if self._plan.experts is not None and self._costs.expert_layers[layer]:
            yield from self._experts(layer, rows)
        self._send_states_back(layer, group, at)

    def _attend(self, layer: int, parts: dict[int, range], prompts: Collection[int], rows: int) -> Process:
        """Attention, behind what computes queries, keys and values; these go back where the cache is elsewhere."""
        name = self._lanes.names[self._plan.tape.blocks[layer].start]
        if (nbytes := rows * self._kv_of.get(layer, 0)) > 0:
            self._leave(f"kv of layer {layer}", nbytes)
        if layer not in self._state_of:
            self._sent += 1
        keeper = self._lanes.processor if self.is_away else self.computer
        if seconds := self._elsewhere.storing(layer, parts.values()):
            yield from keeper.busy(name, "attention", seconds)
        for leaves, computer, costs in (
            (True, self._lanes.processor, self._elsewhere),
            (False, self.computer, self._costs),
        ):
            mine = [tokens for number, tokens in parts.items() if self.leaves(number, prompts) is leaves]
            if seconds := costs.attention(layer, mine):
                yield from computer.busy(name, "attention", seconds)
            self._attended += leaves

    def _states(self, layer: int, group: Group, part: int) -> Process:
        """Wait for the recurrent states that micro-batch `part` of `group` begins with: those of sequences that have
        begun, if the one before has not left them on the device."""
        if layer in self._state_of:
            assert self.device is not None
            before = group[part - 1] if part else {}
            count = sum(tokens.start > 0 for number, tokens in group[part].items() if number not in before)
            nbytes, name = count * self._state_of[layer], f"state of layer {layer}"
            coming = self._lanes.bus.move("copies", name, "kv", nbytes, self.device.rates.host_to_device)
            yield from self.wait(partial(getattr, coming, "is_done"), name, "kv")

    def _send_states_back(self, layer: int, group: Group, part: int) -> None:
        """Begin to copy the states that micro-batch `part` of `group` leaves, unless the next one goes on with them."""
        if layer in self._state_of:
            after = group[part + 1] if part + 1 < len(group) else {}
            nbytes = sum(number not in after for number in group[part]) * self._state_of[layer]
            self._leave(f"state of layer {layer}", nbytes)
            self._sent += 1

    def _leave(self, name: str, nbytes: int) -> None:
        """Begin a copy to the host's memory."""
        assert self.device is not None
        self._leaving.append(self._lanes.bus.move("back", name, "kv", nbytes, self.device.rates.device_to_host))

    def _hidden_states(self, layer: int) -> Process:
        """Wait for hidden states that have waited, if they did, and have those of the next micro-batch come. On their
        way back they cross the bus beside that."""
        coming = self._returning or self._return(layer)
        if coming is not None:
            self._returning = self._return(layer)
            yield from self.wait(partial(getattr, coming, "is_done"), layer_name(layer), "hidden")

    def _return(self, layer: int) -> Transfer | None:
        """Begin to copy the next hidden states to the device, if there are any."""
        rows = next(self._hidden, None)
        if rows is None:
            return None
        waiting = None if self._plan.device is None else self._plan.device.waiting
        assert waiting is not None and self.device is not None
        nbytes, rate = rows * waiting.token_nbytes, self.device.rates.host_to_device
        return self._lanes.bus.move("copies", layer_name(layer), "hidden", nbytes, rate)

    def units(
        self, number: int, units: range, rows: int, is_held: bool, attend: Callable[[], Process] | None = None
    ) -> Process:
        """`rows` rows through a block's dense units, with attention after the first one: queries, keys and values are
        computed first."""
        for unit in units:
            name, kind = self._lanes.names[unit], self.kind(unit)
            yield from self.wait(partial(self.has, number, unit), name, kind)
            yield from self.computer.busy(name, kind, self._costs.unit(unit, rows))
            if not is_held:
                self._returned(self, number, (unit,))
            if attend is not None and unit == units.start:
                yield from attend()

    def _again(self, layer: int, units: range, rows: int, attend: Callable[[], Process]) -> Process:
        """`rows` rows through a layer that is held since another micro-batch: nothing is waited for."""
        seconds = sum(self._costs.unit(unit, rows) for unit in units)
        kind: Kind = "resident" if self._plan.placement.resident.issuperset(units) else "layer"
        yield from self.computer.busy(layer_name(layer), kind, seconds)
        yield from attend()

    def _experts(self, layer: int, rows: int) -> Process:
        """A layer's experts for one micro-batch: those in memory, then the others as they are read. A device gets a
        copy of each, as none stays there."""
        experts, reading = self._model.experts, self._lanes.experts
        assert reading is not None and experts is not None
        chosen, each = self._costs.experts(rows)
        name = f"{layer_name(layer)}/experts"
        lacking, reads = reading.read(name, chosen)
        yield from self._copied(name, (chosen - lacking) * experts.nbytes)
        yield from self.computer.busy(name, "experts", (chosen - lacking) * each)
        for read in reads:
            yield from self.wait(partial(getattr, read, "is_done"), name, "experts")
            yield from self._copied(name, experts.nbytes)
            yield from self.computer.busy(name, "experts", lacking / len(reads) * each)
        if not reads:
            yield from self.computer.busy(name, "experts", lacking * each)

    def _copied(self, name: str, nbytes: float) -> Process:
        """Wait for a copy of experts to the device, if there is one."""
        if self.device is not None:
            rate = self.device.rates.host_to_device
            copy = self._lanes.bus.move("experts", name, "experts", int(nbytes), rate)
            yield from self.wait(partial(getattr, copy, "is_done"), name, "experts")

    def wait(self, has_come: Callable[[], bool], name: str, kind: Kind) -> Process:
        """Wait, and note for what."""
        return self._lanes.waits.until(self._wait_lane, has_come, name, kind)

    def key(self, number: int, unit: int) -> int:
        """The key of a unit of pass `number` in `there`."""
        resident = self._plan.placement.resident if self.device is None else self.device.resident
        count = len(self._plan.tape.nbytes)
        return unit - count if unit in resident else number * count + unit

    def has_begun(self, number: int, unit: int) -> bool:
        """Whether a unit of pass `number` is coming, has come, or is not wanted any more."""
        return self.key(number, unit) in self.there or number * len(self._plan.tape.nbytes) + unit < self.passed_by

    def has(self, number: int, unit: int) -> bool:
        """Whether a unit of pass `number` has come."""
        found = self.there.get(self.key(number, unit))
        return found is not None and found.is_done

    def kind(self, unit: int) -> Kind:
        return kind_of(self._plan, unit)


def kind_of(plan: Plan, unit: int) -> Kind:
    """What a unit is, for people."""
    if unit in plan.placement.resident:
        return "resident"
    return "head" if unit in plan.tape.blocks[-1] else "layer"


def unit_names(plan: Plan) -> list[str]:
    """Of units, as the runtime's traces name them: a block, and a number there if it is not the only one."""
    blocks = plan.tape.blocks
    names = [*map(layer_name, range(len(blocks) - 1)), "head"]
    return [
        name if len(units) == 1 else f"{name}/{number}"
        for name, units in zip(names, blocks, strict=True)
        for number in range(len(units))
    ]


def layer_name(number: int) -> str:
    return f"layer-{number:03}"
