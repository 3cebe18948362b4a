"""A CUDA device through torch: three streams, memory from torch's allocator, and events between them.

Host memory is registered by the CUDA runtime that torch has loaded. Nothing is done on import: a process that opens no
device has no context.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import torch

from tiered.device.cuda_copies import CopyStream, CudaEvent, parts_of
from tiered.device.cuda_driver import Use, clear_error, usable
from tiered.device.device import Event
from tiered.errors import BudgetError, ConfigError, shortened
from tiered.units import GIB, MIB, PAGE, format_size, round_up

_REGISTERED_NBYTES: Final = 64 * GIB
"""Bytes that are registered by one call: drivers refuse 512 GiB."""
_PORTABLE: Final = 1
"""cudaHostRegisterPortable: for whichever thread copies."""
_FREE_SHARE: Final = 0.9
"""Of what is free, how much is used where nobody says how much may be: others may want some."""
_ROUNDING_NBYTES: Final = 64 * MIB
"""What torch's allocator takes and nobody has: segments of 20 MiB for blocks of 1 to 10 MiB, and of 2 MiB for smaller
ones, for each of two streams; and blocks that are rounded to 2 MiB."""
_LATER_NBYTES: Final = 32 * MIB
"""By how much the context grows in a run: kernels are loaded when they are first used."""


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
        self._index = index
        self._use = Use(index, properties)
        with torch.cuda.device(index):
            free, self._total = self._begin()
        self._measure()
        free += self._outside + torch.cuda.memory_reserved(index)
        self.vram_nbytes = vram if vram is not None else int(free * _FREE_SHARE)
        if self.vram_nbytes > free:
            raise ConfigError(
                f"--device {self.name}: {format_size(self.vram_nbytes)} of its memory are to be used, of which only "
                f"{format_size(free)} are free; end what else uses it, or use less with --vram"
            )
        self.description = (
            f"{properties.name}, {format_size(self._total)}, compute capability "
            f"{self.capability[0]}.{self.capability[1]}"
        )
        self._lock = threading.Lock()
        self._borrowed: dict[int, tuple[str, torch.Tensor]] = {}
        self._registered: dict[int, list[tuple[int, int]]] = {}
        """Start and bytes of the pieces of registered memory, by its address."""
        self._counting = threading.Lock()
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        """Points of computing before and after waits that have not been counted."""
        self._stalled_seconds = 0.0
        self.unregistered: str | None = None

    def _begin(self) -> tuple[int, int]:
        """Make the context, the streams and what a first product loads. Returns the bytes that are free then, and all
        there are."""
        with self._refusing():
            self._in, self._out = (CopyStream(self.where, f"tiered-copy-{way}") for way in ("in", "out"))
            self._computing = torch.cuda.Stream(self.where)
            with self.computing():
                self._multiply(torch.float32)
            return torch.cuda.mem_get_info(self.where)

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """What goes wrong is told in one line."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
                raise ConfigError(f"--device {self.name}: it has no memory left; end what else uses it") from error
            raise ConfigError(f"--device {self.name}: {shortened(error)}; see 'tiered doctor'") from error

    def warm_up(self, dtype: torch.dtype) -> None:
        with self._refusing(), self.computing():
            self._multiply(dtype)
        with self._lock:
            if not self._borrowed:
                self._measure()

    def _multiply(self, dtype: torch.dtype) -> None:
        """What every run does: products of few rows and of many, with and without bias, and softmax. Libraries are
        loaded for it, and this thread gets handles and workspaces of them."""
        ones = torch.ones(64, 64, dtype=dtype, device=self.where)
        for rows in (1, 64):
            torch.nn.functional.linear(ones[:rows], ones)
            torch.nn.functional.linear(ones[:rows], ones, ones[0])
        for batch in (ones[None], ones[None].float()):
            torch.bmm(batch, batch)
        torch.softmax(ones.float(), -1).to(dtype).sum().item()

    def _measure(self) -> None:
        """What the process uses by now is the context."""
        torch.cuda.empty_cache()  # what is cached can be had
        torch.cuda.reset_peak_memory_stats(self._index)  # and what was used before is no part of this budget
        self._outside = self._use.measure()
        """Bytes of it outside torch's allocator."""
        self.context_nbytes = self._outside + torch.cuda.memory_reserved(self._index) + _ROUNDING_NBYTES + _LATER_NBYTES

    # Memory.

    @property
    def _allowed(self) -> int:
        """Bytes that may be borrowed."""
        return max(0, self.vram_nbytes - self.context_nbytes)

    def _limit(self) -> None:
        """Bound torch's allocator. Not before something is borrowed, which a plan has come before: a budget that does
        not even hold the context is refused by that, with what it lacks."""
        allowed = max(0, self.vram_nbytes - self._outside - _LATER_NBYTES)
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / self._total), self._index)

    def borrow(self, nbytes: int, label: str) -> torch.Tensor:
        wanted = round_up(max(nbytes, 1), PAGE)
        with self._lock:
            used = sum(memory.nbytes for _, memory in self._borrowed.values())
            try:
                if used + wanted > self._allowed:
                    raise torch.OutOfMemoryError
                if not self._borrowed:
                    self._limit()
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
        with self._lock:
            assert address in self._borrowed, f"{address:#x}: released twice, or not from this device"
            del self._borrowed[address]
        for copies in (self._in, self._out):
            copies.drain()  # or they would keep it

    @property
    def peak_nbytes(self) -> int:
        return self._outside + torch.cuda.max_memory_reserved(self._index)

    @property
    def held_nbytes(self) -> int:
        return self._outside + torch.cuda.memory_reserved(self._index)

    def trim(self) -> None:
        for copies in (self._in, self._out):
            copies.drain()  # or they would keep it
        torch.cuda.empty_cache()

    def register(self, address: int, nbytes: int) -> str | None:
        assert address % PAGE == 0 and nbytes > 0, f"{nbytes} bytes at {address:#x} are no pages"
        runtime: Any = torch.cuda.cudart()
        pieces: list[tuple[int, int]] = []
        for start in range(address, address + nbytes, _REGISTERED_NBYTES):
            size = min(_REGISTERED_NBYTES, address + nbytes - start)
            with torch.cuda.device(self._index):
                code = runtime.cudaHostRegister(start, size, _PORTABLE)
            if code != runtime.cudaError.success:
                clear_error(self.where)
                self._unregister(pieces)
                self.unregistered = f"cudaHostRegister of {format_size(size)}: {runtime.cudaGetErrorString(code)}"
                return self.unregistered
            pieces.append((start, size))
        with self._lock:
            self._registered[address] = pieces
        return None

    def unregister(self, address: int) -> None:
        with self._lock:
            pieces = self._registered.pop(address)
        self._unregister(pieces)

    def _unregister(self, pieces: Sequence[tuple[int, int]]) -> None:
        runtime: Any = torch.cuda.cudart()
        with torch.cuda.device(self._index):
            for start, _ in pieces:
                runtime.cudaHostUnregister(start)

    # Copies.

    def copy_in(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        return self._copy(self._in, source, target, source, after)

    def copy_out(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        return self._copy(self._out, source, target, target, after)

    def _copy(
        self,
        stream: CopyStream,
        source: torch.Tensor,
        target: torch.Tensor,
        host: torch.Tensor,
        after: Sequence[Event],
    ) -> Event:
        assert source.nbytes == target.nbytes, f"{source.nbytes} bytes to {target.nbytes}"
        start, stop = host.data_ptr(), host.data_ptr() + host.nbytes
        with self._lock:
            known = list(self._registered.values())
        pieces = next((pieces for pieces in known if pieces[0][0] <= start and stop <= sum(pieces[-1])), None)
        is_staged = pieces is None and not host.is_pinned()
        return stream.copy(source, target, list(parts_of(host, pieces or ())), after, is_staged)

    # Computing.

    @contextlib.contextmanager
    def _in_stream(self) -> Iterator[None]:
        with torch.cuda.device(self.where), torch.cuda.stream(self._computing):
            yield

    def computing(self) -> AbstractContextManager[None]:
        return self._in_stream()

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        arrival = event.end
        before, behind = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(self._computing)
        self._computing.wait_event(arrival)
        behind.record(self._computing)
        with self._counting:
            self._waits.append((before, behind))
        self._count_waits()

    @property
    def stalled_seconds(self) -> float:
        self._count_waits()
        return self._stalled_seconds

    def _count_waits(self) -> None:
        with self._counting:
            while self._waits and self._waits[0][1].query():
                before, behind = self._waits.popleft()
                self._stalled_seconds += before.elapsed_time(behind) / 1000

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
        self._in.close()
        self._out.close()
        self._computing.synchronize()
        for address in list(self._registered):
            self.unregister(address)
        self._waits.clear()
        self._borrowed.clear()
        torch._C._cuda_clearCublasWorkspaces()  # of streams that nobody uses again
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, self._index)
