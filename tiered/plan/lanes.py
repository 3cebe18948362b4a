"""The clock of a simulation: processes that wait for time or for each other, and servers that move bytes.

A process is a generator. What it yields is what it waits for: a number of seconds, or a function that tells whether it
may go on. A server has queues, each first come, first served; queues that are served at once share its time equally.
"""

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["resident", "layer", "head", "experts", "attention", "kv", "hidden", "gpu", "memory"]
"""What is moved, computed or waited for: units that stay in memory, streamed units of layers, and of the head, ...,
what a device computes, and memory that is touched for the first time."""
Process = Generator[float | Callable[[], bool], None, None]
_ROUNDING: Final = 1e-3
"""Bytes below which a transfer has ended."""


@dataclass(frozen=True)
class Event:
    """One stretch of work on a lane; times are in seconds from the start."""

    lane: str
    name: str
    kind: Kind
    start: float
    seconds: float
    nbytes: int = 0


@dataclass(eq=False)
class Transfer:
    """Bytes to be moved by a server."""

    name: str
    kind: Kind
    nbytes: int
    rate: float
    """Bytes per second if nothing else is served."""
    left: float = 0.0
    began: float | None = None
    """Since when it is being served without a pause; `noted` bytes have been moved before."""
    noted: int = 0
    is_done: bool = False


class Clock:
    """Runs processes and servers; keeps the events."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[Event] = []
        self._waiting: list[tuple[Process, float | Callable[[], bool]]] = []
        """With what each waits for: a time, or a condition."""
        self._servers: list[Server] = []

    def add(self, server: "Server") -> None:
        """Have `server` work."""
        self._servers.append(server)

    def start(self, process: Process) -> None:
        """Have `process` run."""
        self._waiting.append((process, self.now))

    def run(self, is_over: Callable[[], bool]) -> None:
        """Until `is_over`, or nothing can go on any more."""
        while not is_over():
            if self._resume():
                continue
            times = [until - self.now for _, until in self._waiting if isinstance(until, float)]
            steps = [*times, *(server.next_end() for server in self._servers)]
            step = min(steps, default=float("inf"))
            if step == float("inf"):
                return
            for server in self._servers:
                server.advance(step)
            self.now += step
            for server in self._servers:
                server.settle()

    def _resume(self) -> bool:
        """Let every process go on that can; tells whether any could."""
        before, self._waiting = self._waiting, []
        went = False
        for process, until in before:
            if until() if callable(until) else until <= self.now:
                went = True
                try:
                    until = next(process)
                except StopIteration:
                    continue
                until = until if callable(until) else self.now + until
            self._waiting.append((process, until))
        return went


class Server:
    """Moves bytes on `lane`. `yielding` says which queue stands still while another one has something."""

    def __init__(self, clock: Clock, lane: str, yielding: Mapping[str, str] | None = None) -> None:
        self._clock, self.lane, self._yielding = clock, lane, yielding or {}
        self._queues: dict[str, deque[Transfer]] = {}
        self.busy_seconds = 0.0
        self.nbytes = 0.0
        """Bytes moved so far."""
        clock.add(self)

    def move(self, queue: str, name: str, kind: Kind, nbytes: int, rate: float) -> Transfer:
        """Queue a transfer."""
        transfer = Transfer(name, kind, nbytes, rate, float(nbytes), is_done=not nbytes)
        if nbytes:
            self._queues.setdefault(queue, deque()).append(transfer)
            self.settle()
        return transfer

    def _served(self) -> Sequence[Transfer]:
        """What is being moved now: the first of each queue that does not stand still."""
        busy = {name: queue[0] for name, queue in self._queues.items() if queue}
        return [first for name, first in busy.items() if self._yielding.get(name) not in busy]

    def next_end(self) -> float:
        """Seconds until a transfer ends if nothing changes."""
        served = self._served()
        return min((one.left / one.rate * len(served) for one in served), default=float("inf"))

    def advance(self, seconds: float) -> None:
        """Move bytes for so many seconds, in which no transfer ends before the last moment."""
        served = self._served()
        self.busy_seconds += seconds if served else 0.0
        for one in served:
            moved = min(one.left, seconds * one.rate / len(served))
            one.left -= moved
            self.nbytes += moved

    def settle(self) -> None:
        """Take note of transfers that have ended, begun, or stopped to make way."""
        for queue in self._queues.values():
            while queue and queue[0].left <= _ROUNDING:
                self._note(queue[0])
                queue.popleft().is_done = True
        served = self._served()
        for queue in self._queues.values():
            if queue and queue[0] not in served:
                self._note(queue[0])
        for one in served:
            one.began = self._clock.now if one.began is None else one.began

    def _note(self, transfer: Transfer) -> None:
        """The end of a stretch without a pause."""
        if transfer.began is None:
            return
        seconds, moved = self._clock.now - transfer.began, transfer.nbytes - round(transfer.left)
        if moved > transfer.noted:
            event = Event(self.lane, transfer.name, transfer.kind, transfer.began, seconds, moved - transfer.noted)
            self._clock.events.append(event)
        transfer.began, transfer.noted = None, moved
