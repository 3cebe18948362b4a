"""Threads for reading and writing, and how an asynchronous caller waits for them.

In: functions that block. Out: their end, or what they raised; and for how long there were none. Called by `disk.py` and
`spill.py`. The event loop only waits. Callers that are not asynchronous have `outcome.py`.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final

from tiered.errors import InterruptedRun
from tiered.process import shut_down

_START_SECONDS: Final = 1.0
"""How long starting threads may take."""
Check = Callable[[], None]
"""Raises InterruptedRun once nobody waits for the work any more; the work calls it between two system calls."""


class IdleClock:
    """Adds up the time in which a disk has nothing to do, whoever gives it work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight = 0
        self._idle_since = time.perf_counter()
        self._idle_seconds = 0.0

    @property
    def seconds(self) -> float:
        """Idle seconds so far."""
        with self._lock:
            now = time.perf_counter() - self._idle_since if self._in_flight == 0 else 0.0
            return self._idle_seconds + now

    def __enter__(self) -> None:
        """A transfer is queued."""
        with self._lock:
            if self._in_flight == 0:
                self._idle_seconds += time.perf_counter() - self._idle_since
            self._in_flight += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """The transfer has ended."""
        with self._lock:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle_since = time.perf_counter()


class IOThreads:
    """`count` threads, until `close`. Several instances may share a `clock`."""

    def __init__(self, count: int, name: str, clock: IdleClock | None = None) -> None:
        self._count, self._pool = count, ThreadPoolExecutor(count, thread_name_prefix=name)
        self._clock = clock or IdleClock()
        self._closing = False

    @property
    def idle_seconds(self) -> float:
        """Seconds so far in which no transfer was queued or running."""
        return self._clock.seconds

    def start(self, most: int | None = None) -> None:
        """Start the threads, or `most` of them, where nothing has been queued yet; else each starts when there is work
        for it. Starting one waits for all page faults of the process that are under way, so this is for the time before
        memory is first touched. For a thread that may wait.
        """
        count = min(self._count, self._count if most is None else most)
        all_there = threading.Barrier(count + 1, timeout=_START_SECONDS)
        try:
            for _ in range(count):
                self._pool.submit(all_there.wait)
            all_there.wait()
        except RuntimeError:
            # The system gives no more, or one is busy: those that wait go on, and others start when they are needed.
            all_there.abort()

    async def transfer(self, *works: Callable[[Check], None]) -> None:
        """Run `works` in threads, as `call` does; they read or write, so the threads do not count as idle meanwhile."""
        with self._clock:
            await self.call(*works)

    async def call(self, *works: Callable[[Check], None]) -> None:
        """Run `works` in threads, side by side; when all have ended, the first error that any has raised is raised.

        A thread cannot be cancelled. Where the caller is, this raises CancelledError only after all have ended:
        no thread touches the memory any more. However many they are, the loop is woken once: each turn of it takes the
        interpreter from whoever computes.
        """
        group = _Group(len(works), asyncio.get_running_loop())
        self._submit(group, works)
        try:
            await asyncio.shield(group.ended)
        except asyncio.CancelledError:
            group.is_abandoned = True
            while not group.ended.done():
                # A second cancellation waits as well.
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([group.ended])
            group.error = None
            raise
        if group.error is not None:
            try:
                raise group.error
            finally:
                # The error's frames hold the group, and so all that its works hold.
                group.error = None

    def _submit(self, group: "_Group", works: Sequence[Callable[[Check], None]]) -> None:
        """Have `works` run. Where the system gives no thread for one, it and all after it end with that error."""
        for number, work in enumerate(works):
            try:
                self._pool.submit(self._run, group, number, work)
            except RuntimeError as error:
                group.is_abandoned = True
                # The pool has queued this one, if it is open: a thread that there is may take it all the same.
                for left in range(number, len(works)):
                    if group.take(left):
                        group.end(error)
                return

    def _run(self, group: "_Group", number: int, work: Callable[[Check], None]) -> None:
        """One work of a group, in a thread."""
        if not group.take(number):
            return

        def check() -> None:
            if self._closing or group.is_abandoned:
                raise InterruptedRun("the transfer is no longer wanted")

        try:
            check()
            work(check)
        except BaseException as error:
            group.end(error)
        else:
            group.end()

    def begin(self, work: Callable[[], None]) -> None:
        """Have `work`, a transfer that raises nothing, run in a thread. For any thread."""

        def run() -> None:
            try:
                if not self._closing:
                    work()
            finally:
                self._clock.__exit__(None, None, None)

        self._clock.__enter__()
        self._pool.submit(run)

    def close(self) -> None:
        """Drop queued work and wait for what runs: nothing touches memory afterwards."""
        self._closing = True
        shut_down(self._pool)


async def all_of(transfers: Iterable[Awaitable[None]]) -> None:
    """Wait for every one of `transfers`, then raise the first error: when this returns, none of them runs any more."""
    for result in await asyncio.gather(*transfers, return_exceptions=True):
        if result is not None:
            raise result


class _Group:
    """Works that run side by side, and whoever waits for all of them in `loop`."""

    def __init__(self, count: int, loop: asyncio.AbstractEventLoop) -> None:
        self._left, self._lock, self._loop = count, threading.Lock(), loop
        self._taken: set[int] = set()
        self.ended = loop.create_future()
        self.is_abandoned = False
        """Whether nobody wants them any more."""
        self.error: BaseException | None = None
        """The first that any has raised; settled once `ended` is."""
        if not count:
            self.ended.set_result(None)

    def take(self, number: int) -> bool:
        """Whether work `number` is the caller's to end: nobody has taken it before."""
        with self._lock:
            is_free = number not in self._taken
            self._taken.add(number)
            return is_free

    def end(self, error: BaseException | None = None) -> None:
        """One of them has ended. In its thread."""
        with self._lock:
            self.error = self.error or error
            self._left -= 1
            is_last = not self._left
        if is_last:
            self._loop.call_soon_threadsafe(self.ended.set_result, None)
