"""Hidden states on a device, of micro-batches that wait for their turn in the host's memory.

    put     what a layer has made of them -> a slot on the device -> copied to the host, while the next ones compute
    take    copied back into a slot, while the ones before compute -> what the next layer is given

Micro-batches take turns in the same order in every layer, so it is known whose come next. Of the slots one has what
computes, one what comes and one what goes; where a pass has no more micro-batches than slots, nothing is copied.
Called by `work.py` and `engine.py`, in the thread that computes.
"""

import contextlib
import time
from collections import deque
from dataclasses import dataclass

import torch

from tiered.device import Event, Lease
from tiered.errors import BudgetError
from tiered.plan import WAITING_SLOTS as SLOTS
from tiered.trace import Tracer


class WaitingRoom:
    """Hidden states of one pass at a time. `slots` is memory of a device for `SLOTS` micro-batches of the largest
    size, `host` uint8 memory of the host for all of a pass; a token's take `token_nbytes` in either."""

    def __init__(self, slots: Lease, host: torch.Tensor, token_nbytes: int, trace: Tracer) -> None:
        self._device, self._slots, self._host, self._trace = slots.device, slots, host, trace
        self._slot_nbytes, self._token_nbytes = slots.nbytes // SLOTS, token_nbytes
        self._places: list[Place] = []
        self._count = self._layers = self._used = 0
        self._gone: list[Event | None] = [None] * SLOTS
        """Of each slot the copy from it, behind which it is free."""
        self._under_way: deque[tuple[str, int, Event]] = deque()
        self.nbytes = 0
        """Bytes that have been copied back to the device so far."""

    def begin(self, count: int, layers: int) -> None:
        """A pass begins, in which `count` micro-batches wait for each of `layers` layers."""
        self._places, self._gone = [], [None] * SLOTS
        self._count, self._layers, self._used = count, layers, 0

    def add(self, hidden: torch.Tensor) -> "Place":
        """Take the hidden states [rows, tokens, hidden] that the next micro-batch enters the first layer with. Raises
        BudgetError where they are more than was planned for."""
        nbytes = hidden.shape[:-1].numel() * self._token_nbytes
        start, self._used = self._used, self._used + nbytes
        if nbytes > self._slot_nbytes or self._used > len(self._host):
            raise BudgetError(
                f"{nbytes:,} bytes of hidden states, behind {start:,} of the same pass: planned for "
                f"{self._slot_nbytes:,} and {len(self._host):,}; ask for fewer tokens at once, or give more with --vram"
            )
        place = Place(self, len(self._places), hidden.shape, hidden.dtype, self._host[start : self._used])
        self._places.append(place)
        place.put(hidden)
        return place

    def drop(self) -> None:
        """After a pass that failed: wait until nothing is on its way any more."""
        for place in self._places:
            for event in filter(None, (place.arrived, place.left)):
                with contextlib.suppress(Exception):  # the pass has failed already, and says why
                    event.wait()
        self._places, self._under_way = [], deque()

    def rest(self) -> None:
        """Give the device's memory back until a pass begins."""
        self.close()
        self._slots.end()

    def close(self) -> None:
        """For the thread that gives the memory back: wait until nothing uses it."""
        self.drop()
        self._device.record().wait()

    @property
    def stays(self) -> bool:
        """Whether each micro-batch of the pass has a slot to itself."""
        return self._count <= SLOTS

    def put(self, place: "Place", hidden: torch.Tensor) -> None:
        """`Place.put`."""
        if hidden.nbytes > place.host.nbytes:
            raise BudgetError(
                f"hidden states {list(hidden.shape)} in {hidden.dtype} take {hidden.nbytes:,} bytes, planned for "
                f"{place.host.nbytes:,}; ask for fewer tokens at once, so that none wait, or give more with --vram"
            )
        place.dtype = hidden.dtype
        slot, memory = self._slot(place, place.turns)
        gone = self._gone[slot]
        # Later, what was copied into the slot came behind that.
        if not place.turns and gone is not None:
            self._device.wait_for(gone)
        self._device.uses(memory, writes=True)
        place.shown(memory).copy_(hidden)
        if not self.stays:
            place.left = self._gone[slot] = self._device.copy_out(memory, place.host, [self._device.record()])

    def take(self, place: "Place") -> torch.Tensor:
        """`Place.take`."""
        place.turns += 1
        _, memory = self._slot(place, place.turns)
        if not self.stays:
            if place.arrived is None:
                self._bring(place, place.turns)
            assert place.arrived is not None
            self._device.wait_for(place.arrived)
            place.arrived = None
            following = self._places[(place.number + 1) % self._count]
            # Behind the last micro-batch the first one follows, if there is another layer for it.
            if following.turns < self._layers:
                self._bring(following, following.turns + 1)
            self._tell()
        self._device.uses(memory)
        return place.shown(memory)

    def settled(self, place: "Place") -> torch.Tensor:
        """`Place.settled`."""
        if self.stays:
            return place.shown(self._slot(place, place.turns)[1])
        assert place.left is not None
        place.left.wait()
        self._tell()
        return place.shown(place.host)

    def _slot(self, place: "Place", turns: int) -> tuple[int, torch.Tensor]:
        """The slot of a place in one of its turns, and what of it is the place's."""
        slot = (place.number if self.stays else turns * self._count + place.number) % SLOTS
        start = slot * self._slot_nbytes
        return slot, self._slots.take()[start : start + place.host.nbytes]

    def _bring(self, place: "Place", turns: int) -> None:
        """Have a place's states copied into the slot of one of its turns."""
        slot, memory = self._slot(place, turns)
        gone = self._gone[slot]
        # The place's own copy was before that: there are more micro-batches than slots.
        assert gone is not None
        place.arrived = self._device.copy_in(place.host, memory, [gone])
        self._under_way.append((f"hidden-{place.number:03}", memory.nbytes, place.arrived))
        self.nbytes += memory.nbytes

    def _tell(self) -> None:
        """Tell of copies that have ended."""
        while self._under_way and self._under_way[0][2].is_done:
            name, nbytes, event = self._under_way.popleft()
            self._trace.record("bus", name, time.perf_counter() - event.seconds, event.seconds, nbytes)


@dataclass(eq=False)
class Place:
    """Where the hidden states of one micro-batch wait."""

    room: WaitingRoom
    number: int
    shape: torch.Size
    dtype: torch.dtype
    """Layers may return another one than the first of them is given."""
    host: torch.Tensor
    turns: int = 0
    """How many layers have been given them."""
    left: Event | None = None
    """Behind it they are in the host's memory."""
    arrived: Event | None = None
    """Behind it they are in the slot of their next turn; None: they have not been sent there."""

    def take(self) -> torch.Tensor:
        """What the next layer is given: on the device, valid until `put`."""
        return self.room.take(self)

    def put(self, hidden: torch.Tensor) -> None:
        """What a layer has made of them."""
        self.room.put(self, hidden)

    def settled(self) -> torch.Tensor:
        """What the last layer has made of them, on the device or in the host's memory; valid until the next pass."""
        return self.room.settled(self)

    def shown(self, memory: torch.Tensor) -> torch.Tensor:
        """`memory` as what they are."""
        return memory[: self.shape.numel() * self.dtype.itemsize].view(self.dtype).view(self.shape)
