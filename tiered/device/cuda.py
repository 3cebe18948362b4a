"""A CUDA device through torch: three streams, memory from torch's allocator, and events between them.

Host memory is registered by the CUDA runtime that torch has loaded. Nothing is done on import: a process that opens no
device has no context.
"""

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import torch

from tiered.device.cuda_driver import clear_error, usable, used_nbytes
from tiered.device.device import Event
from tiered.errors import BudgetError, ConfigError, shortened
from tiered.units import GIB, MIB, PAGE, format_size, round_up

_REGISTERED_NBYTES: Final = 64 * GIB
"""Bytes that are registered by one call: drivers refuse 512 GiB."""
_PORTABLE: Final = 1
"""cudaHostRegisterPortable: for whichever thread copies."""
_FREE_SHARE: Final = 0.9
"""Of what is free, how much is used where nobody says how much may be: others may want some."""
_UNKNOWN_CONTEXT_NBYTES: Final = 640 * MIB
"""What the context is taken for where the driver's library does not tell."""


class CudaEvent:
    """A point of a stream; the end of a copy if it has a beginning."""

    def __init__(self, end: torch.cuda.Event, begin: torch.cuda.Event | None = None, *kept: torch.Tensor) -> None:
        self.end, self._begin = end, begin
        self._kept = kept
        """Memory that the copy uses."""

    @property
    def is_done(self) -> bool:
        return bool(self.end.query())

    @property
    def seconds(self) -> float:
        return self._begin.elapsed_time(self.end) / 1000 if self._begin is not None else 0.0

    def wait(self) -> None:
        self.end.synchronize()


