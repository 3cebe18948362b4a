"""Experts on demand: those that a layer's router has chosen are read into a cache of their own, all at once.

In: a layer's number and the experts that a micro-batch has chosen. Out: their weights, one expert after the other, as
they come. For the thread that computes: it alone decides what is in memory, and reader threads fill the memory it gives
them. Their reads go ahead of those of the tape (`DiskReader.begin_unit`).

Which experts stay follows from use: each choice counts, and counts half as much after HALF_LIFE further passes. What
that gains over the last used and over a fixed set is measured in docs/benchmarks/experts.md.
"""

import functools
import heapq
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from tiered.errors import InterruptedRun
from tiered.io import DiskReader, Slab
from tiered.kernels import CancelFlag
from tiered.plan import ExpertCachePlan
from tiered.store import Store, Unit
from tiered.stream.device_experts import DeviceExperts
from tiered.stream.handover import Handover
from tiered.stream.loan import AnyWeight
from tiered.trace import Tracer

HALF_LIFE: Final = 32.0
"""Passes after which a choice counts half."""
_DEPTH_NBYTES: Final = 32 << 20
"""Bytes that are read at once at least: more than any disk needs to be busy."""


@dataclass(frozen=True)
class ExpertUse:
    """What experts have cost, in a pass or several."""

    hits: int = 0
    """Experts that were in memory when a micro-batch chose them."""
    misses: int = 0
    """Those that had to be read."""
    nbytes: int = 0
    """Bytes read for them."""
    compute_seconds: float = 0.0
    """Seconds of computing between a router's choice and the sum of its experts."""

    def __add__(self, other: "ExpertUse") -> "ExpertUse":
        return ExpertUse(
            self.hits + other.hits,
            self.misses + other.misses,
            self.nbytes + other.nbytes,
            self.compute_seconds + other.compute_seconds,
        )

    def __sub__(self, other: "ExpertUse") -> "ExpertUse":
        return ExpertUse(
            self.hits - other.hits,
            self.misses - other.misses,
            self.nbytes - other.nbytes,
            self.compute_seconds - other.compute_seconds,
        )


NO_EXPERTS: Final = ExpertUse()


class Slots:
    """Which expert is in which slot of memory. Experts are any numbers; `half_life` is in passes."""

    def __init__(self, count: int, half_life: float = HALF_LIFE) -> None:
        self._half_life = half_life
        self._free = list(range(count))
        self._slot_of: dict[int, int] = {}
        self._pinned: set[int] = set()
        self._scores: dict[int, float] = {}
        """log2 of the uses of each expert that was ever chosen, where one in pass p counts 2 ** (p / half life): how
        two experts compare does not change while neither is used."""
        self._heap: list[tuple[float, int]] = []
        """Experts that may be thrown out, least score first; with entries that are out of date."""

    def __contains__(self, expert: int) -> bool:
        return expert in self._slot_of

    def __getitem__(self, expert: int) -> int:
        """The slot of an expert that is in memory."""
        return self._slot_of[expert]

    def note(self, expert: int, uses: int, number: int) -> None:
        """`uses` tokens of pass `number` have chosen `expert`."""
        new = number / self._half_life + math.log2(uses)
        old = self._scores.get(expert)
        if old is not None:
            high, low = max(old, new), min(old, new)
            new = high + math.log2(1 + 2.0 ** (low - high))
        self._scores[expert] = new

    def pin(self, expert: int) -> None:
        """Keep an expert that is in memory."""
        self._pinned.add(expert)

    def unpin(self, expert: int) -> None:
        """From now on an expert that is in memory may be thrown out."""
        self._pinned.discard(expert)
        heapq.heappush(self._heap, (self._scores[expert], expert))
        if len(self._heap) > 4 * (len(self._slot_of) + 16):
            self._heap = [(self._scores[e], e) for e in self._slot_of if e not in self._pinned]
            heapq.heapify(self._heap)

    def take(self, expert: int, at_any_cost: bool = True) -> int | None:
        """A slot for an expert that is not in memory, and pin it. None if all others are pinned, or are worth more; the
        latter does not matter `at_any_cost`."""
        if not self._free:
            found = self._least()
            if found is None:
                return None
            if not at_any_cost and self._scores[found] > self._scores[expert]:
                heapq.heappush(self._heap, (self._scores[found], found))
                return None
            self._free.append(self._slot_of.pop(found))
        self._slot_of[expert] = self._free.pop()
        self._pinned.add(expert)
        return self._slot_of[expert]

    def drop(self, expert: int) -> None:
        """Forget an expert that has not come."""
        self._pinned.discard(expert)
        self._free.append(self._slot_of.pop(expert))

    def unpin_all(self) -> None:
        """From now on any expert that is in memory may be thrown out."""
        for expert in list(self._pinned):
            self.unpin(expert)

    def _least(self) -> int | None:
        """The expert in memory that is worth least, of those that are not pinned."""
        while self._heap:
            score, expert = heapq.heappop(self._heap)
            if expert not in self._slot_of or expert in self._pinned:
                continue
            if score == self._scores[expert]:
                return expert
            heapq.heappush(self._heap, (self._scores[expert], expert))
        return None


