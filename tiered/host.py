"""The host: what a process has once, whatever models it runs.

`Host` has the one thread that computes, the kernels with their threads, the cancel flag that interrupts them, and the
clocks of disk and trace; several runtimes may share one. `PROCESS` is the one object that lives as long as the process,
as do the things it manages: the plans of all open runtimes, the interpreter's switch interval, glibc's heap.
"""

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

import torch

from tiered.device import Device, open_device
from tiered.errors import ConfigError, InterruptedRun
from tiered.io import IdleClock
from tiered.io.arena import populate_refusal
from tiered.kernels import CancelFlag, DeviceKernels, Kernels, Mode
from tiered.model import KernelAttention, registered_attention
from tiered.outcome import Outcome
from tiered.plan import available_budget, cpu_count, process_peak_rss_bytes, process_rss_bytes
from tiered.plan.budget import GROWTH_NBYTES, pin_malloc
from tiered.proc import reset_peak_rss
from tiered.process import interrupts_later, interrupts_now
from tiered.trace import Tracer
from tiered.units import MIB

_SWITCH_SECONDS: Final = 5e-4
"""The interpreter's switch interval: finished reads wait for its lock, and the default of 5 ms exceeds a read."""
_REGROWTH_NBYTES: Final = 4 * MIB
"""By how much a process grows in a run, if a runtime has computed in it before."""
_ANOTHER_NBYTES: Final = 96 * MIB
"""What one more runtime in a process takes by itself, at least: graph, kernels, threads. What was measured each time
varied by 60 MB with what the allocator had kept, so that a budget named by a refusal was refused again."""
_SETTLE_SECONDS: Final = 5.0
"""After an interruption, how long work in flight may take to end before a warning says what is waited for."""

T = TypeVar("T")
_LOG: Final = logging.getLogger(__name__)


