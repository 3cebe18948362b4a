"""Panels of a weight's rows: what a reader of weights hands out, and the threads that make them.

In: from a reader, how each panel is read and taken apart (`Panels`); from whoever wants them, what becomes of it
(`Panels.then`), codes above all. Out: what is made, in order, while the next ones are being made (`Makers`).

One thread reads a panel, takes it apart and quantizes it, so nothing waits for the slower of two halves, and a panel is
in one processor's cache. Readers let one thread read at a time; meanwhile the others compute.
"""

import mmap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from tiered.convert.workers import TorchThreads, maker_count
from tiered.units import PAGE, round_up

Made = TypeVar("Made")
Other = TypeVar("Other")


@dataclass(frozen=True)
class Panels(Generic[Made]):
    """How the panels of some rows are made, in any order and by any threads."""

    count: int
    make: Callable[[int, torch.Tensor], Made]
    """Makes the panel of this number in the given memory, u8 of `nbytes` or more, which it may refer to."""
    nbytes: int
    """Memory that making one takes."""

    def then(self, use: Callable[[Made, torch.Tensor], Other], nbytes: int = 0) -> "Panels[Other]":
        """What `use` makes of each of them, in `nbytes` of memory of its own."""
        made_nbytes = round_up(self.nbytes, PAGE)

        def make(number: int, room: torch.Tensor) -> Other:
            return use(self.make(number, room[:made_nbytes]), room[made_nbytes:])

        return Panels(self.count, make, made_nbytes + nbytes)

    def __iter__(self) -> Iterator[Made]:
        """One after the other, in the calling thread and in memory of their own."""
        for number in range(self.count):
            yield self.make(number, torch.empty(self.nbytes, dtype=torch.uint8))


def rooms_nbytes(panel_nbytes: int) -> int:
    """Bytes of memory of all panels at a time, where each takes `panel_nbytes`."""
    return (maker_count() + 1) * panel_nbytes


class Makers:
    """Threads that make panels, started when first used."""

    def __init__(self) -> None:
        self._count = maker_count()
        self._threads = TorchThreads(self._count, "panels")
        self._rooms: list[torch.Tensor] = []
        """Memory that nobody uses: what is new each time is filled with zeros first."""

    def line(self, all_panels: Sequence[Panels[Made]]) -> list[Iterator[Made]]:
        """For each of these, what is made of it, to be taken one after the other: towards the end of one, the first
        panels of the next are made. Each thing that is made is valid until the next is asked for."""
        waiting = iter([(panels, number) for panels in all_panels for number in range(panels.count)])
        begun = deque[tuple[Future[Made], torch.Tensor]]()

        def begin() -> None:
            while len(begun) < self._count:
                following = next(waiting, None)
                if following is None:
                    return
                panels, number = following
                room = self._room(panels.nbytes)
                begun.append((self._threads.submit(panels.make, number, room), room))

        def deliver(count: int) -> Iterator[Made]:
            for _ in range(count):
                begin()  # what is made lies in memory that was given back just now
                future, room = begun.popleft()
                made = future.result()
                begin()
                yield made
                self._rooms.append(room)

        return [deliver(panels.count) for panels in all_panels]

    def close(self) -> None:
        """End the threads; what has not begun is not made."""
        self._threads.close()
        self._rooms.clear()

    def _room(self, nbytes: int) -> torch.Tensor:
        room = self._rooms.pop() if self._rooms else None
        if room is None or room.numel() < nbytes:
            del room  # the system has it back at once
            room = torch.frombuffer(mmap.mmap(-1, max(1, nbytes)), dtype=torch.uint8)
        return room
