"""Works in threads: whoever waits goes on when none of them runs any more, whatever became of them."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from tests.waiting import SECONDS, until
from tiered.errors import InterruptedRun
from tiered.io.threads import Check, IOThreads


class Busy:
    """Works that run until they are let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.running = 0

    def __call__(self, check: Check) -> None:
        self.running += 1
        self.begun.set()
        assert self.go.wait(SECONDS)
        self.running -= 1


@pytest.fixture
def threads() -> Any:
    found = IOThreads(2, "test")
    yield found
    found.close()


def failing(error: Exception) -> Callable[[Check], None]:
    def work(check: Check) -> None:
        raise error

    return work


def test_all_have_ended_when_the_first_error_comes(threads: IOThreads) -> None:
    busy = Busy()

    async def run() -> None:
        call = asyncio.create_task(threads.call(busy, failing(OSError("first"))))
        await asyncio.to_thread(busy.begun.wait)
        await asyncio.sleep(0.02)
        assert not call.done()
        busy.go.set()
        with pytest.raises(OSError, match="first"):
            await asyncio.wait_for(call, SECONDS)
        assert busy.running == 0
        await threads.call()  # nothing to wait for

    asyncio.run(run())


def test_where_the_system_gives_no_thread_those_that_run_are_waited_for(
    threads: IOThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, submit, count = Busy(), threads._pool.submit, 0

    def refuse(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > 1:
            raise RuntimeError("can't start new thread")
        return submit(*arguments)

    monkeypatch.setattr(threads._pool, "submit", refuse)

    async def run() -> None:
        call = asyncio.create_task(threads.call(busy, busy, busy))
        await asyncio.to_thread(busy.begun.wait)
        await asyncio.sleep(0.02)
        assert not call.done()
        busy.go.set()
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await asyncio.wait_for(call, SECONDS)
        assert busy.running == 0

    asyncio.run(run())


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_nothing_holds_the_memory_of_works_that_have_failed(threads: IOThreads, is_cancelled: bool) -> None:
    class Memory:
        """What a work writes to."""

    def work_with(memory: Memory, begun: threading.Event) -> Callable[[Check], None]:
        def work(check: Check) -> None:
            assert memory is not None
            begun.set()
            while is_cancelled:
                check()
            raise OSError("failed")

        return work

    async def run() -> "weakref.ref[Memory]":
        memory, begun = Memory(), threading.Event()
        call = asyncio.create_task(threads.call(work_with(memory, begun)))
        await asyncio.to_thread(begun.wait)
        if is_cancelled:
            call.cancel()
        # Raised here, the error would hold this frame, and so the memory.
        await asyncio.wait([call], timeout=SECONDS)
        assert call.cancelled() if is_cancelled else isinstance(call.exception(), OSError)
        return weakref.ref(memory)

    gc.collect()
    gc.disable()
    try:
        held = asyncio.run(run())
        threads.close()  # what a thread holds goes with it
        assert held() is None
    finally:
        gc.enable()


def test_what_is_queued_when_they_close_does_not_run(threads: IOThreads) -> None:
    busy = Busy()
    ran: list[Check] = []

    async def run() -> None:
        call = asyncio.gather(*(threads.call(work) for work in (busy, busy, ran.append)), return_exceptions=True)
        await asyncio.to_thread(busy.begun.wait)
        closing = asyncio.create_task(asyncio.to_thread(threads.close))
        await until(lambda: threads._closing)
        busy.go.set()
        results = await asyncio.wait_for(call, SECONDS)
        await closing
        assert isinstance(results[2], InterruptedRun) and not ran

    asyncio.run(run())


def threads_of(threads: IOThreads) -> int:
    """How many have started."""
    return len(threads._pool._threads)


@pytest.mark.parametrize("most", [None, 1, 99])
def test_they_start_before_there_is_work(threads: IOThreads, most: int | None) -> None:
    threads.start(most)
    assert threads_of(threads) == (1 if most == 1 else 2)
    threads.start()  # those that there are are no hindrance
    assert threads_of(threads) == 2
    ran: list[Check] = []
    asyncio.run(threads.call(ran.append, ran.append))
    assert len(ran) == 2


def test_where_the_system_starts_no_more_those_that_there_are_work(
    threads: IOThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def start_first(thread: threading.Thread) -> None:
        if threads_of(threads):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start_first)
        threads.start()
    ran: list[Check] = []
    asyncio.run(asyncio.wait_for(threads.call(ran.append), SECONDS))
    assert len(ran) == 1


def test_starting_waits_for_none_that_is_busy_for_ever(threads: IOThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiered.io.threads._START_SECONDS", 0.05)
    busy = Busy()

    async def run() -> None:
        call = asyncio.create_task(threads.call(busy))
        await asyncio.to_thread(busy.begun.wait)
        await asyncio.wait_for(asyncio.to_thread(threads.start), SECONDS)
        busy.go.set()
        await asyncio.wait_for(call, SECONDS)

    asyncio.run(run())
