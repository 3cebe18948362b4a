"""A device as small as tests of cache and model want it: a copy is made when somebody waits for it, and no sooner."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from tiered.device import Event

_POISON = 0xFF


class _LateEvent:
    seconds = 0.0

    def __init__(self, work: Callable[[], object] | None = None) -> None:
        self._work = work

    @property
    def is_done(self) -> bool:
        return self._work is None

    def wait(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work()


class LateDevice:
    """Its memory is the host's. What a copy will write is filled with NaN when the copy is issued."""

    name, description, where = "late", "of tests", torch.device("cpu")
    context_nbytes = peak_nbytes = 0
    stalled_seconds, checks = 0.0, False

    unregistered = None
    capability, vram_nbytes, context_nbytes, checks = None, 1 << 40, 0, True

    def __init__(self) -> None:
        self.copied_out = 0
        """Copies to the host so far."""
        self.depth = 0
        """How often `computing` is entered and has not been left."""
        self._borrowed: set[int] = set()

    def warm_up(self, dtype: torch.dtype) -> None:
        pass

    def borrow(self, nbytes: int, label: str) -> torch.Tensor:
        memory = torch.full((nbytes,), _POISON, dtype=torch.uint8)
        self._borrowed.add(memory.untyped_storage().data_ptr())
        return memory

    def release(self, memory: torch.Tensor) -> None:
        self._borrowed.remove(memory.untyped_storage().data_ptr())

    @property
    def held_nbytes(self) -> int:
        return 0

    def trim(self) -> None:
        pass

    def register(self, address: int, nbytes: int) -> str | None:
        return None

    def unregister(self, address: int) -> None:
        pass

    def copy_in(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        raise AssertionError("nothing here copies to the device")

    def copy_out(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        assert source.untyped_storage().data_ptr() in self._borrowed, "not of this device's memory"
        assert after, "nothing says that the source has been computed"
        target.fill_(_POISON)
        self.copied_out += 1
        return _LateEvent(functools.partial(target.copy_, source))

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def wait_for(self, event: Event) -> None:
        event.wait()

    def record(self) -> Event:
        return _LateEvent()

    def uses(self, memory: torch.Tensor, writes: bool = False) -> None:
        pass

    def discards(self, memory: torch.Tensor) -> None:
        pass

    def host_writes(self, memory: torch.Tensor) -> None:
        pass

    def close(self) -> None:
        pass
