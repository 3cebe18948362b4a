"""From the event loop to the one thread that computes, which waits for what the loop brings, outside the loop.

    loop: put(key, item)          computing thread: take(key)

`run_in` goes the other way: the computing thread has the loop do something and waits until that has ended.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Final, Generic, TypeVar

from tiered.errors import InterruptedRun
from tiered.kernels import CancelFlag
from tiered.outcome import Outcome
from tiered.process import interrupts_later
from tiered.trace import Tracer

T = TypeVar("T")
_POLL_SECONDS: Final = 0.05
"""Seconds between two looks at the cancel flag while nothing comes."""


class Handover(Generic[T]):
    """Items by key, brought in any order. `take` is for one thread; an error is raised each time its key is taken."""

    def __init__(self, cancel: CancelFlag, trace: Tracer) -> None:
        self._cancel, self._trace = cancel, trace
        self._items: dict[int, T | Exception] = {}
        self._changed = threading.Condition()
        self.wait_seconds = 0.0
        """Seconds the computation has waited in `take`."""
        self.on_wait: Callable[[float, float], None] | None = None
        """Called in the computing thread after each wait, with its start and its seconds."""

    def put(self, key: int, item: T | Exception) -> None:
        """Bring an item, or the error because of which there is none."""
        with self._changed:
            self._items[key] = item
            self._changed.notify()

    def __contains__(self, key: int) -> bool:
        """Whether taking `key` would not wait."""
        return key in self._items

    def take(self, key: int, name: str) -> T:
        """Wait for the item of `key`, and take it; in a trace the wait is called `name`.

        Raises the error that was brought instead of it, and InterruptedRun once the cancel flag is set.
        """
        return self._taken(self._until((key,), name))

    def take_any(self, keys: Collection[int], name: str) -> int:
        """Wait until something has been brought for any of `keys`, take it, and return its key. Raises as `take`."""
        key = self._until(keys, name)
        self._taken(key)
        return key

    def discard(self, key: int) -> None:
        """Drop what was brought for `key`, if it has not been taken. For the loop."""
        with self._changed:
            self._items.pop(key, None)

    def clear(self, kept: int = 0) -> None:
        """Forget all errors, and the items whose key is `kept` or more. No thread may be waiting."""
        self._items = {k: item for k, item in self._items.items() if k < kept and not isinstance(item, Exception)}

    def _taken(self, key: int) -> T:
        """What has been brought for `key`."""
        item = self._items[key]
        if isinstance(item, Exception):
            try:
                raise item
            finally:
                # The error's frames would hold the error, and so all that they hold, until the garbage collector runs.
                del item
        del self._items[key]
        return item

    def _until(self, keys: Collection[int], name: str) -> int:
        """Wait until something has been brought for one of `keys`, which is returned."""
        start = time.perf_counter()
        try:
            with self._changed:
                while (found := next((key for key in keys if key in self._items), None)) is None:
                    self._cancel.check()
                    self._changed.wait(_POLL_SECONDS)
                return found
        finally:
            self.count_wait(name, start)

    def count_wait(self, name: str, start: float) -> None:
        """The computation has waited since `start`, for what is called `name` in a trace."""
        waited = time.perf_counter() - start
        self.wait_seconds += waited
        self._trace.record("wait", name, start, waited)
        if self.on_wait is not None:
            self.on_wait(start, waited)


def run_in(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], cancel: CancelFlag | None = None) -> T:
    """The result of `work`, run in `loop` by a thread that is not the loop's. Returns only when it has ended.

    Once `cancel` is set, `work` is cancelled, and InterruptedRun raised.
    """
    ended: Outcome[None] = Outcome()
    task: asyncio.Task[T] | None = None

    def start() -> None:
        nonlocal task
        task = loop.create_task(work)
        task.add_done_callback(lambda _: ended.bring(None))

    # `work` must end before anything else begins; that takes as long as its reads in flight.
    with interrupts_later():
        try:
            loop.call_soon_threadsafe(start)
        except RuntimeError:
            work.close()
            raise InterruptedRun("the loop has ended") from None
        while not ended.wait(_POLL_SECONDS) and not loop.is_closed():
            if cancel is not None and cancel.is_set and task is not None:
                loop.call_soon_threadsafe(task.cancel)
                cancel = None
    if task is None or not task.done() or task.cancelled():
        raise InterruptedRun("interrupted")
    return task.result()
