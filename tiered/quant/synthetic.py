"""Weights of a realistic distribution at the speed of a copy, to benchmark models that are not on this disk.

A pool of random groups is quantized once; every tensor is then served as views into the pool, from offsets
drawn from (seed, tensor name). A writer that wants a store of OPT-175B calls, for each linear weight,
`q_pieces`, `scale_pieces` and `zero_pieces`, and for each 16-bit tensor `normal_pieces`.

What is realistic: the distribution of codes, scales and zeros (hence compressibility, and the numeric range
of what kernels compute), and the standard deviation of each dequantized weight. What is not: **the pool
repeats**. A tensor longer than one run meets the same groups again, tensors share groups with one another (so
never measure deduplication or compression across pieces), and no structure of a trained model is there: text
generated from such weights means nothing.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tiered.errors import ConfigError
from tiered.quant.codebook import E8M0, widened_scales
from tiered.quant.quantize import quantize
from tiered.quant.schemes import Scheme
from tiered.units import MIB

PIECE_NBYTES: Final = 8 * MIB  # no piece is larger; also the length of one run through the pool
POOL_NBYTES: Final = 32 * MIB

_MAKING_GROUPS: Final = 1 << 14  # quantized at a time while the pool is made
_NORMAL_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
_GREATEST_FP16: Final = 65504.0


class SyntheticPool:
    """Unit-variance groups of one scheme, and normal values for what is not quantized.

    The three streams of a weight are consistent: they follow the same offsets, so that every group keeps the
    scale and zero it was quantized with. Pieces are read-only views, row-major and at most PIECE_NBYTES each;
    the same (seed, key) gives the same bytes under one version of torch.
    """

    def __init__(self, scheme: Scheme, seed: int = 0, *, nbytes: int = POOL_NBYTES) -> None:
        """Make `nbytes` of packed codes of normally distributed weights."""
        groups = nbytes // scheme.group_q_nbytes
        if groups < 1:
            raise ConfigError(f"synthetic pool of {nbytes} bytes: expected at least {scheme.group_q_nbytes}")
        self.scheme = scheme
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self._q = np.empty((groups, scheme.group_q_nbytes), np.uint8)
        self._scale = np.empty(groups, np.float32)  # of unit-variance weights; cast once scaled
        self._zero = np.empty(groups if scheme.has_zero else 0, np.uint8)
        # Plain values, as many bytes as the codes take.
        normal = torch.empty(groups, scheme.group_q_nbytes // 4, dtype=torch.float32)
        for start in range(0, groups, _MAKING_GROUPS):
            part = slice(start, min(start + _MAKING_GROUPS, groups))
            values = torch.randn(part.stop - start, scheme.group_size, generator=generator, dtype=torch.float32)
            q, scale, zero = quantize(values, scheme)
            self._q[part] = q.numpy()
            self._scale[part] = widened_scales(scale)[:, 0].numpy()
            if self.scheme.has_zero:
                self._zero[part] = zero[:, 0].numpy()
            normal[part] = values[:, : normal.shape[1]]
        self._normal = normal.flatten()
        self._last: tuple[tuple[float, float, torch.dtype], NDArray[np.uint8]] | None = None
        """What `_converted` has made last, and of what."""
        self._run_groups = max(1, min(PIECE_NBYTES // scheme.group_q_nbytes, groups // 2))

    def q_pieces(self, rows: range, in_features: int, key: str) -> Iterator[memoryview]:
        """The bytes of NAME.q of these rows of a weight [out, in] called `key`."""
        for run in self._runs(rows, in_features, key):
            yield _view(self._q[run])

    def scale_pieces(self, rows: range, in_features: int, key: str, std: float) -> Iterator[memoryview]:
        """The bytes of NAME.scale, such that the dequantized weight's standard deviation is `std`; of scales that are
        exponents, the power of two that is nearest to it."""
        largest = float(np.abs(self._scale).max()) * std
        if not 0 < largest <= _GREATEST_FP16:
            raise ConfigError(f"{key}: standard deviation {std!r}: expected more than 0 and scales within fp16")
        dtype = self.scheme.scale_dtype
        for run in self._runs(rows, in_features, key):
            if dtype == E8M0:
                exponents = np.frexp(self._scale[run])[1] + (126 + round(math.log2(std)))
                yield _view(np.clip(exponents, 0, 254).astype(np.uint8))
            else:
                made = self._scale[run] * np.float32(std)
                yield _view(made.astype(np.float16) if dtype == torch.float16 else made)

    def zero_pieces(self, rows: range, in_features: int, key: str) -> Iterator[memoryview]:
        """The bytes of NAME.zero, if the scheme has zeros."""
        if not self.scheme.has_zero:
            return
        for run in self._runs(rows, in_features, key):
            yield _view(self._zero[run])

    def normal_pieces(
        self,
        numel: int,
        dtype: torch.dtype,
        std: float,
        key: str,
        *,
        mean: float = 0.0,
        part: range | None = None,
    ) -> Iterator[memoryview]:
        """The bytes of `numel` values of a 16- or 32-bit tensor, or of the `part` of them; `mean` is for the weights of
        norms."""
        if dtype not in _NORMAL_DTYPES:
            raise ConfigError(f"{key}: synthetic dtype {dtype}: expected bfloat16, float16 or float32")
        run_numel = min(PIECE_NBYTES // dtype.itemsize, self._normal.numel() // 2)
        # A tensor longer than one run converts the whole pool once and then only serves views of it.
        base, values = 0, self._normal
        if numel <= run_numel:
            base = self._offset(key, 0, self._normal.numel() - run_numel)
            values = self._normal[base : base + numel]
        served = self._converted(std, mean, dtype) if numel > run_numel else _converted(values, std, mean, dtype)
        part = part or range(numel)
        for index in range(part.start // run_numel, -(-part.stop // run_numel)):
            start = index * run_numel
            offset = self._offset(key, index, self._normal.numel() - run_numel) - base
            first, last = offset + max(part.start - start, 0), offset + min(part.stop - start, run_numel)
            yield _view(served[first * dtype.itemsize : last * dtype.itemsize])

    def _converted(self, std: float, mean: float, dtype: torch.dtype) -> NDArray[np.uint8]:
        """All plain values, which are wanted again and again where a tensor is written in ranges of its rows."""
        wanted = (std, mean, dtype)
        if self._last is None or self._last[0] != wanted:
            self._last = wanted, _converted(self._normal, std, mean, dtype)
        return self._last[1]

    def _runs(self, rows: range, in_features: int, key: str) -> Iterator[slice]:
        """The pool's groups that make up these rows of the weight, in row-major order."""
        _, groups_per_row = self.scheme.scale_shape(1, in_features)
        first, last = rows.start * groups_per_row, rows.stop * groups_per_row
        for index in range(first // self._run_groups, -(-last // self._run_groups)):
            start = index * self._run_groups
            offset = self._offset(key, index, len(self._q) - self._run_groups)
            yield slice(offset + max(first - start, 0), offset + min(last - start, self._run_groups))

    def _offset(self, key: str, index: int, last: int) -> int:
        """Where run `index` of tensor `key` starts: 0 to `last`, the same on every machine."""
        digest = hashlib.blake2b(f"{self.seed}/{index}/{key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % (last + 1)


def _converted(values: Tensor, std: float, mean: float, dtype: torch.dtype) -> NDArray[np.uint8]:
    """The bytes of `values` with this standard deviation and mean."""
    return (values * std).add_(mean).to(dtype).view(torch.uint8).numpy()  # numpy has no bfloat16


def _view(array: NDArray[np.generic]) -> memoryview:
    """The contiguous array's bytes, read-only: pieces share the pool."""
    return array.view(np.uint8).data.toreadonly().cast("B")
