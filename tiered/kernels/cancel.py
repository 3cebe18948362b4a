"""A flag that long computations look at between pieces of work."""

import threading

from tiered.errors import InterruptedRun


class CancelFlag:
    """Set from any thread; `check` raises InterruptedRun in the one that computes."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def clear(self) -> None:
        self._event.clear()

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raise InterruptedRun if the flag is set."""
        if self._event.is_set():
            raise InterruptedRun("interrupted")
