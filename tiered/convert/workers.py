"""Quantizing on all cores: natively, or with torch on a thread of its own for each slice of rows.

torch would split every small operation over its threads and wait for all of them each time; on a busy machine that
is tens of times slower than one thread that works through, so torch's own threading is off there. Neither threads nor
slices nor the native kernel change a bit of the result: groups lie within rows.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, Literal, TypeVar

import torch

from tiered.kernels import Kernels
from tiered.process import shut_down
from tiered.quant import QuantizedTensor, Scheme, quantize
from tiered.units import MIB

Result = TypeVar("Result")

_MOST_WORKERS: Final = 8
"""Enough for any disk; each takes _WORKER_NBYTES where torch quantizes."""
_WORKER_NBYTES: Final = 24 * MIB
"""Temporaries of one thread that quantizes with torch: about a dozen of `tiered.quant.quantize.PANEL_BYTES`. The
native kernel needs a few KiB."""


def worker_count() -> int:
    """Threads that quantize."""
    return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)


def quantizing_nbytes(schemes: Iterable[Scheme]) -> int:
    """Bytes of memory that quantizing to `schemes` takes besides its input and its results."""
    with Kernels(1) as kernels:
        is_native = all(kernels.quantizes(torch.float32, scheme) for scheme in schemes)
    return 0 if is_native else worker_count() * _WORKER_NBYTES


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
    """Threads that quantize, started when first used; `kernels` is the name of the kernels to use."""

    def __init__(self, kernels: str = "auto") -> None:
        self._name = kernels
        self._kernels: Kernels | None = None
        self._threads = TorchThreads(worker_count(), "quantize")

    def quantize(
        self, panel: torch.Tensor, scheme: Scheme, clip: Literal["mse", "minmax"], name: str
    ) -> Iterator[QuantizedTensor]:
        """Quantize `panel` [rows, in]; yields its parts in order. After the last one the panel is no longer needed."""
        if self._kernels is None:
            self._kernels = Kernels(worker_count(), name=self._name)
        if self._kernels.quantizes(panel.dtype, scheme):
            yield self._kernels.quantize(panel, scheme, clip=clip, name=name)
            return
        rows = -(-panel.shape[0] // worker_count())
        futures = [self._threads.submit(quantize, part, scheme, clip=clip, name=name) for part in panel.split(rows)]
        for future in futures:
            yield future.result()

    def close(self) -> None:
        if self._kernels is not None:
            self._kernels.close()
            self._kernels = None
        self._threads.close()
