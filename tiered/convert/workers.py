"""Quantizing on all cores: natively, or with torch on a thread of its own for each slice of rows.

torch would split every small operation over its threads and wait for all of them each time; on a busy machine that
is tens of times slower than one thread that works through, so torch's own threading is off there. Neither threads nor
slices nor the native kernel change a bit of the result: groups lie within rows.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, Literal

import torch

from tiered.kernels import Kernels
from tiered.quant import QuantizedTensor, Scheme, quantize
from tiered.units import MIB

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


class Quantizers:
    """Threads that quantize, started when first used; `kernels` is the name of the kernels to use."""

    def __init__(self, kernels: str = "auto") -> None:
        self._name = kernels
        self._kernels: Kernels | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._torch_threads = torch.get_num_threads()

    def quantize(
        self, panel: torch.Tensor, scheme: Scheme, clip: Literal["mse", "minmax"], name: str
    ) -> Iterator[QuantizedTensor]:
        """Quantize `panel` [rows, in]; yields its parts in order. After the last one the panel is no longer needed."""
        if self._kernels is None:
            self._kernels = Kernels(worker_count(), name=self._name)
        if self._kernels.quantizes(panel.dtype, scheme):
            yield self._kernels.quantize(panel, scheme, clip=clip, name=name)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(worker_count(), "quantize", torch.set_num_threads, (1,))
        rows = -(-panel.shape[0] // worker_count())
        futures = [self._pool.submit(quantize, part, scheme, clip=clip, name=name) for part in panel.split(rows)]
        for future in futures:
            yield future.result()

    def close(self) -> None:
        if self._kernels is not None:
            self._kernels.close()
            self._kernels = None
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            torch.set_num_threads(self._torch_threads)  # new threads would start with the workers' setting