class ExpertCache:
    """The experts of `store` in `memory`, which has the slots of `plan`. Once `cancel` is set, waiting ends with
    InterruptedRun. Where a device computes, `on_write` is told memory that is about to be read into."""

    def __init__(
        self,
        store: Store,
        plan: ExpertCachePlan,
        memory: Slab,
        reader: DiskReader,
        trace: Tracer,
        cancel: CancelFlag,
    ) -> None:
        self._units, self._reader = store.expert_units, reader
        self.on_write: Callable[[memoryview], None] | None = None
        self._names = [block.name for block in store.tape]
        self._most = max(map(len, self._units))
        """Experts of a layer; with the layer's number they make an expert's number."""
        size = plan.slot_nbytes
        self._memory = [memory.view[start : start + size] for start in range(0, plan.nbytes, size)]
        self._slots = Slots(plan.slots)
        self._views: dict[tuple[int, int], Sequence[AnyWeight]] = {}
        """The matrices of whichever expert is in a slot, by slot and layout."""
        self._layouts: dict[tuple[object, ...], int] = {}
        """How matrices lie in an expert's memory, numbered: all experts of a model are alike, or nearly all."""
        self._layout_of: dict[int, int] = {}
        self.came: Handover[bool] = Handover(cancel, trace)
        """Experts that have been read."""
        self._reading = 0
        self._quiet = threading.Condition()
        """Notified when the last read in flight ends."""
        self._is_ending = False
        self._pending: set[int] = set()
        """Experts that are being read, or have been and nobody has taken them."""
        self._pending_nbytes = 0
        self._pass = 0
        self.use = NO_EXPERTS
        """What experts have cost so far."""

    def begin(self, on_wait: Callable[[float, float], None] | None) -> None:
        """A pass begins; `on_wait` gets each wait's start and seconds."""
        self._pass += 1
        self.came.on_wait = on_wait

    def each(
        self,
        layer: int,
        chosen: Mapping[int, int],
        names: Sequence[str],
        there: DeviceExperts | None = None,
    ) -> Iterator[tuple[int, Sequence[AnyWeight]]]:
        """The experts of layer number `layer` that are `chosen`, by how many tokens, each with its matrices called
        `names`: first those that are in memory, then the others as they come. They are valid until the next expert is
        asked for. Where a device computes with them they come `there`. Raises what reading, or copying, raised.
        """
        began, waited = time.perf_counter(), self.came.wait_seconds
        units, base = self._units[layer], layer * self._most
        here: list[int] = []
        missing: list[int] = []
        for expert, uses in chosen.items():
            self._slots.note(base + expert, uses, self._pass)
            (here if base + expert in self._slots else missing).append(expert)
        for expert in here:
            self._slots.pin(base + expert)
        missing.reverse()
        self._ask(layer, missing)
        for expert in here:
            yield expert, self._matrices(layer, base + expert, units[expert], names, there)
            self._release(base + expert, there)
            self._ask(layer, missing)
        for _ in range(len(chosen) - len(here)):
            number = self.came.take_any(self._pending, f"{self._names[layer]}/experts")
            self._pending.discard(number)
            self._pending_nbytes -= units[number - base].nbytes
            yield number - base, self._matrices(layer, number, units[number - base], names, there)
            self._release(number, there)
            self._ask(layer, missing)
        seconds = time.perf_counter() - began - (self.came.wait_seconds - waited)
        nbytes = sum(units[expert].nbytes for expert in chosen.keys() - set(here))
        self.use += ExpertUse(len(here), len(chosen) - len(here), nbytes, seconds)

    def rewind(self) -> None:
        """After a pass that did not reach its end: end reads in flight, and forget what nobody has taken."""
        with self._quiet:
            self._is_ending = True
            while self._reading:
                self._quiet.wait()
            self._is_ending = False
        self.came.clear()
        for number in self._pending:
            self._slots.drop(number)
        self._pending.clear()
        self._pending_nbytes = 0
        self._slots.unpin_all()

    def _release(self, number: int, there: DeviceExperts | None) -> None:
        """An expert has been computed with."""
        if there is not None:
            there.release()
        self._slots.unpin(number)

    def _ask(self, layer: int, missing: list[int]) -> None:
        """Begin to read experts from the end of `missing`, while there are slots for them. What is worth more than they
        are makes room only for as many as keep the disk busy: they can follow each other through the same slots."""
        base = layer * self._most
        while missing:
            slot = self._slots.take(base + missing[-1], at_any_cost=self._pending_nbytes < _DEPTH_NBYTES)
            if slot is None:
                break
            expert = missing.pop()
            number, unit = base + expert, self._units[layer][expert]
            self._pending.add(number)
            self._pending_nbytes += unit.nbytes
            with self._quiet:
                self._reading += 1
            if self.on_write is not None:
                self.on_write(self._memory[slot])
            self._reader.begin_unit(unit, self._memory[slot], self._check, functools.partial(self._end, number))

    def _check(self) -> None:
        """In a reader thread, between two system calls."""
        if self._is_ending:
            raise InterruptedRun("interrupted")

    def _end(self, number: int, error: Exception | None) -> None:
        """In a reader thread: the reads of an expert have ended."""
        self.came.put(number, error or True)
        with self._quiet:
            self._reading -= 1
            self._quiet.notify_all()

    def _matrices(
        self, layer: int, number: int, unit: Unit, names: Sequence[str], there: DeviceExperts | None
    ) -> Sequence[AnyWeight]:
        """The matrices called `names` of an expert that is in memory, where they can be computed with."""
        layout = self._layout_of.get(number)
        if layout is None:
            places = tuple((e.offset, e.shape, e.dtype) for w in unit.weights.values() for e in w.parts.values())
            layout = self._layout_of[number] = self._layouts.setdefault(places, len(self._layouts))
        slot = self._slots[number]
        memory = torch.frombuffer(self._memory[slot], dtype=torch.uint8)
        views_of = self._views
        if there is not None:
            start = time.perf_counter()
            slot, memory = there.bring(memory[: unit.memory_nbytes], f"{self._names[layer]}/{unit.name}")
            self.came.count_wait(f"{self._names[layer]}/copy", start)
            views_of = there.views
        views = views_of.get((slot, layout))
        if views is None:
            weights = unit.weights.values()
            found = (next(weight for weight in weights if weight.whole_name.endswith(name)) for name in names)
            views = views_of[slot, layout] = [weight.view(memory) for weight in found]
        return views
