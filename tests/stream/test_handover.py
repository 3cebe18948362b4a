"""Between loop and computing thread: items by key, errors where they were brought, no wait that cannot be cancelled."""

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from tests.stream.streaming import while_waited_for
from tests.waiting import SECONDS
from tiered.errors import InterruptedRun, ReadError
from tiered.kernels import CancelFlag
from tiered.stream import Handover, run_in
from tiered.trace import Tracer


@pytest.fixture
def cancel() -> CancelFlag:
    return CancelFlag()


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that runs in a thread of its own."""
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join()
    made.close()


def test_items_are_taken_by_key_whatever_order_they_come_in(cancel: CancelFlag) -> None:
    trace = Tracer()
    items: Handover[str] = Handover(cancel, trace)
    for key in (2, 0, 1):
        items.put(key, f"item {key}")
    assert [items.take(key, "wait") for key in range(3)] == ["item 0", "item 1", "item 2"]
    # A trace shows the wait for whatever comes, be it short.
    assert trace.total("wait").spans == 3
    items.put(3, "item 3")
    assert 3 in items and 2 not in items
    items.discard(3)
    items.discard(3)
    assert 3 not in items


def test_what_is_not_there_is_waited_for(cancel: CancelFlag) -> None:
    trace = Tracer()
    items: Handover[str] = Handover(cancel, trace)
    waits: list[float] = []
    items.on_wait = lambda start, seconds: waits.append(seconds)
    while_waited_for(items, lambda: items.put(7, "late"))
    assert items.take(7, "wait") == "late"
    assert waits == [items.wait_seconds]
    assert items.wait_seconds >= 0.04 and trace.total("wait").seconds == pytest.approx(items.wait_seconds)


def test_an_error_is_raised_in_its_items_place_until_it_is_cleared(cancel: CancelFlag) -> None:
    items: Handover[str] = Handover(cancel, Tracer())
    items.put(0, "whole")
    items.put(1, ReadError("gone"))
    items.put(2, "dropped")
    for _ in range(2):
        with pytest.raises(ReadError, match="gone"):
            items.take(1, "wait")
    items.clear(kept=1)
    assert 2 not in items
    items.put(1, "again")
    assert (items.take(0, "wait"), items.take(1, "wait")) == ("whole", "again")


def test_a_wait_ends_after_a_cancellation(cancel: CancelFlag) -> None:
    items: Handover[str] = Handover(cancel, Tracer())
    while_waited_for(items, cancel.set)
    with pytest.raises(InterruptedRun):
        items.take(0, "wait")


def test_the_loop_works_for_another_thread(loop: asyncio.AbstractEventLoop, cancel: CancelFlag) -> None:
    async def work(fails: bool) -> str:
        await asyncio.sleep(0.01)
        if fails:
            raise ReadError("gone")
        return threading.current_thread().name

    assert run_in(loop, work(False)) == run_in(loop, work(False), cancel) != threading.current_thread().name
    with pytest.raises(ReadError, match="gone"):
        run_in(loop, work(True), cancel)


def test_interrupted_work_has_ended_when_its_caller_goes_on(loop: asyncio.AbstractEventLoop) -> None:
    ended, main = False, threading.main_thread().ident
    assert main is not None

    async def work() -> None:
        nonlocal ended
        for _ in range(3):
            # Ctrl-C in the thread that waits, more than once.
            signal.pthread_kill(main, signal.SIGINT)
            await asyncio.sleep(0.07)
        ended = True

    class Loop:
        """The loop; what is posted is interrupted, too."""

        is_closed = loop.is_closed

        def call_soon_threadsafe(self, call: Callable[[], object]) -> None:
            loop.call_soon_threadsafe(call)
            signal.raise_signal(signal.SIGINT)

        def create_task(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
            return loop.create_task(coroutine)

    posted: Any = Loop()
    with pytest.raises(KeyboardInterrupt):
        run_in(posted, work())
    assert ended


def test_cancelled_work_has_ended_when_its_caller_goes_on(loop: asyncio.AbstractEventLoop, cancel: CancelFlag) -> None:
    ended = False

    async def work() -> None:
        nonlocal ended
        try:
            cancel.set()
            await asyncio.sleep(SECONDS)
        finally:
            await asyncio.sleep(0.1)
            ended = True

    coroutine: Coroutine[Any, Any, None] = work()
    with pytest.raises(InterruptedRun):
        run_in(loop, coroutine, cancel)
    assert ended