class Host:
    """Computes for the runtimes of a process, one thing at a time.

    A context manager that several users may be in at once; its threads end when the last one leaves it, and the device
    is closed. `kernels` is a name of `tiered.kernels.KERNEL_NAMES`; `device` one of `tiered.device.open_device`, of
    whose memory `vram` bytes may be used. Entering it raises ConfigError where the device cannot be used, unless
    `falls_back`: it has none then, and `device_refusal` says why.
    """

    def __init__(
        self,
        threads: int | None = None,
        kernels: str = "auto",
        kernel_mode: Mode = Mode.INVARIANT,
        keep_spans: bool = False,
        device: str | None = None,
        vram: int | None = None,
        falls_back: bool = False,
    ) -> None:
        self.threads = threads or cpu_count()
        self.trace, self.clock, self.cancel = Tracer(keep_spans), IdleClock(), CancelFlag()
        self._kernels, self._mode = kernels, kernel_mode
        self._device, self._vram, self._falls_back = device, vram, falls_back
        self.computer: DeviceComputer | None = None
        """The device that computes beside the processor, while the host is open."""
        self.device_refusal: str | None = None
        """Why there is none, where one was asked for."""
        self.promised_nbytes = 0
        """Bytes of the device's memory that the plans of open runtimes take."""
        self._users, self._lock = 0, threading.Lock()
        self._calls: set[_Call[Any]] = set()
        """What `compute` runs or is about to run."""
        self._current: _Call[Any] | None = None
        self._queue: queue.SimpleQueue[_Call[Any] | None] = queue.SimpleQueue()
        self._resources = contextlib.ExitStack()

    def check(
        self,
        threads: int | None,
        kernels: str,
        kernel_mode: Mode,
        device: str | None = None,
        vram: int | None = None,
    ) -> None:
        """Raise ConfigError if a runtime wants it otherwise than this host computes."""
        wanted = threads or self.threads, kernels, kernel_mode, device, vram
        found = self.threads, self._kernels, self._mode, self._device, self._vram
        if wanted != found:
            raise ConfigError(
                f"threads, kernels, kernel mode, device, vram: asked for {', '.join(map(str, wanted))}, but the host "
                f"has {', '.join(map(str, found))}; all runtimes of a host compute alike"
            )

    def __enter__(self) -> Self:
        is_in = False
        try:
            with interrupts_later(), self._lock:
                if not self._users:
                    self._begin()
                self._users += 1
                is_in = True
            return self
        except BaseException:
            if is_in:
                self.__exit__(None, None, None)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with interrupts_later():
            with self._lock:
                self._users -= 1
                resources = contextlib.ExitStack() if self._users else self._resources
            resources.close()

    def _begin(self) -> None:
        with contextlib.ExitStack() as stack:
            self.kernels = stack.enter_context(Kernels(self.threads, self.cancel, self._mode, self._kernels))
            if self.kernels.refusal is not None and self._kernels == "auto":
                why = self.kernels.refusal
                _LOG.warning("native kernels are off, torch's slower operators compute: %s; see 'tiered doctor'", why)
            if (refusal := populate_refusal()) is not None:
                _LOG.warning("memory is not taken ahead of reads, the first pass takes longer: %s", refusal)
            self.attention: KernelAttention = stack.enter_context(registered_attention(self.kernels))
            self.computer = self._begin_device(stack)
            with interrupts_later():
                thread = threading.Thread(target=self._serve, name="tiered-compute", daemon=True)
                thread.start()
                stack.callback(self._end_thread, thread)
            self._resources = stack.pop_all()

    def _begin_device(self, stack: contextlib.ExitStack) -> "DeviceComputer | None":
        self.device_refusal = None
        if self._device is None:
            return None
        try:
            device = open_named(self._device, self._vram)
        except ConfigError as error:
            if not self._falls_back:
                raise
            # What would help is said behind the last semicolon: the processor, for one, which computes already.
            self.device_refusal = str(error).rpartition("; ")[0] or str(error)
            why = self.device_refusal
            _LOG.warning("the processor computes instead of a GPU, as --fallback cpu allows: %s", why)
            return None
        stack.callback(device.close)
        with interrupts_now():  # compiling takes seconds
            kernels = DeviceKernels(device.where, self._mode, self.cancel)
        stack.enter_context(kernels)
        if kernels.refusal is not None and device.where.type == "cuda":
            _LOG.warning(
                "torch's slower operators compute on %s: %s; see 'tiered doctor'", device.name, kernels.refusal
            )
        attention = stack.enter_context(registered_attention(kernels, self.kernels))
        return DeviceComputer(device, kernels, attention)

    def _end_thread(self, thread: threading.Thread) -> None:
        """Let the compute thread end when it has done what is queued."""
        with interrupts_later():
            self._queue.put(None)
            thread.join()

    @contextlib.contextmanager
    def promised(self, nbytes: int) -> Iterator[None]:
        """So many bytes of the device's memory are a runtime's, until the context ends."""
        self.promised_nbytes += nbytes
        try:
            yield
        finally:
            self.promised_nbytes -= nbytes

    def compute(self, work: Callable[[], T], owner: object = None) -> T:
        """Run `work` in the compute thread, where torch's threads are, while signals reach the caller's thread.

        Work of several callers runs one after the other. Whatever ends the waiting here, an interruption too, this
        `work` has ended then, and that of others goes on. `owner` is whom `interrupt` may end it for.
        """
        call = _Call(owner, work)
        try:
            with self._lock:
                assert self._users, "the host is closed: nobody would run it"
                self._calls.add(call)
                # Behind the end of the thread nobody would run it.
                self._queue.put(call)
            return call.outcome.result()
        except BaseException:
            self._settle(call)
            raise
        finally:
            with self._lock:
                self._calls.discard(call)
            # An error holds this frame, and the call the error: a cycle that only the garbage collector would free.
            del call

    def interrupt(self, owner: object) -> None:
        """End what `compute` runs, or is about to run, for `owner`: it raises InterruptedRun."""
        with self._lock:
            for call in self._calls:
                if call.owner is owner:
                    self._end(call)

    def _end(self, call: "_Call[Any]") -> None:
        """Interrupt `call`, or keep it from beginning. With `_lock` held."""
        call.is_ended = True
        if call is self._current:
            self.cancel.set()

    def _settle(self, call: "_Call[Any]") -> None:
        """End `call`, whether or not it has been queued or has begun, and wait until it computes nothing any more;
        interrupts meanwhile mean what the first one meant."""
        began = time.monotonic()
        while True:
            try:
                with self._lock:
                    if call is not self._current:
                        call.is_ended = True
                        return
                    self._end(call)
                call.outcome.wait()
                if time.monotonic() - began > _SETTLE_SECONDS:
                    _LOG.warning("interrupted: waiting for reads in flight to end before their memory is released")
                    began = float("inf")
            except KeyboardInterrupt:
                pass

    def _serve(self) -> None:
        """The compute thread."""
        while (call := self._queue.get()) is not None:
            self._run(call)
            del call  # and what it holds, while nothing comes

    def _run(self, call: "_Call[Any]") -> None:
        """In the compute thread: a call, with the cancel flag meant for it alone."""
        result, error = None, None
        with self._lock:
            if not call.is_ended:
                self._current = call
        try:
            if self._current is None:
                raise InterruptedRun("interrupted")
            result = call.work()
        except BaseException as raised:
            error = raised
        with self._lock:
            self._current = None
            self.cancel.clear()
        if error is None:
            call.outcome.bring(result)
        else:
            call.outcome.fail(error)
        del call, result, error  # as in `compute`

    def warm_up(self, dtype: torch.dtype) -> None:
        """Use what every run uses (thread pool, linear algebra, attention), so that the memory it takes is part of
        what the process is measured to take by itself."""
        self.compute(lambda: _warm_up(self.threads, dtype))


