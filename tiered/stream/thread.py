"""The loop thread: an event loop in a thread of its own, with one long-lived task that owns the streams."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tiered.errors import InterruptedRun
from tiered.outcome import Outcome
from tiered.process import interrupts_later
from tiered.stream.handover import run_in
from tiered.stream.kv import KVStream
from tiered.stream.streamer import Streamer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Streams:
    """What moves data between disk and memory while passes run, and the loop that it runs in."""

    loop: asyncio.AbstractEventLoop
    blocks: Streamer
    kv: KVStream | None = None
    """None unless the KV cache is on disk."""
    device_blocks: Streamer | None = None
    """Lends blocks in the memory of the device that computes; None if none does. It is `blocks` where nothing else
    computes, else it shares a fork with `blocks`."""

    @property
    def lenders(self) -> Sequence[Streamer]:
        """Those that lend blocks, each once."""
        return list(dict.fromkeys(filter(None, (self.blocks, self.device_blocks))))

    @property
    def bus_nbytes(self) -> int:
        """Bytes of weights that have been copied to a device so far."""
        return self.device_blocks.bus_nbytes if self.device_blocks is not None else 0

    @property
    def bus_seconds(self) -> float:
        """Seconds in which they were."""
        return self.device_blocks.bus_seconds if self.device_blocks is not None else 0.0

    def rest_device(self) -> None:
        """Between two passes, where the processor computes beside a device: give the device's memory back until it
        computes again. Not for the loop."""
        assert self.device_blocks is not None and self.device_blocks is not self.blocks
        run_in(self.loop, self.device_blocks.rest())

    def rewind(self) -> None:
        """After a pass that did not reach its end: make the next one begin at the first block. Not for the loop."""
        run_in(self.loop, self._rewind())

    async def _rewind(self) -> None:
        for lender in self.lenders:
            await lender.rewind()


class StreamThread:
    """Runs `prepare`, then keeps the streams open until `stop`. Each object starts and stops once."""

    def __init__(self, prepare: Callable[[], Awaitable[None]], make_streams: Callable[[], Streams]) -> None:
        self._prepare, self._make_streams = prepare, make_streams
        self.ready: Outcome[Streams] = Outcome()
        """The open streams, or the error because of which there are none."""
        self._running: Outcome[None] = Outcome()
        """There when the loop runs, or when it never will."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="tiered-loop", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End all reading, whether the streams are open yet or not, and wait until nothing runs any more."""
        # What it reads into is released after this.
        with interrupts_later():
            self._running.result()
            if self._loop is not None:
                # A loop that has ended by itself cannot be called any more; `ready` says why it ended.
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._end)
            self._thread.join()

    def _end(self) -> None:
        """In the loop: let the open streams close, or cancel the preparation."""
        if self.ready.is_there:
            self._stop.set()
        else:
            self._task.cancel()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except asyncio.CancelledError:
            self.ready.fail(InterruptedRun("interrupted"))
        except BaseException as error:
            if self.ready.is_there:
                logger.exception("the reading loop ended with an error")
            else:
                self.ready.fail(error)
        finally:
            if not self._running.is_there:
                self._running.bring(None)

    async def _serve(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._loop, self._stop = task, asyncio.get_running_loop(), asyncio.Event()
        self._running.bring(None)
        await self._prepare()
        streams = self._make_streams()
        async with contextlib.AsyncExitStack() as stack:
            for lender in streams.lenders:
                await stack.enter_async_context(lender)
            if streams.kv is not None:
                await stack.enter_async_context(streams.kv)
            self.ready.bring(streams)
            await self._stop.wait()
