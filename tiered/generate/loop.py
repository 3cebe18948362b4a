"""Drives the scheduler until every item of an iterable has ended.

`generate` is what `tiered generate` and `tiered batch` call with sequences, and `score.py` with windows of texts.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Generic

from tiered.generate.costs import Generation
from tiered.generate.scheduler import EventKind, PassRunner, Scheduler, T
from tiered.model import OnBlock


def generate(
    runner: PassRunner,
    items: Iterable[T],
    batch_size: int,
    on_pass: Callable[[], None] = lambda: None,
    on_finished: Callable[[T], None] = lambda item: None,
    on_block: OnBlock | None = None,
) -> Generation:
    """Run `items` to their ends on `runner`, at most `batch_size` at once. Returns what it cost.

    An item is taken from the iterable when there is room for it. `on_pass` is called after every pass, when the items
    have taken their logits. `on_finished` is called once for every item, after the pass in which it ended; items that
    end in the same pass come in the order they began. An item that cannot be computed ends with an error, at the
    latest after the pass in which the error shows.

    Raises whatever `items`, a pass or a callback raises.
    """
    source = _Source(iter(items))
    with Scheduler[T](runner, batch_size, lambda: not source.is_empty) as scheduler:
        while True:
            while scheduler.has_room and not source.is_empty:
                scheduler.add(source.take())
            if scheduler.is_idle:
                return scheduler.costs
            passes = scheduler.costs.passes
            events = scheduler.step(on_block)
            if scheduler.costs.passes > passes:
                on_pass()
            for event in events:
                if event.kind is not EventKind.TOKEN:
                    on_finished(event.ticket.item)


class _Source(Generic[T]):
    """An iterator that can tell whether it is empty; to find out, it takes the next item beforehand."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._next: T | None = None
        self._is_exhausted = False

    @property
    def is_empty(self) -> bool:
        if self._next is None and not self._is_exhausted:
            self._next = next(self._items, None)
            self._is_exhausted = self._next is None
        return self._next is None

    def take(self) -> T:
        """The next item; there must be one."""
        item, self._next = self._next, None
        assert item is not None
        return item
