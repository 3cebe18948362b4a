"""A flag that long computations look at between pieces of work."""

import ctypes

from tiered.errors import InterruptedRun


class CancelFlag:
    """Set from any thread; `check` raises InterruptedRun in the one that computes."""

    def __init__(self) -> None:
        # A plain number in memory, because native kernels look at it too, without the interpreter.
        self._value = ctypes.c_int32(0)

    def set(self) -> None:
        self._value.value = 1

    def clear(self) -> None:
        self._value.value = 0

    @property
    def is_set(self) -> bool:
        return self._value.value != 0

    @property
    def address(self) -> int:
        """Where native code finds it: an int32 that is not zero while set. It lives as long as this object."""
        return ctypes.addressof(self._value)

    def check(self) -> None:
        """Raise InterruptedRun if the flag is set."""
        if self.is_set:
            raise InterruptedRun("interrupted")
