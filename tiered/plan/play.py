"""The processes of a simulation (`simulate.py`): feed, copy, compute.

In: a plan, a machine, the loads of passes. Out: what each pass took, and events. For one simulation.

One thread computes at the processor's seat, and hands a device what that is to compute: layer by layer, as soon as the
layer's last copy has begun. A device goes on behind it, until the processor wants what it has computed.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from tiered.plan.gpu import on_gpu
from tiered.plan.inputs import Machine, ModelShape
from tiered.plan.lanes import Clock, Kind, Process, Server, Transfer
from tiered.plan.load import PassLoad
from tiered.plan.order import Reading, feed_order
from tiered.plan.pace import Pace
from tiered.plan.passes import limits_of, plan_micro_batches
from tiered.plan.plan import Plan
from tiered.plan.play_kv import KVPlayer
from tiered.plan.play_seat import (
    Computer,
    Device,
    ExpertReads,
    Lanes,
    Seat,
    Turn,
    Waits,
    kind_of,
    layer_name,
    unit_names,
)
from tiered.plan.unit_cost import UnitCosts
from tiered.units import MIB

_TOUCHED_NBYTES: Final = 2 * MIB
"""Memory is touched in huge pages."""


@dataclass(frozen=True)
class SimulatedPass:
    """What a pass took."""

    load: PassLoad
    start: float
    seconds: float
    compute_seconds: float
    """Seconds in which the processor computed, or touched memory for the first time."""
    waits: tuple[tuple[Kind, float], ...]
    """Seconds in which computing waited, by what for; of both seats together, where there are two."""
    disk_seconds: float
    """Seconds of the pass in which the disk was busy, for this pass or the next, what it reads into being touched for
    the first time among them."""
    disk_nbytes: int
    bus_seconds: float = 0.0
    """The same of the bus to a device."""
    gpu_seconds: float = 0.0
    """Seconds in which the device computed."""

    @property
    def disk_idle_seconds(self) -> float:
        """Seconds in which the disk waited for memory to become free."""
        return max(0.0, self.seconds - self.disk_seconds)


class Player:
    """Plays passes of `plan` on `machine`, whose rates must be known, and on `device`, if there is one, what the plan
    has it compute."""

    def __init__(self, plan: Plan, model: ModelShape, machine: Machine, device: Device | None = None) -> None:
        assert machine.disk_bytes_per_second is not None
        self._plan, self._model = plan, model
        self._stay = plan.placement.resident | (frozenset() if device is None else device.resident)
        """Units that are read once."""
        self._disk_rate = machine.disk_bytes_per_second
        self._kept_rate = machine.kept_rate(is_touched=plan.device is not None)
        self._machine = machine
        self._untouched = set(range(0, plan.placement.ring_nbytes, _TOUCHED_NBYTES))
        """Where the ring has not been touched."""
        self.clock = Clock()
        self.passes: list[SimulatedPass] = []
        self._disk = Server(self.clock, "disk", {"ahead": "urgent"})
        self._bus = Server(self.clock, "bus")
        self._waits = Waits(self.clock)
        self._kv = KVPlayer(plan, self.clock, self._disk, machine) if plan.cache.on_disk else None
        self._host: dict[int, Transfer] = {}
        """Reads of units by number on the endless tape, or of resident ones by number on the tape less its length."""
        self._ring: dict[int, range] = {}
        """Bytes of the ring that are lent, by number on the endless tape."""
        self._device_ring: dict[int, range] = {}
        """The same of the device's."""
        self._names = unit_names(plan)
        self._processor = Computer(self.clock, self._disk, "compute", machine.reading_seconds)
        self._make_seats(machine, device)
        self._users: dict[int, set[Seat]] = {}
        """Who takes part in each pass that has begun."""
        self._left: dict[int, set[Seat]] = {}
        """Of units that some have given back: who has not."""
        self._joined: list[int] = []
        """Passes in which the device has taken part since it had no memory; the order of its copies counts these."""
        self._rests = 0
        """How often it has given its memory back."""
        self._given: deque[Process] = deque()
        """What the device has been handed, and has not done."""
        self._last: int | None = None
        """The last pass, once it has begun."""
        self._is_over = False

    def _make_seats(self, machine: Machine, device: Device | None) -> None:
        """The seats for prompts and for the rest, which may be one."""
        plan, model = self._plan, self._model
        machine = machine.keeping(plan.cache.bits, plan.cache.on_device)
        costs = UnitCosts(plan, model, machine)
        experts = None if plan.experts is None else ExpertReads(plan, model, machine, self._disk)
        lanes = Lanes(self.clock, self._disk, self._bus, self._waits, self._processor, experts, self._names)

        def seat(of: UnitCosts, there: dict[int, Transfer], device: Device | None) -> Seat:
            return Seat(plan, model, of, costs, lanes, there, self._give_back, self._kv, device)

        self._prefill = self._decode = seat(costs, self._host, None)
        if device is not None:
            there = UnitCosts(plan, model, on_gpu(machine, model, plan.cache, device.rates))
            self._prefill = seat(there, {}, device)
            self._decode = self._prefill if plan.decode_device == "gpu" else self._decode
        self._seats = {self._prefill, self._decode}

    @property
    def _is_shared(self) -> bool:
        """Whether prompts are computed elsewhere than the rest."""
        return self._prefill is not self._decode

    @property
    def _goes_on_beside(self) -> bool:
        """Whether the processor computes beside a device, and does not take turns with it inside each layer."""
        return self._is_shared and self._plan.experts is None and self._kv is None

    def run(self, loads: Iterator[PassLoad], pace: Pace) -> None:
        """Play `loads`; `pace` learns from each before the next one is asked for."""
        self.clock.start(self._feed())
        if self._prefill.device is not None:
            self.clock.start(self._copy(self._prefill, self._prefill.device))
            self.clock.start(self._serve())
        self.clock.start(self._compute(loads, pace))
        self.clock.run(lambda: self._is_over)
        assert self._is_over, "computing waits for what can never come"

    def _feed(self) -> Process:
        """Read the tape, unit by unit, as `stream/feed.py` does."""
        tape, placement = self._plan.tape, self._plan.placement
        held = self._plan.held if self._prefill.device is None else self._plan.host_held
        for turn in feed_order(tape, held, self._stay, placement.ring_nbytes):
            if turn.start is None and turn.passed:
                continue
            yield partial(self._has_room, turn, self._ring)
            if self._is_unwanted(turn):
                continue
            nbytes, kind = tape.file_nbytes[turn.position], kind_of(self._plan, turn.position)
            rate = self._kept_rate if turn.position in placement.resident else self._disk_rate
            seconds = nbytes / rate + self._machine.touch_seconds(self._touch(turn))
            read = self._disk.move("ahead", self._names[turn.position], kind, nbytes, nbytes / seconds)
            self._host[self._key(turn, self._stay)] = read

    def _touch(self, turn: Reading) -> int:
        """Bytes of a unit's place in the ring that have not been touched, and are now. A device's copies want memory
        that has been touched before."""
        if turn.start is None or self._prefill.device is not None or not self._untouched:
            return 0
        wanted = range(turn.start, turn.start + self._plan.tape.nbytes[turn.position])
        fresh = {at for at in self._untouched if at < wanted.stop and at + _TOUCHED_NBYTES > wanted.start}
        self._untouched -= fresh
        return len(fresh) * _TOUCHED_NBYTES

    def _copy(self, seat: Seat, device: Device) -> Process:
        """Copy the tape to the device, unit by unit, each when it has been read: for each pass, or where the processor
        computes as well for those in which the device takes part, until it gives its memory back."""
        tape, rests = self._plan.tape, self._rests
        for own in feed_order(tape, self._plan.held, device.resident, device.ring_nbytes):
            if own.start is None and own.passed:
                continue
            yield partial(self._may_copy, own, rests)
            if rests != self._rests:
                return
            turn = self._among_all(own)
            key = self._key(turn, self._stay)
            yield partial(self._is_read_or_unwanted, turn, key)
            yield partial(self._has_room, turn, self._device_ring, seat)
            if self._is_unwanted(turn, seat):
                self._release(seat, turn.number)
                continue
            nbytes, kind = tape.nbytes[turn.position], kind_of(self._plan, turn.position)
            copy = self._bus.move("copies", self._names[turn.position], kind, nbytes, device.rates.host_to_device)
            seat.there[self._key(turn, device.resident)] = copy
            yield partial(getattr, copy, "is_done")
            self._release(seat, turn.number)

    def _may_copy(self, own: Reading, rests: int) -> bool:
        """Whether the pass of a unit is known to which the device counts it, or none will come."""
        return not self._is_shared or own.passed < len(self._joined) or rests != self._rests

    def _among_all(self, own: Reading) -> Reading:
        """The turn of a unit that the device has a number of its own for."""
        if not self._is_shared:
            return own
        passed = self._joined[own.passed]
        return replace(own, passed=passed, number=passed * len(self._plan.tape.nbytes) + own.position)

    def _is_unwanted(self, turn: Reading, seat: Seat | None = None) -> bool:
        """Whether computing at `seat`, or at all that take part, has passed a unit by that would go into a ring; what
        is to stay is wanted later."""
        users = self._users_of(turn.passed) if seat is None else {seat}
        return turn.start is not None and all(turn.number < user.passed_by for user in users)

    def _users_of(self, passed: int) -> set[Seat]:
        """Who takes part in a pass, as far as that is known."""
        return self._users.get(passed, self._seats)

    def _is_read_or_unwanted(self, turn: Reading, key: int) -> bool:
        return (key in self._host and self._host[key].is_done) or self._is_unwanted(turn, self._prefill)

    def _has_room(self, turn: Reading, ring: dict[int, range], seat: Seat | None = None) -> bool:
        """Lend a unit its place in `ring`, if it has one, it is free, and the unit's pass will come; an unwanted one
        needs none."""
        if turn.start is None or self._is_unwanted(turn, seat):
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
        for number, load in enumerate(loads):
            self._last = number if load.is_last else None
            self._waits.seconds = {}
            start, before = self.clock.now, self._so_far()
            yield from self._pass(number, load)
            seconds = self.clock.now - start
            disk, nbytes, bus, computed, gpu = (now - then for now, then in zip(self._so_far(), before, strict=True))
            # As predictions count it.
            computing = max(computed, gpu) if self._goes_on_beside else computed + gpu
            pace.note(load.decoding, load.prompt_tokens, computing, disk)
            waited = tuple(self._waits.seconds.items())
            self.passes.append(SimulatedPass(load, start, seconds, computed, waited, disk, round(nbytes), bus, gpu))
        self._is_over = True

    def _so_far(self) -> tuple[float, float, float, float, float]:
        """Seconds of the disk, bytes that it has read, seconds of the bus, the processor and the device."""
        gpu = 0.0 if self._prefill.device is None else self._prefill.computer.busy_seconds
        return self._disk.busy_seconds, self._disk.nbytes, self._bus.busy_seconds, self._processor.busy_seconds, gpu

    def _pass(self, number: int, load: PassLoad) -> Process:
        turns = self._turns(load)
        self._begin(number, load, turns)
        *layers, head = self._plan.tape.blocks
        for turn in turns:
            turn.seat.begin(turn, len(layers))
        for layer, units in enumerate(layers):
            if not number and (seconds := self._machine.touch_seconds(self._plan.fresh_nbytes(load.tokens))):
                yield from self._processor.busy(layer_name(layer), "memory", seconds / len(layers))
            for turn in turns:
                work = turn.seat.layer(number, layer, units, turn)
                # The memory of pages on disk is only lent while one computes.
                if turn.seat.device is None or self._kv is not None:
                    yield from work
                else:
                    yield from self._hand_over(number, layer, turn, work)
            for turn in turns:
                if turn.seat.device is not None:
                    yield from self._until(turns, partial(turn.seat.has_stored, number, layer, turn), layer)
        for turn in turns:
            if turn.seat is not self._decode:
                self._give_back(turn.seat, number, head)
        yield from self._until(turns, lambda: not self._given, len(layers) - 1)
        most = self._plan.head_rows
        steps = [min(most, load.logits - at) for at in range(0, load.logits, most)]
        for rows in steps:
            yield from self._decode.units(number, head, rows, len(steps) > 1)
        self._give_back(self._decode, number, head)

    def _turns(self, load: PassLoad) -> list[Turn]:
        """Who computes what of a pass, a device first. The seat that decodes takes part in all: it computes logits."""
        limits, turns, count = limits_of(self._plan, self._model.dense_attention), list[Turn](), 0
        prompts = range(load.decoding, len(load.segments))
        for seat in dict.fromkeys((self._prefill, self._decode)):
            mine = [
                number
                for number in range(len(load.segments))
                if seat is (self._decode if number < load.decoding else self._prefill)
            ]
            if not mine and seat is not self._decode:
                continue
            cut = plan_micro_batches([load.segments[number] for number in mine], limits)
            groups = [[{mine[i]: tokens for i, tokens in part.items()} for part in group] for group in cut]
            turns.append(Turn(seat, list(enumerate(groups, count)), prompts))
            count += len(groups)
        return turns

    def _begin(self, number: int, load: PassLoad, turns: Sequence[Turn]) -> None:
        """A pass begins for those that take part."""
        self._users[number] = {turn.seat for turn in turns}
        if self._is_shared:
            if load.prompt_tokens:
                self._joined.append(number)
            elif self._joined:
                self._rest()
        if self._kv is not None:
            self._kv.begin(load.segments, [group for turn in turns for _, group in turn.groups])

    def _rest(self) -> None:
        """The device gives its memory back, and begins anew with the next prompt."""
        assert self._prefill.device is not None
        self._rests += 1
        self._joined.clear()
        self._device_ring.clear()
        self._prefill.there.clear()
        self.clock.start(self._copy(self._prefill, self._prefill.device))

    def _hand_over(self, number: int, layer: int, turn: Turn, work: Process) -> Process:
        """Give a device its part of a layer: that takes until the copies of all units have begun, and the processor has
        had its part in it; where experts are chosen, until all has been computed."""
        seat, units = turn.seat, self._plan.tape.blocks[layer]
        self._given.append(work)
        if self._plan.experts is None:
            attends = turn.attends_elsewhere()

            def is_handed_over() -> bool:
                if attends and not seat.has_attended(number, layer, turn):
                    return False
                return all(seat.has_begun(number, unit) for unit in units)

            yield lambda: work not in self._given or is_handed_over()
        else:
            yield lambda: work not in self._given

    def _serve(self) -> Process:
        """The device computes what it has been handed."""
        while True:
            yield lambda: bool(self._given)
            yield from self._given[0]
            self._given.popleft()

    def _until(self, turns: Sequence[Turn], has_come: Callable[[], bool], layer: int) -> Process:
        """Wait for what a device has computed. That is worth a note only where the processor has something to do."""
        if len(turns) > 1 and turns[-1].groups:
            yield from self._decode.wait(has_come, self._names[self._plan.tape.blocks[layer].start], "gpu")
        else:
            yield has_come

    def _give_back(self, seat: Seat, number: int, units: Iterable[int]) -> None:
        """These units of a pass have been computed with at `seat`, or passed by."""
        for unit in units:
            key = number * len(self._plan.tape.nbytes) + unit
            seat.passed_by = max(seat.passed_by, key + 1)
            if seat.device is None:
                self._release(seat, key)
            elif self._device_ring.pop(key, None) is not None:
                del seat.there[key]

    def _release(self, seat: Seat, number: int) -> None:
        """`seat` has done with a unit in the host's ring, whose place is free when all have."""
        left = self._left.setdefault(number, set(self._users_of(number // len(self._plan.tape.nbytes))))
        left.discard(seat)
        if not left:
            del self._left[number]
            if self._ring.pop(number, None) is not None:
                del self._host[number]

    def _key(self, turn: Reading, resident: frozenset[int]) -> int:
        """The key of a unit's turn where it is looked for."""
        return turn.position - len(self._plan.tape.nbytes) if turn.position in resident else turn.number
