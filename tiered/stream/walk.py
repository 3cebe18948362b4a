"""Walking the endless tape: each unit's turn, when it is wanted and its place in a ring is free. All is the loop's.

Two stages walk: the feed, which reads from disk (`feed.py`), and the one that copies to a device (`device_feed.py`).
Each is bounded by its ring, not by passes. `Streamer` tells them what the computation asks for and gives back.
"""

import abc
import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from tiered.errors import UnsupportedFamilyError
from tiered.plan.order import Reading
from tiered.stream.ring import Ring, RingSpan
from tiered.units import format_size

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Receiver(Protocol[T_contra]):
    """Gets what a walk brings, by key."""

    def put(self, key: int, item: T_contra | Exception) -> None:
        """An item, or the error because of which there is none."""

    def discard(self, key: int) -> None:
        """Nobody will take what was brought for `key`."""

    def clear(self, kept: int = 0) -> None:
        """Forget all errors, and the items whose key is `kept` or more."""


class Source(Protocol):
    """What brings units to one that computes: a walk, or a share of one. What is said of it is said of `Walk`."""

    @property
    def begun(self) -> int: ...

    @property
    def last_pass(self) -> int | None: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def rewind(self) -> None: ...

    def key(self, number: int) -> int: ...

    def set_last(self, last: int | None) -> None: ...

    def set_asked(self, number: int) -> None: ...

    def take_back(self, numbers: deque[int]) -> None: ...

    def used(self, numbers: Sequence[int]) -> None: ...

    def begin_pass(self) -> None: ...

    def begin_lending(self) -> None: ...

    def end_pass(self) -> None: ...


Order = Callable[[], Iterator[Reading]]
"""The turns of a tape's units, from the first one on."""


