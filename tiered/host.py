"""The host: what a process has once, whatever models it runs.

`Host` has the one thread that computes, the kernels with their threads, the cancel flag that interrupts them, and the
clocks of disk and trace; several runtimes may share one. `PROCESS` is the one object that lives as long as the process,
as do the things it manages: the plans of all open runtimes, the interpreter's switch interval, glibc's heap.
"""

import concurrent.futures
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self, TypeVar

import torch

from tiered.io import IdleClock
from tiered.kernels import CancelFlag, Kernels, Mode
from tiered.model import KernelAttention, registered_attention
from tiered.plan import available_budget, cpu_count, process_peak_rss_bytes, process_rss_bytes
from tiered.plan.budget import pin_malloc
from tiered.trace import Tracer
from tiered.units import MIB

_SWITCH_SECONDS: Final = 5e-4
"""The interpreter's switch interval: finished reads wait for its lock, and the default of 5 ms exceeds a read."""
_GROWTH_NBYTES: Final = 16 * MIB
"""By how much the process itself grows in a run: code pages touched for the first time, thread stacks."""
_ANOTHER_NBYTES: Final = 96 * MIB
"""What one more runtime in a process takes by itself, at least: graph, kernels, threads. What was measured each time
varied by 60 MB with what the allocator had kept, so that a budget named by a refusal was refused again."""
_POLL_SECONDS: Final = 0.1
"""Seconds between two looks for a signal, while the caller's thread waits."""

T = TypeVar("T")
_LOG: Final = logging.getLogger(__name__)


class Host:
    """Computes for the runtimes of a process, one thing at a time.

    A context manager that several users may be in at once; its threads end when the last one leaves it.
    `kernels` is a name of `tiered.kernels.KERNEL_NAMES`.
    """

    def __init__(
        self,
        threads: int | None = None,
        kernels: str = "auto",
        kernel_mode: Mode = Mode.INVARIANT,
        keep_spans: bool = False,
    ) -> None:
        self.threads = threads or cpu_count()
        self.trace, self.clock, self.cancel = Tracer(keep_spans), IdleClock(), CancelFlag()
        self._kernels, self._mode = kernels, kernel_mode
        self._users, self._counting = 0, threading.Lock()
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with self._counting:
            if not self._users:
                self._begin()
            self._users += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._counting:
            self._users -= 1
            if not self._users:
                self._resources.close()

    def _begin(self) -> None:
        with contextlib.ExitStack() as stack:
            self.kernels = stack.enter_context(Kernels(self.threads, self.cancel, self._mode, self._kernels))
            if self.kernels.refusal is not None and self._kernels == "auto":
                why = self.kernels.refusal
                _LOG.warning("native kernels are off, torch's slower operators compute: %s; see 'tiered doctor'", why)
            self.attention: KernelAttention = stack.enter_context(registered_attention(self.kernels))
            self._compute = ThreadPoolExecutor(1, thread_name_prefix="tiered-compute")
            stack.callback(self._compute.shutdown, wait=True)
            # The pool's thread starts now: an interrupt during a later start would leave a pool with two threads.
            self._compute.submit(lambda: None).result()
            self._resources = stack.pop_all()

    def compute(self, work: Callable[[], T]) -> T:
        """Run `work` in the thread that computes, where torch's threads are, while signals reach the caller's thread.

        Returns or raises only when `work` has ended, also after an interruption.
        """
        try:
            return wait_for(self._compute.submit(work))
        except BaseException:
            self.cancel.set()
            # The flag is cleared only when nothing runs that is to see it.
            self._settle()
            self.cancel.clear()
            raise

    def _settle(self) -> None:
        """Wait until the compute thread has nothing to do; further interrupts meanwhile change nothing."""
        while True:
            try:
                self._compute.submit(lambda: None).result()
                return
            except KeyboardInterrupt:
                continue

    def warm_up(self, dtype: torch.dtype) -> None:
        """Use what every run uses (thread pool, linear algebra, attention), so that the memory it takes is part of
        what the process is measured to take by itself."""
        self.compute(lambda: _warm_up(self.threads, dtype))


def wait_for(future: Future[T]) -> T:
    """The result of `future`, waited for in slices, because a signal is only seen between them."""
    try:
        while True:
            try:
                return future.result(timeout=_POLL_SECONDS)
            except concurrent.futures.TimeoutError:
                if future.done():
                    return future.result()
    except BaseException:
        future.cancel()
        raise
    finally:
        # An error holds this frame, and the future the error: a cycle that only the garbage collector would free.
        del future


def _warm_up(threads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(threads)
    x = torch.ones(1, 2, 8, 64, dtype=dtype)
    torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    for rows in (1, 8):
        torch.nn.functional.linear(torch.ones(rows, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype))
    torch.nn.functional.layer_norm(x, (64,))


@dataclass(eq=False)
class Member:
    """An open runtime."""

    pid: int
    budget: int = 0
    planned_nbytes: int = 0
    """Bytes that the process takes by this runtime's plan, including all that was there before it."""

    @property
    def is_forked(self) -> bool:
        """Whether this process is a child of the one that opened it: neither threads nor memory came along."""
        return os.getpid() != self.pid


class Process:
    """The runtimes that are open in this process."""

    def __init__(self) -> None:
        self.opening = threading.Lock()
        """Held while a runtime opens: what it takes is measured, and transformers' modules are patched meanwhile."""
        self._lock = threading.Lock()
        self._members: list[Member] = []
        self._interval = 0.0

    @property
    def planned_nbytes(self) -> int:
        """Bytes that this process will take by the plans of its open runtimes, taken already or not; 0 without any."""
        with self._lock:
            return max((member.planned_nbytes for member in self._members if not member.is_forked), default=0)

    @contextlib.contextmanager
    def member(self) -> Iterator[Member]:
        """One more open runtime, until the context ends. The end of the last one restores the process's settings."""
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
        """Called in a forked child: nothing is open here, and no lock is held, whatever the parent's threads did."""
        if self._members:
            sys.setswitchinterval(self._interval)
        self.opening, self._lock, self._members = threading.Lock(), threading.Lock(), []

    def measure_baseline(self, member: Member, before: int, budget: int | None = None) -> int:
        """Bytes that the process takes by itself, of what `member` may use: `budget` bytes, or if None what is free.

        `before`: bytes that the process had before graph and kernels were built. The first call fixes what `member`
        may use.
        """
        member.budget = member.budget or budget or available_budget()
        self.pin_malloc()
        rss = process_rss_bytes()
        # Models that are open already may not have taken yet what they planned to.
        promised = self.planned_nbytes + max(rss - before, _ANOTHER_NBYTES)
        return max(rss, process_peak_rss_bytes(), promised) + _GROWTH_NBYTES

    def pin_malloc(self) -> None:
        """Let glibc keep what the largest budget of open runtimes allows: the other plans are counted in it."""
        with self._lock:
            budget = max((member.budget for member in self._members), default=0)
        pin_malloc(budget)


PROCESS: Final = Process()
os.register_at_fork(after_in_child=PROCESS.begin_anew)