class CudaDevice:
    """Device number `index`, of whose memory this process uses `vram` bytes at most, context and all; None: 90 % of
    what is free.

    Computing is bounded as well: torch's allocator may take what is left beside the context, and raises its
    OutOfMemoryError rather than take more. Raises ConfigError, in one line, where the device cannot be used.
    """

    def __init__(self, index: int, vram: int | None) -> None:
        self.name, self.where = f"cuda:{index}", torch.device("cuda", index)
        self.checks = False
        properties = usable(index)
        self.capability: tuple[int, int] = (properties.major, properties.minor)
        """Compute capability."""
        before = used_nbytes(properties)
        with torch.cuda.device(index):
            free, total = self._begin()
        after, self._reserved = used_nbytes(properties), torch.cuda.memory_reserved(index)
        self.context_nbytes = _UNKNOWN_CONTEXT_NBYTES
        """Bytes that the driver's context takes, and libraries with what they have of torch's allocator."""
        if before is not None and after is not None:
            self.context_nbytes = max(0, after - before)
        free += self.context_nbytes
        self.vram_nbytes = vram if vram is not None else int(free * _FREE_SHARE)
        if self.vram_nbytes > free:
            raise ConfigError(
                f"--device {self.name}: {format_size(self.vram_nbytes)} of its memory are to be used, of which only "
                f"{format_size(free)} are free; end what else uses it, or use less with --vram"
            )
        self._allowed = max(0, self.vram_nbytes - self.context_nbytes)
        """Bytes that may be borrowed."""
        torch.cuda.set_per_process_memory_fraction(min(1.0, (self._allowed + self._reserved) / total), index)
        self.description = (
            f"{properties.name}, {format_size(total)}, compute capability {self.capability[0]}.{self.capability[1]}"
        )
        self._index = index
        self._lock = threading.Lock()
        self._borrowed: dict[int, tuple[str, torch.Tensor]] = {}
        self._registered: dict[int, list[tuple[int, int]]] = {}
        """Start and bytes of the pieces of registered memory, by its address."""
        self._copies: deque[CudaEvent] = deque()
        """Copies that may not be done: their memory is kept."""
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        """Points of computing before and after waits that have not been counted."""
        self._stalled_seconds = 0.0
        self.unregistered: str | None = None

    def _begin(self) -> tuple[int, int]:
        """Make the context, the streams and what a first product loads. Returns the bytes that are free then, and all
        there are."""
        try:
            self._in, self._out, self._computing = (torch.cuda.Stream(self.where) for _ in range(3))
            with self.computing():
                self._multiply()
            return torch.cuda.mem_get_info(self.where)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
                raise ConfigError(f"--device {self.name}: it has no memory left; end what else uses it") from error
            raise ConfigError(f"--device {self.name}: {shortened(error)}; see 'tiered doctor'") from error

    def _multiply(self) -> None:
        """A product, for which the libraries that all others need are loaded."""
        ones = torch.ones(16, 16, device=self.where)
        (ones @ ones).sum().item()

    # Memory.

    def borrow(self, nbytes: int, label: str) -> torch.Tensor:
        wanted = round_up(max(nbytes, 1), PAGE)
        with self._lock:
            used = sum(memory.nbytes for _, memory in self._borrowed.values())
            try:
                if used + wanted > self._allowed:
                    raise torch.OutOfMemoryError
                memory = self._allocate(wanted + PAGE)
            except torch.OutOfMemoryError:
                in_use = [("context", self.context_nbytes)]
                in_use += [(name, memory.nbytes) for name, memory in self._borrowed.values()]
                told = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in in_use)
                raise BudgetError(
                    f"{label}: {format_size(wanted)} do not fit the {format_size(self.vram_nbytes)} that may be used "
                    f"of the memory of {self.name}, of which are in use: {told}; give it more with --vram"
                ) from None
            start = -memory.data_ptr() % PAGE
            memory = memory[start : start + wanted]
            self._borrowed[memory.data_ptr()] = label, memory
        return memory[:nbytes]

    def _allocate(self, nbytes: int) -> torch.Tensor:
        # By the stream that computes: what is given back is then at once free for what it needs besides.
        with self.computing():
            return torch.empty(nbytes, dtype=torch.uint8, device=self.where)

    def release(self, memory: torch.Tensor) -> None:
        address = memory.data_ptr()
        assert address in self._borrowed, f"{address:#x}: released twice, or not from this device"
        del self._borrowed[address]

    @property
    def peak_nbytes(self) -> int:
        return self.context_nbytes - self._reserved + torch.cuda.max_memory_reserved(self._index)

    def register(self, address: int, nbytes: int) -> str | None:
        assert address % PAGE == 0 and nbytes > 0, f"{nbytes} bytes at {address:#x} are no pages"
        runtime: Any = torch.cuda.cudart()
        pieces = self._registered.setdefault(address, [])
        for start in range(address, address + nbytes, _REGISTERED_NBYTES):
            size = min(_REGISTERED_NBYTES, address + nbytes - start)
            with torch.cuda.device(self._index):
                code = runtime.cudaHostRegister(start, size, _PORTABLE)
            if code != runtime.cudaError.success:
                clear_error(self.where)
                self.unregister(address)
                self.unregistered = f"cudaHostRegister of {format_size(size)}: {runtime.cudaGetErrorString(code)}"
                return self.unregistered
            pieces.append((start, size))
        return None

    def unregister(self, address: int) -> None:
        runtime: Any = torch.cuda.cudart()
        for start, _ in self._registered.pop(address):
            runtime.cudaHostUnregister(start)

    # Copies.

    def copy_in(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        return self._copy(self._in, source, target, source, after)

    def copy_out(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        return self._copy(self._out, source, target, target, after)

    def _copy(
        self,
        stream: torch.cuda.Stream,
        source: torch.Tensor,
        target: torch.Tensor,
        host: torch.Tensor,
        after: Sequence[Event],
    ) -> Event:
        assert source.nbytes == target.nbytes, f"{source.nbytes} bytes to {target.nbytes}"
        begin, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        with self._lock:
            for event in after:
                assert isinstance(event, CudaEvent)
                stream.wait_event(event.end)
            begin.record(stream)
            with torch.cuda.stream(stream):
                for part in self._parts(host):
                    target[part].copy_(source[part], non_blocking=True)
            end.record(stream)
            copied = CudaEvent(end, begin, source, target)
            self._copies.append(copied)
            while self._copies and self._copies[0].is_done:
                self._copies.popleft()
        return copied

    def _parts(self, host: torch.Tensor) -> Iterator[slice]:
        """`host` without a part that lies in two registered pieces, as no copy may: all of it, nearly always."""
        address, cuts = host.data_ptr(), [0, len(host)]
        if host.nbytes == len(host):
            inner = (start - address for pieces in self._registered.values() for start, _ in pieces[1:])
            cuts += [cut for cut in inner if 0 < cut < len(host)]
        cuts.sort()
        for start, stop in itertools.pairwise(cuts):
            yield slice(start, stop)

    # Computing.

    @contextlib.contextmanager
    def _in_stream(self) -> Iterator[None]:
        with torch.cuda.device(self.where), torch.cuda.stream(self._computing):
            yield

    def computing(self) -> AbstractContextManager[None]:
        return self._in_stream()

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        before, behind = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(self._computing)
        self._computing.wait_event(event.end)
        behind.record(self._computing)
        self._waits.append((before, behind))

    @property
    def stalled_seconds(self) -> float:
        with self._lock:
            while self._waits and self._waits[0][1].query():
                before, behind = self._waits.popleft()
                self._stalled_seconds += before.elapsed_time(behind) / 1000
            return self._stalled_seconds

    def record(self) -> Event:
        end = torch.cuda.Event(blocking=True)
        end.record(self._computing)
        return CudaEvent(end)

    def uses(self, memory: torch.Tensor, writes: bool = False) -> None:
        """Streams and events order what there is to order."""

    def discards(self, memory: torch.Tensor) -> None:
        """As `uses`."""

    def host_writes(self, memory: torch.Tensor) -> None:
        """As `uses`."""

    def close(self) -> None:
        for stream in (self._in, self._out, self._computing):
            stream.synchronize()
        for address in list(self._registered):
            self.unregister(address)
        self._copies.clear()
        self._waits.clear()
        self._borrowed.clear()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, self._index)
