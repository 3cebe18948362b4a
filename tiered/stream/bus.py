"""The bus to a device: memory of the host that is made known to it, copies on their way, and what they have cost.

Called by what has units copied (`device_feed.py`, `device_experts.py`) and by `Streamer`.
"""

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch

from tiered.device import Device, Event
from tiered.io import Slab
from tiered.io.threads import Check, IOThreads
from tiered.trace import Tracer
from tiered.units import GIB, MIB

logger = logging.getLogger(__name__)

_REGISTERED_NBYTES: Final = 64 * GIB
"""Bytes that are registered in one piece at most: drivers refuse more, and no copy may lie in two pieces."""
_ON_THE_WAY: Final = 2
_ON_THE_WAY_NBYTES: Final = 64 * MIB
"""Copies, and bytes, that are on their way before another copy waits. They keep a bus busy while one that has ended is
made known, and whatever waits for all of them waits a few milliseconds."""

OnEnd = Callable[[Exception | None], None]
"""Called in the loop when a copy has ended, with its error."""


class Bus:
    """Copies to one device. All but `count` is for the event loop."""

    def __init__(self, trace: Tracer) -> None:
        self._trace = trace
        self._copies: set[asyncio.Task[None]] = set()
        """Those who wait for copies."""
        self._on_the_way: list[int] = []
        """Bytes of the copies that have not ended, in order."""
        self._waiter = IOThreads(1, "tiered-copied")
        self._lock = threading.Lock()
        """Held while something is counted: experts are copied by the thread that computes."""
        self.nbytes, self.seconds = 0, 0.0
        """Bytes that have been copied so far, and the seconds that took."""

    def count(self, name: str, nbytes: int, seconds: float) -> None:
        """A copy of what is called `name` has just ended."""
        self._trace.record("bus", name, time.perf_counter() - seconds, seconds, nbytes)
        with self._lock:
            self.nbytes, self.seconds = self.nbytes + nbytes, self.seconds + seconds

    @property
    def is_busy(self) -> bool:
        """Whether so much is on its way that no other copy is wanted yet."""
        return len(self._on_the_way) >= _ON_THE_WAY and sum(self._on_the_way) >= _ON_THE_WAY_NBYTES

    def follow(self, group: asyncio.TaskGroup, arrived: Event, name: str, nbytes: int, end: OnEnd) -> None:
        """Wait in `group` for the end of a copy. Nobody may cancel that: memory is in use until then."""
        self._on_the_way.append(nbytes)
        copy = group.create_task(self._follow(arrived, name, nbytes, end), name=f"tiered-copy-{name}")
        self._copies.add(copy)
        copy.add_done_callback(self._copies.discard)

    async def _follow(self, arrived: Event, name: str, nbytes: int, end: OnEnd) -> None:
        try:
            await self.until_done(arrived)
        except Exception as error:
            self._on_the_way.remove(nbytes)
            end(error)
            return
        self._on_the_way.remove(nbytes)
        self.count(name, nbytes, arrived.seconds)
        end(None)

    async def until_done(self, event: Event) -> None:
        """Wait for `event`, while the loop goes on. Raises what its work raised."""
        try:
            await self._waiter.call(lambda check: event.wait())
        finally:
            event.wait()  # for this thread, which goes on with the memory

    async def register(self, device: Device, slabs: Sequence[Slab], stack: contextlib.ExitStack) -> None:
        """`register`, while the loop goes on. Cancelled, this ends when no call is under way any more."""
        await self._waiter.call(functools.partial(register, device, slabs, stack))

    async def settled(self) -> None:
        """Wait until no copy is on its way."""
        while self._copies:
            await asyncio.wait(set(self._copies))

    def close(self) -> None:
        """End the thread that waits."""
        self._waiter.close()


def register(device: Device, slabs: Sequence[Slab], stack: contextlib.ExitStack, check: Check = lambda: None) -> None:
    """Make memory of the host known to `device`, until `stack` is closed. It touches all of it, which takes time; ends
    between two calls with what `check` raises."""
    for address, nbytes in _runs(slabs):
        check()
        refusal = device.register(address, nbytes)
        if refusal is not None:
            logger.warning("copies to %s are staged, and so slower: %s", device.name, refusal)
            return
        stack.callback(device.unregister, address)


def tell_write(device: Device, memory: memoryview) -> None:
    """`memory` of the host is about to be read into."""
    device.host_writes(torch.frombuffer(memory, dtype=torch.uint8))


def _runs(slabs: Sequence[Slab]) -> Iterator[tuple[int, int]]:
    """Address and bytes of stretches that are together `slabs`, none larger than what is registered in one piece unless
    a slab is."""
    address = nbytes = 0
    for slab in sorted(slabs, key=lambda slab: slab.address):
        if nbytes and slab.address == address + nbytes and nbytes + slab.nbytes <= _REGISTERED_NBYTES:
            nbytes += slab.nbytes
            continue
        if nbytes:
            yield address, nbytes
        address, nbytes = slab.address, slab.nbytes
    if nbytes:
        yield address, nbytes