class Walk(abc.ABC, Generic[T]):
    """Walks through `order`, of units of `sizes` bytes, and hands them over to `units`, by `key`.

    Units whose positions are `resident` have memory of their own, all others a place in a ring of `ring_nbytes` bytes.
    `name` is what the unit of a position is called. `prefetch` is that of `Streamer`. An error that ends the walk is
    handed over to whoever asks for what will not come; one that names `family` where the computation waits for what can
    never come. None: units come back without the computation.
    """

    def __init__(
        self,
        order: Order,
        sizes: Sequence[int],
        resident: Collection[int],
        ring_nbytes: int,
        units: Receiver[T],
        name: Callable[[int], str],
        family: str | None,
        prefetch: int | None,
    ) -> None:
        self._order, self._sizes, self._positions = order, sizes, frozenset(resident)
        self._ring_nbytes = ring_nbytes
        self._units, self._name = units, name
        self._family, self._prefetch = family, prefetch
        self._group: asyncio.TaskGroup | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False
        self._restart()

    def _restart(self) -> None:
        """The state before the first unit."""
        self._ring = Ring(self._ring_nbytes)
        self._changed = asyncio.Event()
        """Set whenever what the walk waits for may have come about."""
        self._asked = -1
        """The last number that has been asked for; one that has begun need not be."""
        self.begun = -1
        """The last number that the walk is done with: its reads or its copy have begun, if it has any. The computing
        thread looks at it."""
        self.last_pass: int | None = None
        """Number of the pass after which nothing is brought; None: not known yet."""
        self._spans: dict[int, RingSpan] = {}
        """The places of units that are coming or are there, by number on the endless tape."""
        self._coming: set[int] = set()
        self._unwanted: set[int] = set()
        """Units that the computation has passed by before they came."""
        self._ahead: deque[int] = deque()
        """Units that were begun before they were asked for; those that have been asked for since leave at times."""
        self._failure: tuple[int, Exception] | None = None
        """The error because of which the walk has ended, and the first number that will not come."""

    @abc.abstractmethod
    async def _begin_resident(self, turn: Reading) -> None:
        """The turn of a unit that has memory of its own."""

    @abc.abstractmethod
    async def _begin_streamed(self, turn: Reading, span: RingSpan) -> None:
        """Have a unit come to its place in the ring; `_bring_back` is called when it has, or with an error."""

    def _pass_by(self, turn: Reading) -> None:
        """The computation has passed a unit by before it was begun."""

    def _dropped(self) -> Iterable[asyncio.Task[None]]:
        """Tasks beside the walk that a rewind ends."""
        return ()

    def _ended(self) -> Iterable[asyncio.Task[None]]:
        """Tasks beside the walk that closing ends."""
        return ()

    async def _settle(self) -> None:
        """In a rewind, when the walk has ended: wait for what must have ended too."""

    async def start(self) -> None:
        """Begin to walk."""
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._begin_walk()

    def _begin_walk(self) -> None:
        assert self._group is not None
        self._task = self._group.create_task(self._walk(), name="tiered-feed")

    async def close(self) -> None:
        """End all that is on its way."""
        assert self._group is not None and self._task is not None
        self._is_closing = True
        for task in (self._task, *self._ended()):
            task.cancel()
        await self._group.__aexit__(None, None, None)
        self._units.clear(kept=-len(self._sizes))  # their memory goes back to whose it is

    def key(self, number: int) -> int:
        """Key of a unit by its number on the endless tape: the number, or if resident one below 0, the same in each
        pass."""
        position = number % len(self._sizes)
        return position - len(self._sizes) if position in self._positions else number

    async def rewind(self) -> None:
        """Begin at the first unit: end what is on its way, and drop what came ahead. Resident units stay, and go on
        coming."""
        assert self._task is not None
        dropped = [self._task, *self._dropped()]
        for task in dropped:
            task.cancel()
        await asyncio.wait(dropped)
        if not self._is_closing:
            await self._settle()
        if self._is_closing:
            return
        self._units.clear(kept=0)
        self._restart()
        self._begin_walk()

    def set_last(self, last: int | None) -> None:
        """Bring nothing after pass `last`; None: it is not known yet which is the last one."""
        self.last_pass = last
        self._changed.set()

    def set_asked(self, number: int) -> None:
        """The computation waits for unit `number`."""
        self._asked = max(self._asked, number)
        self._changed.set()
        self._raise_failure(number)

    def _raise_failure(self, number: int) -> None:
        """Hand the walk's error to whoever waits for unit `number`, if that will not come."""
        if self._failure is not None and number >= self._failure[0]:
            self._units.put(self.key(number), self._failure[1])

    def begin_pass(self) -> None:
        """In the thread that computes: a pass begins."""

    def begin_lending(self) -> None:
        """In the thread that computes: all who compute in the pass have begun it."""

    def end_pass(self) -> None:
        """In the thread that computes: all blocks of a pass have been computed."""

    def used(self, numbers: Sequence[int]) -> None:
        """In the thread that computes: units that it will give back have been computed with, or passed by."""

    def take_back(self, numbers: deque[int]) -> None:
        """Take back units that the computation has used, or has passed by. Empties `numbers`."""
        while numbers:
            number = numbers.popleft()
            if number in self._spans and number not in self._coming:
                self._units.discard(number)
                self._release(number)
            else:
                self._unwanted.add(number)
        self._changed.set()

    def _release(self, number: int) -> None:
        """The place of a unit is free again."""
        self._ring.release(self._spans.pop(number))

    async def _walk(self) -> None:
        for turn in self._order():
            try:
                if turn.start is not None:
                    await self._stream(turn, turn.start)
                else:
                    await self._begin_resident(turn)
                self.begun = turn.number
            except Exception as error:
                # A walk that dies silently would leave the computation waiting for ever.
                self._fail(turn.number, error)
                return

    def _fail(self, number: int, error: Exception) -> None:
        """The walk ends with an error: unit `number` and all after it will not come."""
        self._failure = number, error
        for asked in range(number, self._asked + 1):
            self._raise_failure(asked)

    async def _stream(self, turn: Reading, start: int) -> None:
        """Find a unit its place at `start` of the ring, and have it come; unless the computation passes it by."""
        number = turn.number
        while number not in self._unwanted:
            span = self._ring.borrow_at(start, self._sizes[turn.position])
            if span is None:
                self._check_not_stuck(number)
                await self._change()
                continue
            # After the wait for the ring, because what is wanted may change during it.
            await self._until_wanted(turn)
            if number in self._unwanted:
                self._ring.release(span)
                break
            self._spans[number] = span
            self._coming.add(number)
            await self._begin_streamed(turn, span)
            return
        self._unwanted.discard(number)
        self._pass_by(turn)

    def _check_not_stuck(self, number: int) -> None:
        """Raises UnsupportedFamilyError if unit `number`, for which there is no memory now, will never find any: the
        computation waits for it, or for a later one, and so gives nothing back."""
        if self._family is None or number > self._asked or not self._unwanted.isdisjoint(self._spans):
            return
        asked, *lent = (self._name(unit % len(self._sizes)) for unit in (self._asked, *sorted(self._spans)))
        raise UnsupportedFamilyError(
            f"model family {self._family!r}: {asked} is asked for while units that have not been given back "
            f"({', '.join(lent)}) leave no room in the ring of {format_size(self._ring_nbytes)}, expected {lent[0]} "
            "to be used first; layers use weights in another order than the store was made for: convert the model "
            "again with this version of tiered and transformers"
        )

    async def _until_wanted(self, turn: Reading) -> None:
        """Wait while a unit is not to come yet."""
        number = turn.number
        while number not in self._unwanted and not self._is_wanted(number, turn.passed):
            await self._change()
        if self._prefetch is not None and number > self._asked:
            self._ahead.append(number)

    def _is_wanted(self, number: int, passed: int) -> bool:
        if self.last_pass is not None and passed > self.last_pass:
            return False
        while self._ahead and self._ahead[0] <= self._asked:
            self._ahead.popleft()
        return self._prefetch is None or number <= self._asked or len(self._ahead) < self._prefetch

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _bring_back(self, key: int, found: T | Exception) -> None:
        """Hand over a unit that has come, unless the computation has passed it by meanwhile."""
        if not self._is_passed_by(key):
            self._units.put(key, found)

    def _is_passed_by(self, key: int) -> bool:
        """A unit is no longer coming: whether the computation has passed it by meanwhile. Its place is free then."""
        self._coming.discard(key)
        if key not in self._unwanted:
            return False
        self._unwanted.discard(key)
        self._release(key)
        self._changed.set()
        return True
