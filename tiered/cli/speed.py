"""How fast torch multiplies here, per dtype: a few milliseconds of the work a linear layer does."""

import time
from typing import Final

import torch
from torch.nn import functional

_ROWS: Final = 16
_SIZE: Final = 2048
_REPEATS: Final = 15
_DTYPES: Final = (torch.float32, torch.bfloat16)


def linear_speeds() -> dict[str, float]:
    """Floating-point operations per second of `linear` [16, 2048] x [2048, 2048], by dtype.

    The best of many: other work on the machine only ever makes one slower.
    """
    return {str(dtype).removeprefix("torch."): _speed(dtype) for dtype in _DTYPES}


def _speed(dtype: torch.dtype) -> float:
    x, weight = torch.ones(_ROWS, _SIZE, dtype=dtype), torch.ones(_SIZE, _SIZE, dtype=dtype)
    functional.linear(x, weight)  # the first call prepares threads and code
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        functional.linear(x, weight)
        seconds.append(time.perf_counter() - began)
    return 2 * _ROWS * _SIZE * _SIZE / min(seconds)
