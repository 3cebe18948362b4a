"""A device that is emulated in this process: memory, copies and events as a real one has them.

What is computed is computed at once, by the thread that asks for it; copies are done by threads of their own, later.
In three modes:

    plain   as soon as may be
    paced   as fast as a bus and a processor of given rates
    chaos   early, late and out of step, by a seeded schedule; what a copy will write is filled with poison when it is
            issued, as are memory that is given back and what is discarded; and vector clocks check every wait
"""

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch

from tiered.device.clocks import COMPUTE, IN, OUT, Clock, Clocks
from tiered.device.copies import POISON, Copies, EmulatedEvent, Schedule
from tiered.device.device import Event
from tiered.errors import BudgetError
from tiered.units import PAGE, format_size, round_up

Mode = Literal["chaos", "paced", "plain"]


class EmulatedDevice:
    """`vram` bytes of memory. `seed` is that of chaos. In the paced mode copies take as long as `copy_rate` bytes per
    second need in each direction, and computing at least as long as `compute_rate` needs for what it `uses`."""

    def __init__(
        self,
        vram: int,
        seed: int = 0,
        mode: Mode = "chaos",
        copy_rate: float | None = None,
        compute_rate: float | None = None,
    ) -> None:
        self.name, self.where, self.capability = "emulated", torch.device("cpu"), None
        self.vram_nbytes = vram
        self.description = f"emulated in this process, with {format_size(vram)} of memory ({mode})"
        self.context_nbytes = self.peak_nbytes = 0
        self.checks = mode == "chaos" or compute_rate is not None
        self.stalled_seconds = 0.0
        self.unregistered: str | None = None
        self._compute_rate = compute_rate
        self._clocks = Clocks() if mode == "chaos" else None
        self._schedule = Schedule(seed) if mode == "chaos" else None
        self._borrowed: dict[int, _Borrowed] = {}
        self._registered: dict[int, int] = {}
        self._lock = threading.Lock()
        self._computed_at = 0.0
        """When all that has been computed so far would have been done."""
        self._streams = {
            stream: Copies(f"tiered-copy-{name}", self.move, self._clocks, self._schedule, copy_rate)
            for stream, name in ((IN, "in"), (OUT, "out"))
        }

    def warm_up(self, dtype: torch.dtype) -> None:
        """Nothing: the processor computes, and what it takes is the process's."""

    # Memory.

    @property
    def in_use(self) -> Mapping[str, int]:
        """Bytes borrowed now, by label."""
        used: dict[str, int] = {}
        for borrowed in list(self._borrowed.values()):
            used[borrowed.label] = used.get(borrowed.label, 0) + borrowed.nbytes
        return used

    def borrow(self, nbytes: int, label: str) -> torch.Tensor:
        wanted = round_up(max(nbytes, 1), PAGE)
        with self._lock:
            used = sum(borrowed.nbytes for borrowed in self._borrowed.values())
            if used + wanted > self.vram_nbytes:
                told = ", ".join(f"{name} {format_size(size)}" for name, size in self.in_use.items())
                raise BudgetError(
                    f"{label}: {format_size(wanted)} do not fit the {format_size(self.vram_nbytes)} that may be used "
                    f"of the memory of {self.name}, of which are in use: {told or 'none'}; give it more with --vram"
                )
            memory = torch.full((wanted + PAGE,), POISON, dtype=torch.uint8)
            start = -memory.data_ptr() % PAGE
            memory = memory[start : start + wanted]
            self._borrowed[memory.data_ptr()] = _Borrowed(label, wanted, memory)
            self.peak_nbytes = max(self.peak_nbytes, used + wanted)
        return memory[:nbytes]

    def release(self, memory: torch.Tensor) -> None:
        address = memory.data_ptr()
        with self._lock:
            borrowed = self._borrowed.get(address)
            assert borrowed is not None, f"{address:#x}: released twice, or not from this device"
            self._forget(address, borrowed.nbytes)
            borrowed.memory.fill_(POISON)
            del self._borrowed[address]

    @property
    def held_nbytes(self) -> int:
        return sum(self.in_use.values())

    def trim(self) -> None:
        """Nothing: what is given back is the system's at once."""

    def register(self, address: int, nbytes: int) -> str | None:
        assert address % PAGE == 0 and nbytes > 0, f"{nbytes} bytes at {address:#x} are no pages"
        self._registered[address] = nbytes
        return None

    def unregister(self, address: int) -> None:
        self._forget(address, self._registered.pop(address))

    def _forget(self, address: int, nbytes: int) -> None:
        """What uses these bytes must have been done, and others may lie there from now on."""
        if self._clocks is not None:
            self._clocks.forget(address, address + nbytes)

    # Copies.

    def copy_in(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        return self._copy(IN, "copying to the device", source, target, after)

    def copy_out(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        return self._copy(OUT, "copying from the device", source, target, after)

    def _copy(
        self, stream: int, what: str, source: torch.Tensor, target: torch.Tensor, after: Sequence[Event]
    ) -> EmulatedEvent:
        for memory, is_inside, role in ((source, stream == OUT, "from"), (target, stream == IN, "to")):
            if self._has(memory) != is_inside:
                found, wanted = ("the device's", "the host's")[:: -1 if is_inside else 1]
                raise RuntimeError(
                    f"{what} {role} {memory.nbytes:,} bytes at {memory.data_ptr():#x}, which are {found} memory, "
                    f"expected {wanted}"
                )
        assert source.nbytes == target.nbytes, f"{what}: {source.nbytes} bytes to {target.nbytes}"
        before = [event for event in after if isinstance(event, EmulatedEvent)]
        clock: Clock = {}
        if self._clocks is not None:
            clock = self._clocks.issue(stream, what, (source,), (target,), (event.clock for event in before))
        return self._streams[stream].issue(source, target, before, clock)

    def _has(self, memory: torch.Tensor) -> bool:
        """Whether `memory` is the device's."""
        address = memory.data_ptr()
        return any(start <= address < start + borrowed.nbytes for start, borrowed in list(self._borrowed.items()))

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy the bytes, in a thread of the copies. For tests, which make it fail."""
        target.copy_(source)

    # Computing.

    def computing(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, EmulatedEvent)
        if self._clocks is not None:
            self._clocks.wait(event.clock, COMPUTE)
        self._catch_up()
        start = time.perf_counter()
        event.demand()
        event.finished.wait()
        self.stalled_seconds += time.perf_counter() - start
        event.raise_error()

    def record(self) -> Event:
        self._catch_up()
        event = EmulatedEvent(self._clocks, self._clocks.record(COMPUTE) if self._clocks is not None else {})
        event.finish(time.perf_counter())
        return event

    def uses(self, memory: torch.Tensor, writes: bool = False) -> None:
        if self._clocks is not None:
            self._clocks.issue(COMPUTE, "computing", *(((), (memory,)) if writes else ((memory,), ())))
        if self._compute_rate is not None:
            self._catch_up()
            self._computed_at = max(self._computed_at, time.perf_counter()) + memory.nbytes / self._compute_rate

    def discards(self, memory: torch.Tensor) -> None:
        if self._clocks is not None and not self._clocks.has_raced:
            self._clocks.issue(COMPUTE, "discarding", (), (memory,))
            memory.fill_(POISON)

    def host_writes(self, memory: torch.Tensor) -> None:
        if self._clocks is not None:
            self._clocks.host_writes(memory)

    def close(self) -> None:
        for copies in self._streams.values():
            copies.close()
        for borrowed in self._borrowed.values():
            borrowed.memory.fill_(POISON)
        self._borrowed.clear()

    def _catch_up(self) -> None:
        """Let what has been computed so far take as long as it is to take."""
        if self._schedule is not None:
            self._schedule.step()
        left = self._computed_at - time.perf_counter()
        if left > 0:
            time.sleep(left)


@dataclass
class _Borrowed:
    label: str
    nbytes: int
    memory: torch.Tensor
