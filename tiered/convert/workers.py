"""Computing on all cores: threads that each work through what they have begun, natively or with torch.

torch would split every small operation over its threads and wait for all of them each time; on a busy machine that
is tens of times slower than one thread that works through, so torch's own threading is off there. Neither threads nor
the native kernel change a bit of what is quantized: groups lie within rows.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, Literal, TypeVar

import torch

from tiered.kernels import CodedRows, Kernels
from tiered.kernels.library import Level, Library, load_library
from tiered.process import shut_down
from tiered.quant import QuantizedTensor, Scheme
from tiered.units import MIB

Result = TypeVar("Result")

_MOST_WORKERS: Final = 8
"""Enough for any disk, where torch computes; each takes _WORKER_NBYTES then."""
_MOST_FAST_WORKERS: Final = 3
"""Enough for any disk, where vectors compute; each takes a panel."""
_WORKER_NBYTES: Final = 24 * MIB
"""Temporaries of one thread that quantizes with torch: about a dozen of `tiered.quant.quantize.PANEL_BYTES`. The
native kernel needs a few KiB."""


def worker_count() -> int:
    """Threads that compute."""
    library = load_library()
    is_fast = isinstance(library, Library) and library.best_level() > Level.SCALAR
    return min(len(os.sched_getaffinity(0)), _MOST_FAST_WORKERS if is_fast else _MOST_WORKERS)


def maker_count() -> int:
    """Threads that read and compute by turns: while one reads, all others compute."""
    return worker_count() + 1


def quantizing_nbytes(schemes: Iterable[Scheme]) -> int:
    """Bytes of memory that quantizing to `schemes` takes besides its input and its results."""
    with Kernels(1) as kernels:
        is_native = all(kernels.quantizes(torch.float32, scheme) for scheme in schemes)
    return 0 if is_native else maker_count() * _WORKER_NBYTES


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Run torch's operations on the calling thread alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchThreads:
    """`count` threads, started when first used, on each of which torch computes alone."""

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._pool: ThreadPoolExecutor | None = None
        self._torch_threads = torch.get_num_threads()

    def submit(self, call: Callable[..., Result], *args: Any, **kwargs: Any) -> Future[Result]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._count, self._name, torch.set_num_threads, (1,))
        return self._pool.submit(call, *args, **kwargs)

    def close(self) -> None:
        """End the threads; what has not begun is not done."""
        if self._pool is not None:
            shut_down(self._pool, cancel_futures=True)
            self._pool = None
            torch.set_num_threads(self._torch_threads)  # new threads would start with the workers' setting


class Quantizers:
    """Kernels for threads that quantize, a thread's own for as long as it quantizes; `kernels` is their name."""

    def __init__(self, kernels: str = "auto") -> None:
        self._name = kernels
        self._free: list[Kernels] = []

    def quantize(
        self,
        panel: torch.Tensor | CodedRows,
        scheme: Scheme,
        clip: Literal["mse", "minmax"],
        name: str,
        out: torch.Tensor | None = None,
    ) -> QuantizedTensor:
        """Quantize `panel` [rows, in] in the calling thread; in the memory `out`, u8, if that is large enough."""
        try:
            kernels = self._free.pop()
        except IndexError:
            kernels = Kernels(1, name=self._name)
        try:
            return kernels.quantize(panel, scheme, clip=clip, name=name, out=out)
        finally:
            self._free.append(kernels)

    def close(self) -> None:
        while self._free:
            self._free.pop().close()
