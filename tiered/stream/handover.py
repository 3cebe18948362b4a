"""Between the event loop and the one thread that computes: what the loop brings is waited for without the loop.

    loop: put(key, item)          computing thread: take(key), which is a look-up where the item is there

`run_in` goes the other way: the computing thread has the loop do something and waits until that has ended.
"""

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any, Final, Generic, TypeVar

from tiered.errors import InterruptedRun
from tiered.kernels import CancelFlag
from tiered.trace import Tracer

T = TypeVar("T")
_POLL_SECONDS: Final = 0.05
"""Between two looks at the cancel flag while nothing comes."""


class Handover(Generic[T]):
    """Items by key, brought in any order. `take` is for one thread; what failed, fails whenever it is taken."""

    def __init__(self, cancel: CancelFlag, trace: Tracer) -> None:
        self._cancel, self._trace = cancel, trace
        self._items: dict[int, T | Exception] = {}
        self._seen: set[int] = set()
        """Of the items that are kept, those that have been taken."""
        self._changed = threading.Condition()
        self.wait_seconds = 0.0
        """Seconds the computation has waited in `take`."""

    def put(self, key: int, item: T | Exception) -> None:
        """Bring an item, or why there is none."""
        with self._changed:
            self._items[key] = item
            self._changed.notify()

    def take(self, key: int, name: str, keep: bool = False) -> T:
        """The item of `key`, waited for; `name` is the wait's in a trace. An item that is kept can be taken again, and
        once it is there that is a look-up and no more.

        Raises what was brought instead of it, and InterruptedRun once the cancel flag is set.
        """
        item = self._items.get(key) if key in self._seen else self._wait(key, name)
        assert item is not None, "what has been kept stays"
        if isinstance(item, Exception):
            try:
                raise item
            finally:
                # Held by its own frames, it would keep what they hold until the collector comes.
                del item
        if keep:
            self._seen.add(key)
        else:
            del self._items[key]
        return item

    def clear(self, kept: int = 0) -> None:
        """Forget errors, and the items whose key is `kept` or more; nobody may be waiting."""
        self._items = {k: item for k, item in self._items.items() if k < kept and not isinstance(item, Exception)}
        self._seen &= self._items.keys()

    def _wait(self, key: int, name: str) -> T | Exception:
        start = time.perf_counter()
        try:
            with self._changed:
                while (item := self._items.get(key)) is None:
                    self._cancel.check()
                    self._changed.wait(_POLL_SECONDS)
                return item
        finally:
            waited = time.perf_counter() - start
            self.wait_seconds += waited
            self._trace.record("wait", name, start, waited)


def run_in(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], cancel: CancelFlag | None = None) -> T:
    """The result of `work`, run in `loop` by a thread that is not the loop's. Returns only when it has ended.

    Once `cancel` is set, `work` is cancelled, and InterruptedRun raised.
    """
    ended = threading.Event()
    task: asyncio.Task[T] | None = None

    def start() -> None:
        nonlocal task
        task = loop.create_task(work)
        task.add_done_callback(lambda _: ended.set())

    interrupt: KeyboardInterrupt | None = None
    try:
        loop.call_soon_threadsafe(start)
    except RuntimeError:
        work.close()
        raise InterruptedRun("the loop has ended") from None
    while not ended.is_set() and not loop.is_closed():
        try:
            ended.wait(_POLL_SECONDS)
        except KeyboardInterrupt as error:
            # What is under way ends before anything else begins; it takes as long as reads in flight do.
            interrupt = error
        if cancel is not None and cancel.is_set and task is not None:
            loop.call_soon_threadsafe(task.cancel)
            cancel = None
    if interrupt is not None:
        raise interrupt
    if task is None or not task.done() or task.cancelled():
        raise InterruptedRun("interrupted")
    return task.result()
