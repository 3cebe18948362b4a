"""Copies to and from a CUDA device: one stream for each direction, and the events of their ends.

Registered memory is copied by the device, later. Other memory is staged by the driver, which blocks whoever asks until
all that the copy comes after is done: a thread of the stream's own asks then, and its event is given to the stream only
when that thread has come to it. Called by `cuda.py`.
"""

import functools
import itertools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from tiered.device.device import Event
from tiered.process import shut_down


class CudaEvent:
    """A point of a stream; the end of a copy if it has a beginning. `given` is settled once it is in its stream; None:
    it is."""

    def __init__(
        self, end: torch.cuda.Event, begin: torch.cuda.Event | None = None, given: Future[None] | None = None
    ) -> None:
        self._end, self._begin, self._given = end, begin, given

    @property
    def end(self) -> torch.cuda.Event:
        """The event, in its stream: waits for that. Raises what kept it from coming there."""
        if self._given is not None:
            self._given.result()
        return self._end

    @property
    def is_done(self) -> bool:
        if self._given is not None and not self._given.done():
            return False
        # What has failed uses nothing any more, and says so where it is waited for.
        has_failed = self._given is not None and self._given.exception() is not None
        return has_failed or bool(self._end.query())

    @property
    def seconds(self) -> float:
        return self._begin.elapsed_time(self._end) / 1000 if self._begin is not None else 0.0

    def wait(self) -> None:
        self.end.synchronize()


class CopyStream:
    """One stream of copies, in the order in which they are asked for, by any thread."""

    def __init__(self, where: torch.device, name: str) -> None:
        self._stream, self._name = torch.cuda.Stream(where), name
        self._lock = threading.Lock()
        self._left: deque[tuple[CudaEvent, torch.Tensor, torch.Tensor]] = deque()
        """Copies that may not be done, with their memory, which is kept."""
        self._thread: ThreadPoolExecutor | None = None
        """Gives copies to the stream, from the first staged one on: later ones come behind it."""

    def copy(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        parts: Sequence[slice],
        after: Sequence[Event],
        is_staged: bool,
    ) -> CudaEvent:
        """Copy `source` to `target` in `parts`, behind `after`; `is_staged` if the host's memory is not registered."""
        begin, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        give = functools.partial(self._give, source, target, parts, after, begin, end)
        with self._lock:
            if is_staged and self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix=self._name)
            given = None
            if self._thread is None:
                give()
            else:
                given = self._thread.submit(give)
            copied = CudaEvent(end, begin, given)
            self._left.append((copied, source, target))
        self.drain()
        return copied

    def _give(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        parts: Sequence[slice],
        after: Sequence[Event],
        begin: torch.cuda.Event,
        end: torch.cuda.Event,
    ) -> None:
        for event in after:
            assert isinstance(event, CudaEvent)
            self._stream.wait_event(event.end)
        begin.record(self._stream)
        with torch.cuda.stream(self._stream):
            for part in parts:
                target[part].copy_(source[part], non_blocking=True)
        end.record(self._stream)

    def drain(self) -> None:
        """Let go of the memory of copies that are done."""
        with self._lock:
            while self._left and self._left[0][0].is_done:
                self._left.popleft()

    def close(self) -> None:
        """Wait for all copies, and let go of their memory."""
        if self._thread is not None:
            shut_down(self._thread)
        self._stream.synchronize()
        self._left.clear()


def parts_of(host: torch.Tensor, pieces: Sequence[tuple[int, int]]) -> Iterator[slice]:
    """`host` without a part that lies in two registered `pieces`, by start and bytes, as no copy may: all of it, nearly
    always."""
    address, cuts = host.data_ptr(), [0, len(host)]
    if host.nbytes == len(host):
        cuts += [start - address for start, _ in pieces if 0 < start - address < len(host)]
    cuts.sort()
    for start, stop in itertools.pairwise(cuts):
        yield slice(start, stop)
