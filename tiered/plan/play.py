"""The processes of a simulation (`simulate.py`): feed, copy, compute, and those of the KV cache.

In: a plan, its costs, the loads of passes. Out: what each pass took, and events. For one simulation.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final, Self

from tiered.plan.hardware import GpuRates
from tiered.plan.inputs import Machine, ModelShape
from tiered.plan.lanes import Clock, Event, Kind, Process, Server, Transfer
from tiered.plan.load import PassLoad
from tiered.plan.order import Reading, feed_order
from tiered.plan.pace import Pace
from tiered.plan.passes import limits_of, plan_micro_batches
from tiered.plan.plan import Plan
from tiered.plan.play_kv import KVPlayer
from tiered.plan.unit_cost import UnitCosts

_LEAST_SECONDS: Final = 1e-7
"""What is not worth a look at the disk."""
Group = list[dict[int, range]]
"""Micro-batches with the same KV blocks in memory."""


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


@dataclass(frozen=True)
class SimulatedPass:
    """What a pass took."""

    load: PassLoad
    start: float
    seconds: float
    compute_seconds: float
    waits: tuple[tuple[Kind, float], ...]
    """Seconds in which computing waited, by what for."""
    disk_seconds: float
    """Seconds of the pass in which the disk was busy, for this pass or the next."""
    disk_nbytes: int
    bus_seconds: float = 0.0
    """The same of the bus to a device."""

    @property
    def disk_idle_seconds(self) -> float:
        """Seconds in which the disk waited for memory to become free."""
        return max(0.0, self.seconds - self.disk_seconds)


class Player:
    """Plays passes of `plan` on `machine`, whose rates must be known; `device`, if there is one, computes."""

    def __init__(self, plan: Plan, model: ModelShape, machine: Machine, device: Device | None = None) -> None:
        assert machine.disk_bytes_per_second is not None
        self._plan, self._model, self._device = plan, model, device
        self._stay = plan.placement.resident | (frozenset() if device is None else device.resident)
        """Units that are read once."""
        self._costs, self._disk_rate = UnitCosts(plan, model, machine), machine.disk_bytes_per_second
        self._expert_rate = machine.expert_bytes_per_second or self._disk_rate
        self._kept_rate = machine.kept_bytes_per_second or self._disk_rate
        self._reading_seconds = machine.reading_seconds
        self.clock = Clock()
        self.passes: list[SimulatedPass] = []
        self._disk = Server(self.clock, "disk", {"ahead": "urgent"})
        self._bus = Server(self.clock, "bus")
        self._kv = KVPlayer(plan, self.clock, self._disk, machine) if plan.cache.on_disk else None
        state = None if device is None or plan.cache.on_device else plan.cache.state
        self._state_of = {} if state is None else {n: group.nbytes for group in state.groups for n in group.layers}
        """Bytes of a sequence's recurrent state, by layer, where it crosses the bus."""
        self._host: dict[int, Transfer] = {}
        """Reads of units by number on the endless tape, or of resident ones by number on the tape less its length."""
        self._there: dict[int, Transfer] = self._host if device is None else {}
        """What computing waits for: the reads, or the copies to the device."""
        self._ring: dict[int, range] = {}
        """Bytes of the ring that are lent, by number on the endless tape."""
        self._device_ring: dict[int, range] = self._ring if device is None else {}
        self._names = _names(plan)
        self._passed_by = 0
        """Units before this number on the endless tape are not wanted any more, read or not: a pass without logits
        needs no head."""
        self._last: int | None = None
        """The last pass, once it has begun."""
        self._is_over = False
        self._cached, self._missing = 0.0, 0.0
        """Experts in memory, and the fraction of one that has not been read yet."""
        self._waits: dict[Kind, float] = {}
        self._computed = 0.0
        self._hidden: Iterator[int] = iter(())
        """Rows of the hidden states of the pass that wait in the host's memory, and still have to come back."""
        self._returning: Transfer | None = None
        """The copy of those that are next."""

    def run(self, loads: Iterator[PassLoad], pace: Pace) -> None:
        """Play `loads`; `pace` learns from each before the next one is asked for."""
        self.clock.start(self._feed())
        if self._device is not None:
            self.clock.start(self._copy(self._device))
        self.clock.start(self._compute(loads, pace))
        self.clock.run(lambda: self._is_over)
        assert self._is_over, "computing waits for what can never come"

    def _feed(self) -> Process:
        """Read the tape, unit by unit, as `stream/feed.py` does."""
        tape, placement = self._plan.tape, self._plan.placement
        held = self._plan.held if self._plan.device is None else self._plan.host_held
        for turn in feed_order(tape, held, self._stay, placement.ring_nbytes):
            if turn.start is None and turn.passed:
                continue
            yield partial(self._has_room, turn, self._ring)
            if self._is_unwanted(turn):
                continue
            nbytes, kind = tape.file_nbytes[turn.position], self._kind(turn.position)
            rate = self._kept_rate if turn.position in placement.resident else self._disk_rate
            read = self._disk.move("ahead", self._names[turn.position], kind, nbytes, rate)
            self._host[self._key(turn, self._stay)] = read

    def _copy(self, device: Device) -> Process:
        """Copy the tape to the device, unit by unit, each when it has been read."""
        tape = self._plan.tape
        for turn in feed_order(tape, self._plan.held, device.resident, device.ring_nbytes):
            if turn.start is None and turn.passed:
                continue
            key = self._key(turn, self._stay)
            yield partial(self._is_read_or_unwanted, turn, key)
            yield partial(self._has_room, turn, self._device_ring)
            if self._is_unwanted(turn):
                self._ring.pop(turn.number, None)
                continue
            nbytes, kind = tape.nbytes[turn.position], self._kind(turn.position)
            copy = self._bus.move("copies", self._names[turn.position], kind, nbytes, device.rates.host_to_device)
            self._there[self._key(turn, device.resident)] = copy
            yield partial(getattr, copy, "is_done")
            self._ring.pop(turn.number, None)

    def _is_unwanted(self, turn: Reading) -> bool:
        """Whether computing has passed a unit by that would go into a ring; what is to stay is wanted later."""
        return turn.start is not None and turn.number < self._passed_by

    def _is_read_or_unwanted(self, turn: Reading, key: int) -> bool:
        return _has_come(self._host, key) or self._is_unwanted(turn)

    def _has_room(self, turn: Reading, ring: dict[int, range]) -> bool:
        """Lend a unit its place in `ring`, if it has one, it is free, and the unit's pass will come; an unwanted one
        needs none."""
        if turn.start is None or self._is_unwanted(turn):
            return True
        wanted = range(turn.start, turn.start + self._plan.tape.nbytes[turn.position])
        if self._last is not None and turn.passed > self._last:
            return False
        if any(lent.start < wanted.stop and wanted.start < lent.stop for lent in ring.values()):
            return False
        ring[turn.number] = wanted
        return True

    def _compute(self, loads: Iterator[PassLoad], pace: Pace) -> Process:
        """Compute all passes, as `model/engine.py` does."""
        limits = limits_of(self._plan, self._model.dense_attention)
        for number, load in enumerate(loads):
            self._last = number if load.is_last else None
            self._waits, self._computed = {}, 0.0
            start, busy, moved = self.clock.now, self._disk.busy_seconds, self._disk.nbytes
            copied = self._bus.busy_seconds
            groups = plan_micro_batches(load.segments, limits)
            if self._kv is not None:
                self._kv.begin(load.segments, groups)
            is_held = sum(map(len, groups)) > 1
            waits = self._plan.waiting_nbytes(sum(map(len, load.segments))) > 0
            *layers, head = self._plan.tape.blocks
            rows_of = [sum(map(len, part.values())) for group in groups for part in group]
            self._hidden = iter(rows_of * len(layers) if waits else ())
            for layer, units in enumerate(layers):
                for index, group in enumerate(groups):
                    yield from self._group(number, layer, units, group, index, is_held)
                self._give_back(number, units if is_held else ())
            steps = [min(self._plan.head_rows, load.logits - at) for at in range(0, load.logits, self._plan.head_rows)]
            for rows in steps:
                yield from self._units(number, head, rows, len(steps) > 1)
            self._give_back(number, head)
            seconds, disk_seconds = self.clock.now - start, self._disk.busy_seconds - busy
            pace.note(load.decoding, load.prompt_tokens, self._computed, disk_seconds)
            waited, nbytes = tuple(self._waits.items()), round(self._disk.nbytes - moved)
            bus_seconds = self._bus.busy_seconds - copied
            self.passes.append(
                SimulatedPass(load, start, seconds, self._computed, waited, disk_seconds, nbytes, bus_seconds)
            )
        self._is_over = True

    def _group(self, number: int, layer: int, units: range, group: Group, index: int, is_held: bool) -> Process:
        """One group of micro-batches through a layer."""
        if self._kv is not None:
            yield from self._wait(partial(self._kv.has_come, layer, index), f"kv of layer {layer}", "kv")
        for part, tokens_of in enumerate(group):
            parts = list(tokens_of.values())
            rows = sum(map(len, parts))
            attention = self._costs.attention(layer, parts)
            yield from self._hidden_states(layer)
            yield from self._states(layer, group, part)
            if index or part:
                yield from self._again(layer, units, rows, attention)
            else:
                yield from self._units(number, units, rows, is_held, attention)
            if self._plan.experts is not None and self._costs.expert_layers[layer]:
                yield from self._experts(layer, rows)
            self._send_states_back(layer, group, part)
        if self._kv is not None:
            self._kv.give_back(layer, index)

    def _states(self, layer: int, group: Group, part: int) -> Process:
        """Wait for the recurrent states that micro-batch `part` of `group` begins with: those of sequences that have
        begun, if the one before has not left them on the device."""
        if layer in self._state_of:
            assert self._device is not None
            before = group[part - 1] if part else {}
            count = sum(tokens.start > 0 for number, tokens in group[part].items() if number not in before)
            nbytes, name = count * self._state_of[layer], f"state of layer {layer}"
            coming = self._bus.move("copies", name, "kv", nbytes, self._device.rates.host_to_device)
            yield from self._wait(partial(getattr, coming, "is_done"), name, "kv")

    def _send_states_back(self, layer: int, group: Group, part: int) -> None:
        """Begin to copy the states that micro-batch `part` of `group` leaves, unless the next one goes on with them."""
        if layer in self._state_of:
            assert self._device is not None
            after = group[part + 1] if part + 1 < len(group) else {}
            nbytes = sum(number not in after for number in group[part]) * self._state_of[layer]
            self._bus.move("states", f"state of layer {layer}", "kv", nbytes, self._device.rates.device_to_host)

    def _hidden_states(self, layer: int) -> Process:
        """Wait for hidden states that have waited, if they did, and have those of the next micro-batch come. On their
        way back they cross the bus beside that."""
        coming = self._returning or self._return(layer)
        if coming is not None:
            self._returning = self._return(layer)
            yield from self._wait(partial(getattr, coming, "is_done"), _layer(layer), "hidden")

    def _return(self, layer: int) -> Transfer | None:
        """Begin to copy the next hidden states to the device, if there are any."""
        rows = next(self._hidden, None)
        if rows is None:
            return None
        waiting = None if self._plan.device is None else self._plan.device.waiting
        assert waiting is not None and self._device is not None
        nbytes, rate = rows * waiting.token_nbytes, self._device.rates.host_to_device
        return self._bus.move("copies", _layer(layer), "hidden", nbytes, rate)

    def _units(self, number: int, units: range, rows: int, is_held: bool, attention: float = 0.0) -> Process:
        """`rows` rows through a block's dense units, with attention after the first one: queries, keys and values are
        computed first."""
        for unit in units:
            key = self._number(number, unit)
            yield from self._wait(partial(_has_come, self._there, key), self._names[unit], self._kind(unit))
            yield from self._busy(self._names[unit], self._kind(unit), self._costs.unit(unit, rows))
            if not is_held:
                self._give_back(number, (unit,))
            if attention and unit == units.start:
                yield from self._busy(self._names[unit], "attention", attention)

    def _again(self, layer: int, units: range, rows: int, attention: float) -> Process:
        """`rows` rows through a layer that is held since another micro-batch: nothing is waited for."""
        seconds = attention + sum(self._costs.unit(unit, rows) for unit in units)
        kind: Kind = "resident" if self._plan.placement.resident.issuperset(units) else "layer"
        yield from self._busy(_layer(layer), kind, seconds)

    def _experts(self, layer: int, rows: int) -> Process:
        """A layer's experts for one micro-batch: those in memory, then the others as they are read. A device gets a
        copy of each, as none stays there."""
        cache, experts = self._plan.experts, self._model.experts
        assert cache is not None and experts is not None
        chosen, each = self._costs.experts(rows)
        lacking = chosen * (1 - self._cached / experts.total)
        self._cached = min(cache.slots, self._cached + lacking)
        count = int(self._missing + lacking + 1e-9)
        self._missing += lacking - count
        name, nbytes = f"{_layer(layer)}/experts", experts.file_nbytes
        reads = [self._disk.move("urgent", name, "experts", nbytes, self._expert_rate) for _ in range(count)]
        yield from self._copied(name, (chosen - lacking) * experts.nbytes)
        yield from self._busy(name, "experts", (chosen - lacking) * each)
        for read in reads:
            yield from self._wait(partial(getattr, read, "is_done"), name, "experts")
            yield from self._copied(name, experts.nbytes)
            yield from self._busy(name, "experts", lacking / count * each)
        if not reads:
            yield from self._busy(name, "experts", lacking * each)

    def _copied(self, name: str, nbytes: float) -> Process:
        """Wait for a copy of experts to the device, if there is one."""
        if self._device is not None:
            copy = self._bus.move("experts", name, "experts", int(nbytes), self._device.rates.host_to_device)
            yield from self._wait(partial(getattr, copy, "is_done"), name, "experts")

    def _wait(self, has_come: "partial[bool]", name: str, kind: Kind) -> Process:
        """Wait, and note for what."""
        if not has_come():
            start = self.clock.now
            yield has_come
            seconds = self.clock.now - start
            self._waits[kind] = self._waits.get(kind, 0.0) + seconds
            self.clock.events.append(Event("wait", name, kind, start, seconds))

    def _busy(self, name: str, kind: Kind, seconds: float) -> Process:
        """Compute, and as much longer as the bytes that are read meanwhile take of the processor."""
        start, left = self.clock.now, seconds
        while True:
            before = self._disk.nbytes
            yield left
            left = (self._disk.nbytes - before) * self._reading_seconds
            if left < _LEAST_SECONDS:
                break
        seconds = self.clock.now - start
        self._computed += seconds
        self.clock.events.append(Event("compute", name, kind, start, seconds))

    def _give_back(self, number: int, units: Iterable[int]) -> None:
        """These units of a pass have been computed with, or passed by."""
        for unit in units:
            key = number * len(self._plan.tape.nbytes) + unit
            self._passed_by = key + 1
            if self._device_ring.pop(key, None) is not None:
                del self._there[key]

    def _number(self, number: int, unit: int) -> int:
        """The key of a unit of pass `number` where computing looks for it."""
        resident = self._plan.placement.resident if self._device is None else self._device.resident
        count = len(self._plan.tape.nbytes)
        return unit - count if unit in resident else number * count + unit

    def _key(self, turn: Reading, resident: frozenset[int]) -> int:
        """The same for a unit's turn."""
        return turn.position - len(self._plan.tape.nbytes) if turn.position in resident else turn.number

    def _kind(self, unit: int) -> Kind:
        if unit in self._plan.placement.resident:
            return "resident"
        return "head" if unit in self._plan.tape.blocks[-1] else "layer"


def _names(plan: Plan) -> list[str]:
    """Of units, as the runtime's traces name them: a block, and a number there if it is not the only one."""
    blocks = plan.tape.blocks
    names = [*map(_layer, range(len(blocks) - 1)), "head"]
    return [
        name if len(units) == 1 else f"{name}/{number}"
        for name, units in zip(names, blocks, strict=True)
        for number in range(len(units))
    ]


def _layer(number: int) -> str:
    return f"layer-{number:03}"


def _has_come(transfers: dict[int, Transfer], key: int) -> bool:
    return key in transfers and transfers[key].is_done
