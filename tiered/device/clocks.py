"""Vector clocks: whether accesses of the same bytes are ordered by events, or came one after the other by chance.

In: what the streams of a device, and the threads of the host, read, write, record and wait for. Out: a `RaceError` in
the thread that would have raced. Called by `emulated.py`. The clocks are those of torch's own race detector.

Each thread of the host is a stream of its own. What it issues begins after all that it has waited for; what another
thread has waited for says nothing about it.
"""

import bisect
import threading
from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch.cuda._sanitizer import EventHandler, SynchronizationError, TensorInfo, UnsynchronizedAccessError

Clock = dict[int, int]
"""How far each stream has come, as known at a point of one of them."""
IN: Final = 1
OUT: Final = 2
COMPUTE: Final = 3
_NAMES: Final = {IN: "copies to the device", OUT: "copies from the device", COMPUTE: "computing"}
_EVENT: Final = 0
"""The number under which the detector gets any event: our events keep their clocks themselves."""


class RaceError(RuntimeError):
    """Two accesses of the same bytes that no event orders."""


class Clocks:
    """The clocks of one device. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handler = EventHandler()
        self._ranges = _Ranges(self._handler)
        self.has_raced = False
        """Whether a race has been found: what is not in order when all is cleared up follows from it."""

    def record(self, stream: int) -> Clock:
        """The clock of an event that is recorded in `stream` now."""
        with self._lock:
            return self._record(stream)

    def wait(self, clock: Clock, stream: int) -> None:
        """`stream` waits for the event with this clock."""
        with self._lock:
            self._wait(clock, stream)

    def host_waits(self, clock: Clock) -> None:
        """This thread has waited for the event with this clock."""
        self.wait(clock, threading.get_ident())

    def issue(
        self,
        stream: int,
        what: str,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        after: Iterable[Clock] = (),
    ) -> Clock:
        """This thread has `stream` do `what`, after the events with the clocks `after`. Returns the clock of its end.

        Raises RaceError where something else that is not ordered before it reads or writes what this writes, or writes
        what this reads.
        """
        with self._lock:
            self._wait(self._record(threading.get_ident()), stream)
            for clock in after:
                self._wait(clock, stream)
            self._access(stream, what, reads, writes)
            return self._record(stream)

    def host_writes(self, memory: torch.Tensor) -> None:
        """This thread writes memory. Raises RaceError as `issue`."""
        with self._lock:
            self._access(threading.get_ident(), "writing memory of the host", (), (memory,))

    def forget(self, start: int, stop: int) -> None:
        """This thread gives bytes from `start` to `stop` back to the system. Raises RaceError where something that
        uses them has not been waited for."""
        with self._lock:
            try:
                if not self.has_raced:
                    keys = self._ranges.within(start, stop)
                    self._launch(threading.get_ident(), "giving memory back", set(), keys)
            finally:
                self._ranges.remove(start, stop)

    def _record(self, stream: int) -> Clock:
        self._handler._handle_event_record(_EVENT, stream)
        return self._handler.syncs.recorded_sync_states[_EVENT]

    def _wait(self, clock: Clock, stream: int) -> None:
        self._handler.syncs.recorded_sync_states[_EVENT] = clock
        self._handler._handle_event_wait(_EVENT, stream)

    def _access(self, stream: int, what: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        spans = [[_bounds(memory) for memory in accessed] for accessed in (reads, writes)]
        for span in (*spans[0], *spans[1]):
            self._ranges.cut(*span)
        # Only now is everything cut that will be.
        read, written = ([self._ranges.within(*span) for span in accessed] for accessed in spans)
        self._launch(stream, what, set().union(*read), set().union(*written))
        for keys in written:
            self._ranges.merge(sorted(keys))

    def _launch(self, stream: int, what: str, reads: set[int], writes: set[int]) -> None:
        aliases: dict[int, list[str]] = {key: [] for key in reads | writes}
        errors = self._handler._handle_kernel_launch(stream, reads, writes, set(), what, aliases)
        for key in reads:
            self._ranges.keep_last_reads(key)
        # Threads of the host order what they do among themselves by other means than events.
        told = [_told(error) for error in errors if not _is_of_host(error)]
        if told:
            self.has_raced = True
            raise RaceError(told[0])


class _Ranges:
    """Stretches of memory that have been accessed, cut so that all bytes of one have the same history.

    The detector knows numbers, not bytes: a stretch's number is the address it starts at.
    """

    def __init__(self, handler: EventHandler) -> None:
        self._histories = handler.tensors_accessed.accesses
        self._starts: list[int] = []
        self._stops: dict[int, int] = {}

    def within(self, start: int, stop: int) -> set[int]:
        """Numbers of the stretches of [start, stop) that have been accessed."""
        self._split(start)
        self._split(stop)
        first, last = (bisect.bisect_left(self._starts, at) for at in (start, stop))
        return set(self._starts[first:last])

    def cut(self, start: int, stop: int) -> None:
        """Make [start, stop) a number of whole stretches."""
        self.within(start, stop)
        index, position = bisect.bisect_left(self._starts, start), start
        while position < stop:
            if index == len(self._starts) or self._starts[index] != position:
                following = self._starts[index] if index < len(self._starts) else stop
                self._starts.insert(index, position)
                self._stops[position] = min(following, stop)
            position = self._stops[position]
            index += 1

    def merge(self, keys: Sequence[int]) -> None:
        """Stretches that follow each other have been written as one: they are one from now on."""
        for key in keys[1:]:
            self._stops[keys[0]] = self._stops[key]
            self._drop(key)

    def remove(self, start: int, stop: int) -> None:
        for key in self.within(start, stop):
            self._drop(key)

    def keep_last_reads(self, key: int) -> None:
        """Of the reads since the last write, one of each stream says all: a stream's own are ordered."""
        history = self._histories[key]
        history.reads = list({access.stream: access for access in history.reads}.values())

    def _split(self, at: int) -> None:
        index = bisect.bisect_right(self._starts, at) - 1
        if index < 0:
            return
        start = self._starts[index]
        if not start < at < self._stops[start]:
            return
        self._stops[at], self._stops[start] = self._stops[start], at
        self._starts.insert(index + 1, at)
        history = self._histories.get(start)
        if history is not None:
            self._histories[at] = TensorInfo(None, list(history.reads), history.write)

    def _drop(self, key: int) -> None:
        del self._stops[key], self._starts[bisect.bisect_left(self._starts, key)]
        self._histories.pop(key, None)


def _bounds(memory: torch.Tensor) -> tuple[int, int]:
    """The first address of `memory`, and the one behind its last."""
    start = memory.data_ptr()
    span = sum((size - 1) * stride for size, stride in zip(memory.shape, memory.stride(), strict=True))
    return start, start + (span + 1) * memory.element_size() if memory.numel() else start


def _is_of_host(error: SynchronizationError) -> bool:
    """Whether both accesses are the host's own."""
    assert isinstance(error, UnsynchronizedAccessError)
    return all(access.stream not in _NAMES for access in (error.current_access, error.previous_access))


def _told(error: SynchronizationError) -> str:
    assert isinstance(error, UnsynchronizedAccessError)
    current, previous = (
        f"{access.operator} ({_NAMES.get(access.stream, 'the host')}), {access.type} memory"
        for access in (error.current_access, error.previous_access)
    )
    return (
        f"{current} at {error.data_ptr:#x}, is not ordered behind {previous} there too: expected a wait for an event "
        "of the earlier one"
    )
