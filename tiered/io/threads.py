"""Threads for reading and writing, and how an asynchronous caller waits for them.

In: functions that block. Out: their end, or what they raised; and for how long there were none. Called by `disk.py` and
`spill.py`. The event loop only waits (`aiofiles.os.wrap` over this module's plain function).
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import aiofiles.os

from tiered.errors import InterruptedRun

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
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._call_async = aiofiles.os.wrap(_call)
        self._clock = clock or IdleClock()
        self._closing = False

    @property
    def idle_seconds(self) -> float:
        """Seconds so far in which no transfer was queued or running."""
        return self._clock.seconds

    async def transfer(self, work: Callable[[Check], None]) -> None:
        """Run `work` in a thread, as `call` does; it reads or writes, so the threads do not count as idle meanwhile."""
        with self._clock:
            await self.call(work)

    async def call(self, work: Callable[[Check], None]) -> None:
        """Run `work` in a thread.

        A thread cannot be cancelled. Where the caller is, this raises CancelledError only after `work` has ended:
        no thread touches the memory any more.
        """
        abandoned = threading.Event()

        def check() -> None:
            if self._closing or abandoned.is_set():
                raise InterruptedRun("the transfer is no longer wanted")

        running = asyncio.ensure_future(self._call_async(work, check, abandoned, executor=self._pool))
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            abandoned.set()
            while not running.done():
                # A second cancellation waits as well.
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([running])
            # Nobody handles what it raised; fetching it keeps asyncio from logging that.
            _ = running.cancelled() or running.exception()
            raise

    def begin(self, work: Callable[[], None]) -> None:
        """Have `work`, a transfer that raises nothing, run in a thread. For any thread."""

        def run() -> None:
            try:
                work()
            finally:
                self._clock.__exit__(None, None, None)

        self._clock.__enter__()
        self._pool.submit(run)

    def close(self) -> None:
        """Drop queued work and wait for what runs: nothing touches memory afterwards."""
        self._closing = True
        self._pool.shutdown(wait=True, cancel_futures=True)


async def all_of(transfers: Iterable[Awaitable[None]]) -> None:
    """Wait for every one of `transfers`, then raise the first error: when this returns, none of them runs any more."""
    for result in await asyncio.gather(*transfers, return_exceptions=True):
        if result is not None:
            raise result


def _call(work: Callable[[Check], None], check: Check, abandoned: threading.Event) -> None:
    if not abandoned.is_set():
        work(check)
