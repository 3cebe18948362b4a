"""The copy engines of the emulated device: each a thread that copies in order, when a schedule or a rate lets it.

In: copies, and the events that each comes after. Out: the event of each copy's end. Called by `emulated.py`.
"""

import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from tiered.device.clocks import Clock, Clocks
from tiered.process import interrupts_later

POISON: Final = 0xFF
"""Bytes that make no number of any kind of float, and the largest codes."""
_LATE_SECONDS: Final = 0.003
"""A copy is held back by so much at most: somebody may wait who does nothing else."""
_LATE_STEPS: Final = 8
"""And by so many other calls."""
_LOOK_SECONDS: Final = 0.0003
"""Seconds between two looks whether a copy is to be held back any longer."""

Move = Callable[[torch.Tensor, torch.Tensor], None]
"""Copies the bytes of the first to the second."""


class EmulatedEvent:
    """A copy's end, or a point of computing; `clock` is its place among all others, where that is known."""

    def __init__(self, clocks: Clocks | None, clock: Clock) -> None:
        self.clock = clock
        self.seconds = 0.0
        self.finished, self.demanded = threading.Event(), threading.Event()
        self.done_at = 0.0
        """When it came, of `time.perf_counter`."""
        self._clocks = clocks
        self._error: Exception | None = None

    @property
    def is_done(self) -> bool:
        is_done = self.finished.is_set()
        if is_done:
            self._host_waits()
        return is_done

    def wait(self) -> None:
        self.finished.wait()
        self._host_waits()
        self.raise_error()

    def demand(self) -> None:
        """Computing stands still for it, so it must not be held back any longer."""
        self.demanded.set()
        self.finished.wait()

    def finish(self, at: float, error: Exception | None = None) -> None:
        """It has come, or failed, at this time."""
        self.done_at, self._error = at, error
        self.finished.set()

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _host_waits(self) -> None:
        if self._clocks is not None:
            self._clocks.host_waits(self.clock)


class Schedule:
    """Chaos: how long each copy is held back. The same seed gives the same choices in the same order."""

    def __init__(self, seed: int) -> None:
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._steps = 0

    def step(self) -> None:
        """Something else happens on the device."""
        self._steps += 1

    def choose(self) -> "_Hold":
        """What is to become of the next copy."""
        with self._lock:
            kind = self._random.choice(("early", "soon", "late", "late"))
            steps = self._steps + self._random.randint(1, _LATE_STEPS)
            seconds = self._random.uniform(0.0, _LATE_SECONDS)
        late = kind == "late"
        return _Hold(kind == "early", steps if late else 0, time.perf_counter() + seconds if late else 0.0)

    def hold(self, hold: "_Hold", demanded: threading.Event) -> None:
        """Hold a copy back, until it is demanded at most."""
        while self._steps < hold.steps and time.perf_counter() < hold.until:
            if demanded.wait(_LOOK_SECONDS):
                return


@dataclass(frozen=True)
class _Hold:
    is_early: bool = False
    """It is done before it has been issued, if nothing is in its way."""
    steps: int = 0
    until: float = 0.0
    """It begins after so many steps of the schedule, and at this time at the latest."""


@dataclass(frozen=True)
class _Copy:
    source: torch.Tensor
    target: torch.Tensor
    after: Sequence[EmulatedEvent]
    event: EmulatedEvent
    hold: _Hold
    issued_at: float
    is_poisoned: bool


class Copies:
    """One stream of copies, in order, by `move`. With a `schedule` as that has it, with a `rate` in bytes per second no
    faster than that."""

    def __init__(
        self, name: str, move: Move, clocks: Clocks | None, schedule: Schedule | None, rate: float | None
    ) -> None:
        self._move, self._clocks, self._schedule, self._rate = move, clocks, schedule, rate
        self._queue: queue.SimpleQueue[_Copy | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._left = 0
        """Copies that have not been done."""
        self._done_at = 0.0
        """When the last one was."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def issue(
        self, source: torch.Tensor, target: torch.Tensor, after: Sequence[EmulatedEvent], clock: Clock
    ) -> EmulatedEvent:
        """Copy behind what has been issued before, and after these events."""
        event, hold, is_poisoned = EmulatedEvent(self._clocks, clock), _Hold(), False
        with self._lock:
            if self._schedule is not None:
                self._schedule.step()
                hold = self._schedule.choose()
                is_free = all(before.finished.is_set() for before in after)
                if is_free:
                    target.fill_(POISON)
                    is_poisoned = True
                hold = _Hold(hold.is_early and is_free and not self._left, hold.steps, hold.until)
            copy = _Copy(source, target, after, event, hold, time.perf_counter(), is_poisoned)
            if hold.is_early:
                self._do(copy)
            else:
                self._left += 1
                self._queue.put(copy)
        return event

    def close(self) -> None:
        """Wait for all copies."""
        with interrupts_later():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (copy := self._queue.get()) is not None:
            if self._schedule is not None:
                self._schedule.hold(copy.hold, copy.event.demanded)
            for event in copy.after:
                event.demand()
            self._do(copy)
            with self._lock:
                self._left -= 1

    def _do(self, copy: _Copy) -> None:
        # By the times at which things were due, not when a thread came to it: sleeping too long adds up otherwise.
        begun = max([copy.issued_at, self._done_at, *(event.done_at for event in copy.after)])
        if self._rate is None:
            begun = time.perf_counter()
        error: Exception | None = None
        try:
            if self._schedule is not None and not copy.is_poisoned:
                copy.target.fill_(POISON)
            self._move(copy.source, copy.target)
        except Exception as raised:
            error = raised
        self._done_at = time.perf_counter()
        if self._rate is not None:
            self._done_at = max(begun + copy.source.nbytes / self._rate, begun)
            time.sleep(max(0.0, self._done_at - time.perf_counter()))
        copy.event.seconds = self._done_at - begun
        copy.event.finish(self._done_at, error)
