"""How long the processor takes for rows: the kernels timed on a matrix of the model's kind, in a second or less.

In: the kernels, the scheme and the width of the model's linear layers. Out: seconds per weight for any number of rows.
The matrix is larger than the processor's own caches, as a model's layers are.
"""

import bisect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from tiered.kernels import Kernels
from tiered.quant import GroupScheme, QuantizedTensor, QuantizedWeight

_ROWS: Final = (1, 4, 16, 64, 256)
_NBYTES: Final = 24 << 20
_SECONDS: Final = 0.1
"""For each number of rows, after one run that does not count."""


@dataclass(frozen=True)
class ComputeRate:
    """Measured times, between which others are interpolated."""

    rows: tuple[int, ...]
    seconds_per_weight: tuple[float, ...]

    def seconds(self, rows: int, weights: int) -> float:
        """For `rows` rows through `weights` weights; beyond what was measured time grows with the rows."""
        if rows >= self.rows[-1]:
            return self.seconds_per_weight[-1] * weights * rows / self.rows[-1]
        at = bisect.bisect_right(self.rows, rows)
        low, high = self.rows[at - 1], self.rows[at]
        share = (rows - low) / (high - low)
        per_weight = self.seconds_per_weight[at - 1] * (1 - share) + self.seconds_per_weight[at] * share
        return per_weight * weights


def measure_compute(
    kernels: Kernels, scheme: GroupScheme | None, in_features: int, dtype: torch.dtype, counts: Sequence[int] = _ROWS
) -> ComputeRate:
    """Time `kernels.linear` for each number of rows in `counts`."""
    bits = dtype.itemsize * 8 if scheme is None else scheme.bits
    out = max(64, _NBYTES * 8 // bits // in_features)
    weight = _random_weight(scheme, out, in_features, dtype)
    seconds = []
    for rows in counts:
        x = torch.ones(rows, in_features, dtype=dtype)
        kernels.linear(x, weight, None)
        runs, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < _SECONDS or not runs:
            kernels.linear(x, weight, None)
            runs += 1
        seconds.append(elapsed / max(runs, 1) / (out * in_features))
    return ComputeRate(tuple(counts), tuple(seconds))


def _random_weight(
    scheme: GroupScheme | None, out: int, in_features: int, dtype: torch.dtype
) -> torch.Tensor | QuantizedWeight:
    """Weights of no meaning that compute as fast as any."""
    if scheme is None:
        return torch.full((out, in_features), 0.01, dtype=dtype)
    groups = in_features // scheme.group_size
    codes = QuantizedTensor(
        torch.full((out, in_features * scheme.bits // 8), 0x77, dtype=torch.uint8),
        torch.full((out, groups), 0.01, dtype=torch.float16),
        torch.full((out, groups), 7, dtype=torch.uint8),
    )
    return QuantizedWeight(codes, scheme)
