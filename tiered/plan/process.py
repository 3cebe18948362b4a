"""What the runtimes of one process share: its memory, the interpreter's switch interval, glibc's heap, its forks.

`PROCESS` is the one object that lives as long as the process does, because what it keeps account of does too. A runtime
is a `Member` while it is open; several may be, and close in any order.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tiered.plan.budget import pin_malloc

_SWITCH_SECONDS: Final = 5e-4
"""Completions of reads wait for the interpreter lock; the default of 5 ms is longer than a read."""


@dataclass(eq=False)
class Member:
    """An open runtime."""

    pid: int
    budget: int = 0
    planned_nbytes: int = 0
    """What the process takes by its plan, this runtime and all that was there before it included."""

    @property
    def is_forked(self) -> bool:
        """Whether this process is a child of the one that opened it: neither threads nor memory came along."""
        return os.getpid() != self.pid


class Process:
    """The runtimes that are open in this process."""

    def __init__(self) -> None:
        self.opening = threading.Lock()
        """Held while one opens: what each takes is measured, and transformers' modules are patched meanwhile."""
        self._lock = threading.Lock()
        self._members: list[Member] = []
        self._interval = 0.0

    @property
    def planned_nbytes(self) -> int:
        """What this process will take by the plans of those that are open, used already or not; 0 where none is."""
        with self._lock:
            return max((member.planned_nbytes for member in self._members if not member.is_forked), default=0)

    @contextlib.contextmanager
    def member(self) -> Iterator[Member]:
        """One more, for as long as the context lasts; settings of the process are put back with the last."""
        member = Member(os.getpid())
        with self._lock:
            if not self._members:
                self._interval = sys.getswitchinterval()
                sys.setswitchinterval(_SWITCH_SECONDS)
            self._members.append(member)
        self.pin_malloc()
        try:
            yield member
        finally:
            with self._lock:
                self._members.remove(member)
                if not self._members:
                    sys.setswitchinterval(self._interval)
            self.pin_malloc()

    def begin_anew(self) -> None:
        """In a forked child: nothing is open here, and no lock is held, whatever other threads did in the parent."""
        if self._members:
            sys.setswitchinterval(self._interval)
        self.opening, self._lock, self._members = threading.Lock(), threading.Lock(), []

    def pin_malloc(self) -> None:
        """Let glibc keep what the largest budget allows: it has the plans of the others within it."""
        with self._lock:
            budget = max((member.budget for member in self._members), default=0)
        pin_malloc(budget)


PROCESS: Final = Process()
os.register_at_fork(after_in_child=PROCESS.begin_anew)
