"""How fast linear layers are computed here: a few milliseconds of each kind."""

import time
from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch.nn import functional

from tiered.kernels import Kernels
from tiered.quant import GroupScheme, QuantizedTensor, QuantizedWeight

_ROWS: Final = 16
_SIZE: Final = 2048
_REPEATS: Final = 15
_DTYPES: Final = (torch.float32, torch.bfloat16)
_INT4_SHAPE: Final = (2048, 4096)
_INT4_ROWS: Final = (1, 64)
_INT4_SECONDS: Final = 0.06
"""Of each kind; a slow one is still called twice."""


def linear_speeds() -> dict[str, float]:
    """Floating-point operations per second of `linear` [16, 2048] x [2048, 2048], by dtype.

    The best of many: other work on the machine only ever makes one slower.
    """
    return {str(dtype).removeprefix("torch."): _speed(dtype) for dtype in _DTYPES}


def int4_speeds(kernels: Kernels) -> dict[int, tuple[float, float]]:
    """Packed bytes per second of a linear layer in int4, by rows: with `kernels`, and with the torch reference."""
    out, in_ = _INT4_SHAPE
    scheme = GroupScheme(4)
    codes = QuantizedTensor(
        torch.randint(0, 256, (out, in_ // 2), dtype=torch.uint8),
        torch.full((out, in_ // scheme.group_size), 0.01, dtype=torch.float16),
        torch.full((out, in_ // scheme.group_size), 8, dtype=torch.uint8),
    )
    weight, nbytes = QuantizedWeight(codes, scheme), sum(codes_.nbytes for codes_ in codes)
    found = {}
    with Kernels(kernels.threads, name="torch") as reference:
        for rows in _INT4_ROWS:
            x = torch.randn(rows, in_).to(torch.bfloat16)
            seconds = [_best(partial(which.linear, x, weight)) for which in (kernels, reference)]
            found[rows] = (nbytes / seconds[0], nbytes / seconds[1])
    return found


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest call."""
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < _INT4_SECONDS:
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _speed(dtype: torch.dtype) -> float:
    x, weight = torch.ones(_ROWS, _SIZE, dtype=dtype), torch.ones(_SIZE, _SIZE, dtype=dtype)
    functional.linear(x, weight)  # the first call prepares threads and code
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        functional.linear(x, weight)
        seconds.append(time.perf_counter() - began)
    return 2 * _ROWS * _SIZE * _SIZE / min(seconds)
