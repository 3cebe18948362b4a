"""One feed for two that compute with the same units: the processor in the host's memory, a device in its own.

Each has a share, which is to it what a feed of its own would be, and takes part in the passes that it begins: in some
both do, and each unit is read once for both. A unit's memory is free again when all that take part in its pass have
given it back. Whoever takes part in a pass begins it before a block of it is lent.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch

from tiered.errors import BudgetError
from tiered.plan import Held, Tape
from tiered.stream.experts import ExpertCache
from tiered.stream.feed import Feed
from tiered.stream.walk import Receiver
from tiered.units import format_size

HELD: Final = Held(layers=True, head=True)
"""One computes a block after the other has: all of a block's units are in the host's memory together."""
KEPT_PASSES: Final = 16
"""Passes of which it is remembered who takes part: all that may not have been given back."""


class Fork:
    """The feed, and the passes. `begin` and `end` are for the thread that computes, all else is the loop's."""

    def __init__(self, tape: Tape, resident: frozenset[int], ring_nbytes: int) -> None:
        """Raises BudgetError where the host's ring is too small for a block of `tape`."""
        least = max((sum(piece) for piece in tape.streamed(HELD, resident)), default=0)
        if least > ring_nbytes:
            raise BudgetError(
                f"processor and device compute with the same layers: the host's ring of {format_size(ring_nbytes)} "
                f"must hold the largest of them, {format_size(least)}; give it more with --ram"
            )
        self.experts: ExpertCache | None = None
        """The cache of experts that both use."""
        self._count = len(tape.nbytes)
        self._feed: Feed[torch.Tensor] | None = None
        self._shares: list[Share] = []
        self._arrived: dict[int, torch.Tensor | Exception] = {}
        """Units that have been read, by the feed's keys."""
        self._users: dict[int, set[Share]] = {}
        """Who takes part in each pass."""
        self._left: dict[int, set[Share]] = {}
        """Of units that some have given back: who has not."""
        self._early: list[tuple[Share, int]] = []
        """Given back before it was known who takes part in the pass."""
        self._lending = -1
        """The last pass of which that is known."""
        self._rewound: set[Share] = set()
        self._is_open = False
        self.number = -1
        """The pass that was begun last."""
        self._active: set[Share] = set()
        """Who is in the middle of it."""

    @property
    def feed(self) -> Feed[torch.Tensor]:
        assert self._feed is not None
        return self._feed

    def set_feed(self, feed: Feed[torch.Tensor]) -> None:
        """The feed, which hands over to this."""
        self._feed = feed

    def share(self, units: Receiver[Any], view: Callable[[int, torch.Tensor], Any]) -> "Share":
        """A share that hands what `view` makes of a unit, at its position and in its memory, over to `units`."""
        self._shares.append(Share(self, self._count, units, view))
        return self._shares[-1]

    def begin(self, share: "Share") -> int:
        """A share takes part in the next pass, or in the one that another has begun and not ended."""
        if not self._active:
            self.number += 1
        self._active.add(share)
        return self.number

    def end(self, share: "Share") -> None:
        """A share has computed all of its pass."""
        self._active.discard(share)

    async def start(self) -> None:
        if not self._is_open:
            self._is_open = True
            await self.feed.start()

    async def close(self) -> None:
        if self._is_open:
            self._is_open = False
            await self.feed.close()

    def leave(self, share: "Share") -> None:
        """Between two passes: a share has done with all units, those among them that it has not come to."""
        for users in self._users.values():
            users.discard(share)
        for number, shares in list(self._left.items()):
            shares.discard(share)
            if not shares:
                del self._left[number]
                self.feed.take_back(deque([number]))

    async def rewind(self, share: "Share") -> None:
        """A share begins anew; when all do, the feed does."""
        for shares in (*self._users.values(), *self._left.values()):
            shares.discard(share)
        self._rewound.add(share)
        if len(self._rewound) < len(self._shares):
            return
        self._rewound.clear()
        self._users.clear()
        self._left.clear()
        self._early.clear()
        self._active.clear()
        self.number = self._lending = -1
        if self._is_open:
            await self.feed.rewind()

    def join(self, share: "Share", number: int) -> None:
        """A share takes part in pass `number`: it gets what has come of it."""
        self._users.setdefault(number, set()).add(share)
        self._users.pop(number - KEPT_PASSES, None)
        if self.feed.last_pass is not None and self.feed.last_pass < number:
            self.feed.set_last(None)
        for key, item in list(self._arrived.items()):
            if key // self._count == number:
                share.put(key, item)

    def give_back(self, share: "Share", number: int) -> None:
        """A share has done with a unit."""
        if number // self._count > self._lending:
            self._early.append((share, number))
            return
        left = self._left.setdefault(number, set(self._users[number // self._count]))
        left.discard(share)
        if not left:
            del self._left[number]
            self.feed.take_back(deque([number]))

    def begin_lending(self, number: int) -> None:
        """Nobody else will take part in pass `number`."""
        self._lending = number
        early, self._early = self._early, []
        for share, unit in early:
            self.give_back(share, unit)

    # What the feed tells.

    def put(self, key: int, item: torch.Tensor | Exception) -> None:
        self._arrived[key] = item
        for share in self._shares if key < 0 else self._waiting(key):
            share.put(key, item)

    def _waiting(self, number: int) -> Iterable["Share"]:
        """Those that take part in the pass of a unit and have not given it back: one may pass it by unread."""
        done = {share for share, unit in self._early if unit == number}
        return self._left.get(number, self._users.get(number // self._count, set())) - done

    def discard(self, key: int) -> None:
        self._arrived.pop(key, None)

    def clear(self, kept: int = 0) -> None:
        self._arrived = {k: item for k, item in self._arrived.items() if k < kept and not isinstance(item, Exception)}
        for share in self._shares:
            share.clear(kept)


class Share:
    """A feed for one of those that share one. Its passes, and so its units, are numbered by themselves."""

    def __init__(self, fork: Fork, count: int, units: Receiver[Any], view: Callable[[int, torch.Tensor], Any]) -> None:
        self._fork, self._count, self._units, self._view = fork, count, units, view
        self._passes: dict[int, int] = {}
        """The number that each of its passes has among all."""
        self._own: dict[int, int] = {}
        """The other way round."""
        self._next = 0
        """Number of its next pass."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self.begun = -1
        """The feed is asked for each unit that is not there."""

    @property
    def last_pass(self) -> int | None:
        """None where the feed has no last pass; else it is to be said again."""
        return None if self._fork.feed.last_pass is None else -1

    def begin_pass(self, on_join: Callable[[], None] = lambda: None) -> None:
        """`on_join` is called in the loop before anything is brought for the pass."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(on_join)
        self._loop.call_soon_threadsafe(self._join, self._fork.begin(self))

    def begin_lending(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._fork.begin_lending, self._fork.number)

    def end_pass(self) -> None:
        self._fork.end(self)

    def _join(self, number: int) -> None:
        own = self._next
        self._passes[own], self._own[number], self._next = number, own, own + 1
        self._own.pop(self._passes.pop(own - KEPT_PASSES, -1), None)
        self._fork.join(self, number)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._fork.start()

    async def close(self) -> None:
        await self._fork.close()

    async def rewind(self) -> None:
        self._begin_anew()
        await self._fork.rewind(self)

    def rest(self) -> None:
        """Between two passes: its next one is its first."""
        self._begin_anew()
        self._fork.leave(self)
        self._units.clear(0)

    def _begin_anew(self) -> None:
        self._passes.clear()
        self._own.clear()
        self._next = 0

    def key(self, number: int) -> int:
        key = self._fork.feed.key(number)
        return key if key < 0 else number

    def set_last(self, last: int | None) -> None:
        self._fork.feed.set_last(None if last is None else self._passes[last])

    def set_asked(self, number: int) -> None:
        own, position = divmod(number, self._count)
        # A pass that has not begun is only asked for ahead: computing does not wait for it.
        if own in self._passes:
            self._fork.feed.set_asked(self._passes[own] * self._count + position)

    def used(self, numbers: Sequence[int]) -> None:
        """As `Walk.used`."""

    def take_back(self, numbers: deque[int]) -> None:
        while numbers:
            number = numbers.popleft()
            own, position = divmod(number, self._count)
            self._units.discard(number)
            self._fork.give_back(self, self._passes[own] * self._count + position)

    def put(self, key: int, item: torch.Tensor | Exception) -> None:
        """What the feed has brought, by its key."""
        number, position = divmod(key, self._count)
        found = item if isinstance(item, Exception) else self._view(position, item)
        self._units.put(key if key < 0 else self._own[number] * self._count + position, found)

    def clear(self, kept: int) -> None:
        self._units.clear(kept)
