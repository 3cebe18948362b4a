"""The arena: one accounted pool from which every large buffer is taken.

Private anonymous memory, because shared mappings get no huge pages and count as shmem; huge pages advised, because
they mean fewer segments per disk request; kept out of children, because O_DIRECT into private memory is unsafe
across fork.
"""

import ctypes
import functools
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

import torch

from tiered.errors import BudgetError
from tiered.store import PAGE
from tiered.units import format_size, round_up

_POPULATE_WRITE: Final = 23
"""MADV_POPULATE_WRITE of Linux 5.14. CPython's `mmap.madvise` would keep the interpreter's lock meanwhile."""
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, eq=False)
class Slab:
    """Page-aligned bytes borrowed from an arena."""

    label: str
    offset: int
    nbytes: int
    view: memoryview = field(repr=False)
    address: int = field(repr=False)

    def tensor(self) -> torch.Tensor:
        """The same bytes as a uint8 tensor; it must not be used after the slab is released."""
        return torch.frombuffer(self.view, dtype=torch.uint8)

    def populate(self, start: int, nbytes: int) -> bool:
        """Take the memory of `nbytes` bytes from `start` from the system now, without changing what they hold; others
        may use them meanwhile. False where the kernel refuses. The slab must not be released before this returns."""
        assert start >= 0 and start + nbytes <= self.nbytes, f"{self.label}: {start} + {nbytes} of {self.nbytes}"
        return _populate(self.address + start, nbytes) == 0


@functools.cache
def populate_refusal() -> str | None:
    """Why the kernel takes no memory ahead of its use; None where it does."""
    with Arena(PAGE) as arena:
        error = _populate(arena.address, PAGE)
    return None if not error else f"MADV_POPULATE_WRITE, of Linux 5.14: {os.strerror(error)}"


def _populate(address: int, nbytes: int) -> int:
    """Populate the pages of `nbytes` bytes, without the interpreter's lock; returns an errno, 0 for none."""
    first = address // PAGE * PAGE
    size = ctypes.c_size_t(address + nbytes - first)
    return ctypes.get_errno() if _LIBC.madvise(ctypes.c_void_p(first), size, _POPULATE_WRITE) else 0


class Arena:
    """A pool of `nbytes` with first-fit borrowing. Pages are taken from the system when they are first touched."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = max(round_up(nbytes, PAGE), PAGE)
        self._map = mmap.mmap(-1, self._nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
            try:
                self._map.madvise(advice)
            except OSError:
                # Kernels built without huge pages refuse the advice; memory works all the same.
                continue
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._borrowed: dict[int, Slab] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def in_use(self) -> Mapping[str, int]:
        """Bytes borrowed now, by label."""
        used: dict[str, int] = {}
        for slab in self._borrowed.values():
            used[slab.label] = used.get(slab.label, 0) + slab.nbytes
        return used

    def borrow(self, nbytes: int, label: str) -> Slab:
        """A slab of at least `nbytes`. Raises BudgetError where no gap is large enough."""
        wanted = max(round_up(nbytes, PAGE), PAGE)
        start = self._find_gap(wanted)
        if start is None:
            raise BudgetError(
                f"{label}: {format_size(wanted)} do not fit the arena of {format_size(self._nbytes)}, "
                f"of which {format_size(sum(self.in_use.values()))} are in use"
            )
        slab = Slab(label, start, wanted, memoryview(self._map)[start : start + wanted], self.address + start)
        self._borrowed[start] = slab
        return slab

    def release(self, slab: Slab) -> None:
        """Give a slab back; its pages stay with the process for the next borrower."""
        assert self._borrowed.get(slab.offset) is slab, f"{slab.label}: released twice, or not from this arena"
        del self._borrowed[slab.offset]

    def close(self) -> None:
        """Give the memory back to the system.

        Views that are still referenced keep the addresses mapped until they go, so nothing can dangle: they read zeros.
        """
        self._borrowed.clear()
        self._map.madvise(mmap.MADV_DONTNEED)
        try:
            self._map.close()
        except BufferError:
            # A tensor still refers to it; the addresses are unmapped with the last reference.
            return

    def _find_gap(self, wanted: int) -> int | None:
        position = 0
        for offset in sorted(self._borrowed):
            if offset - position >= wanted:
                return position
            position = offset + self._borrowed[offset].nbytes
        return position if self._nbytes - position >= wanted else None