def open_named(name: str, vram: int | None) -> Device:
    """`open_device`, whose refusal names the device, and not the option by which nobody may have named it."""
    try:
        return open_device(name, vram)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("--device ")) from error


def _warm_up(threads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(threads)
    x = torch.ones(1, 2, 8, 64, dtype=dtype)
    torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    for rows in (1, 8):
        torch.nn.functional.linear(torch.ones(rows, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype))
    torch.nn.functional.layer_norm(x, (64,))


@dataclass(frozen=True, eq=False)
class DeviceComputer:
    """A device, with what computes there."""

    device: Device
    kernels: DeviceKernels
    attention: KernelAttention


@dataclass(eq=False)
class _Call(Generic[T]):
    """One call of `Host.compute`."""

    owner: object
    work: Callable[[], T]
    outcome: Outcome[T] = field(default_factory=Outcome)
    is_ended: bool = False
    """Whether somebody has asked for its end."""


@dataclass(eq=False)
class Member:
    """An open runtime."""

    pid: int
    budget: int = 0
    planned_nbytes: int = 0
    """Bytes that the process takes by this runtime's plan, including all that was there before it."""
    has_run: bool = False
    """Whether it has begun to compute."""

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
        self._has_run = False
        """Whether one that is closed has computed."""

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
                if self._has_run:
                    reset_peak_rss()  # what runtimes took that are closed is no part of the next one's budget
            self._members.append(member)
        self.pin_malloc()
        try:
            yield member
        finally:
            with self._lock:
                self._members.remove(member)
                self._has_run |= member.has_run
                if not self._members:
                    sys.setswitchinterval(self._interval)
            self.pin_malloc()

    def begin_anew(self) -> None:
        """Called in a forked child: nothing is open here, and no lock is held, whatever the parent's threads did."""
        if self._members:
            sys.setswitchinterval(self._interval)
        self.opening, self._lock, self._members, self._has_run = threading.Lock(), threading.Lock(), [], False

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
        # A process in which a runtime has run before has grown already, all but a little.
        growth = _REGROWTH_NBYTES if self._has_run else GROWTH_NBYTES
        return max(max(rss, process_peak_rss_bytes()) + growth, promised + GROWTH_NBYTES)

    def pin_malloc(self) -> None:
        """Let glibc keep what the largest budget of open runtimes allows: the other plans are counted in it."""
        with self._lock:
            budget = max((member.budget for member in self._members), default=0)
        pin_malloc(budget)


PROCESS: Final = Process()
os.register_at_fork(after_in_child=PROCESS.begin_anew)
