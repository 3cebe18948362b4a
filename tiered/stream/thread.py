"""The loop thread: an event loop in a thread of its own, with one long-lived task that owns the streams."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from tiered.errors import InterruptedRun
from tiered.stream.experts import ExpertUse
from tiered.stream.handover import run_in
from tiered.stream.kv import KVStream
from tiered.stream.loan import Loan

logger = logging.getLogger(__name__)


class Lender(Protocol):
    """Lends the blocks of the tape to the thread that computes, in the host's memory or a device's: see `Streamer`.

    A pass begins on every lender that one of its seats computes with, and on no other. Each of these then lends every
    block once, in the order of the tape, the head too, whether or not anything is borrowed of it.
    """

    async def __aenter__(self) -> object: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    def begin(self, is_last: bool = False, on_wait: Callable[[float, float], None] | None = None) -> None:
        """A pass begins."""

    def lend(self, block: int, is_held: bool = False) -> AbstractContextManager[Loan]:
        """The next block, until the context ends."""

    async def rewind(self) -> None:
        """Make the next pass start at the first block."""

    @property
    def wait_seconds(self) -> float:
        """Seconds the computation has waited for what is lent."""

    @property
    def expert_use(self) -> ExpertUse:
        """What experts that are read when they are chosen have cost so far."""

    @property
    def bus_nbytes(self) -> int:
        """Bytes of weights that have been copied to a device so far."""


@dataclass(frozen=True)
class Streams:
    """What moves data between disk and memory while passes run, and the loop that it runs in."""

    loop: asyncio.AbstractEventLoop
    blocks: Lender
    """Where one computes, the processor or a device, these are its blocks; else the processor's."""
    kv: KVStream | None = None
    """None unless the KV cache is on disk."""
    device_blocks: Lender | None = None
    """A device's, where it computes beside the processor."""

    @property
    def bus_nbytes(self) -> int:
        """Bytes of weights that have been copied to a device so far."""
        return (self.device_blocks or self.blocks).bus_nbytes

    def rewind(self) -> None:
        """After a pass that did not reach its end: make the next one begin at the first block. Not for the loop."""
        run_in(self.loop, self.blocks.rewind())
        if self.device_blocks is not None:
            run_in(self.loop, self.device_blocks.rewind())


class StreamThread:
    """Runs `prepare`, then keeps the streams open until `stop`. Each object starts and stops once."""

    def __init__(self, prepare: Callable[[], Awaitable[None]], make_streams: Callable[[], Streams]) -> None:
        self._prepare, self._make_streams = prepare, make_streams
        self.ready: Future[Streams] = Future()
        """The open streams, or the error because of which there are none."""
        # A thread that gives up waiting must not cancel it: setting the result would then raise.
        self.ready.set_running_or_notify_cancel()
        self._running = threading.Event()
        """Set when the loop runs, or when it never will."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="tiered-loop", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End all reading, whether the streams are open yet or not, and wait until nothing runs any more."""
        self._running.wait()
        if self._loop is not None:
            # A loop that has ended by itself cannot be called any more; `ready` says why it ended.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._end)
        self._thread.join()

    def _end(self) -> None:
        """In the loop: let the open streams close, or cancel the preparation."""
        if self.ready.done():
            self._stop.set()
        else:
            self._task.cancel()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except asyncio.CancelledError:
            self.ready.set_exception(InterruptedRun("interrupted"))
        except BaseException as error:
            if self.ready.done():
                logger.exception("the reading loop ended with an error")
            else:
                self.ready.set_exception(error)
        finally:
            self._running.set()

    async def _serve(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._loop, self._stop = task, asyncio.get_running_loop(), asyncio.Event()
        self._running.set()
        await self._prepare()
        streams = self._make_streams()
        others = streams.device_blocks or contextlib.nullcontext(), streams.kv or contextlib.nullcontext()
        async with streams.blocks, others[0], others[1]:
            self.ready.set_result(streams)
            await self._stop.wait()
