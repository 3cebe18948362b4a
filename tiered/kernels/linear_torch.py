"""Linear layers of a device in plain torch: panels of widened weights times tiles of rows.

In: activations, and a weight as it lies in a device's slot. Out: products, written tile by tile. What is widened goes
through one buffer, in panels of rows, so scratch is bounded whatever the layer's size; a panel's end is a place to
stop. Called by `device_kernels.py`, on any device, the processor included.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional

from tiered.kernels.cancel import CancelFlag
from tiered.quant import CodebookScheme, QuantizedWeight, dequantize

Weight = torch.Tensor | QuantizedWeight
Widen = Callable[[QuantizedWeight, torch.Tensor], None]
"""Fills a tensor [rows, in] with what a weight of as many rows stands for."""

_MOST_PANEL_ROWS: Final = 8192
_LEAST_MAGNITUDE: Final = 1e-30
"""A group of activations below it counts as zero: 127 divided by it must be finite."""


@dataclass(frozen=True)
class Sizes:
    """How much a device computes at a time."""

    panel_nbytes: int
    """Of a weight, widened."""
    tile_nbytes: int
    """Of activations, and of products, of a tile of rows; also of codes that are unpacked."""
    fixed_rows: int
    """Rows of a tile of fixed shape, at most."""

    @property
    def kept_nbytes(self) -> int:
        """Of the scratch memory that `linear_in_tiles` is given: a panel, and a tile of activations."""
        return self.panel_nbytes + self.tile_nbytes

    @property
    def passing_nbytes(self) -> int:
        """An upper bound on what it allocates besides: a tile's products, and codes that are unpacked."""
        return 2 * self.tile_nbytes

    def panel_rows(self, in_features: int, itemsize: int) -> int:
        """Rows of a weight in a panel."""
        return min(_MOST_PANEL_ROWS, max(1, self.panel_nbytes // (in_features * itemsize)))

    def tile_rows(self, in_features: int, itemsize: int, *, fixed: bool) -> int:
        """Rows of activations in a tile. A tile of fixed shape depends on the layer alone."""
        panel = self.panel_rows(in_features, itemsize)
        if not fixed:
            return max(1, self.tile_nbytes // (panel * itemsize))
        return max(1, min(self.fixed_rows, self.tile_nbytes // (max(in_features, panel) * itemsize)))


DEVICE_SIZES: Final = Sizes(panel_nbytes=32 << 20, tile_nbytes=8 << 20, fixed_rows=256)
"""Large enough that a panel keeps a device busy. 256 rows cost no more than reading the panel does, on tensor cores."""
HOST_SIZES: Final = Sizes(panel_nbytes=4 << 20, tile_nbytes=4 << 20, fixed_rows=16)
"""Of a device that is emulated by the processor: a panel stays in its caches."""


def linear_in_tiles(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    sizes: Sizes,
    scratch: torch.Tensor,
    widen: Widen,
    *,
    fixed: bool,
    cancel: CancelFlag,
) -> None:
    """Write x [rows, in] times weight [out, in] transposed, plus bias [out], to y [rows, out]; x and y of one dtype.

    `scratch` is uint8 of `sizes.kept_nbytes`. With `fixed` every row is computed by a product of
    one shape, from the same place in memory, whatever the number of rows. Raises InterruptedRun once `cancel` is set.
    """
    out, in_ = weight.shape
    rows = sizes.tile_rows(in_, x.element_size(), fixed=fixed)
    padded = None
    if fixed:
        end = sizes.panel_nbytes + rows * in_ * x.element_size()
        padded = scratch[sizes.panel_nbytes : end].view(x.dtype).view(rows, in_)
    for start, stop in _steps(out, sizes.panel_rows(in_, x.element_size())):
        cancel.check()
        panel = _panel(weight, start, stop, x.dtype, scratch, widen)
        part = None if bias is None else bias[start:stop]
        for first, last in _steps(len(x), rows):
            tile = x[first:last]
            if padded is not None:
                padded[: last - first] = tile
                padded[last - first :] = 0
                tile = padded
            y[first:last, start:stop] = functional.linear(tile, panel, part)[: last - first]


def widen_in_torch(weight: QuantizedWeight, out: torch.Tensor) -> None:
    """Fill `out` with what `weight.rows` returns, bit for bit; no temporaries but codes, or a few MiB of what is looked
    up in a codebook."""
    q, scale, zero = weight.codes
    if isinstance(weight.scheme, CodebookScheme):
        dequantize(q, scale, zero, weight.scheme, out=out)
        return
    groups = out.unflatten(1, (-1, weight.scheme.group_size))
    if weight.scheme.bits == 8:
        groups.copy_(q.view_as(groups))
    else:
        codes, half = q.unflatten(1, (groups.shape[1], -1)), weight.scheme.group_size // 2
        groups[..., :half] = codes & 15
        groups[..., half:] = codes >> 4
    # Differences of codes are exact in 16 bits too, and a product is computed in float32 and rounded once.
    groups.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1))


def round_activations(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of x [rows, in], and their scales, float32 [rows, in / group]; as in the processor's `fast` mode.

    Each group is rounded to 127 steps on either side of 0, of the size of its largest magnitude / 127.
    """
    groups = x.float().unflatten(1, (-1, group))
    most = groups.abs().amax(-1, keepdim=True)
    is_zero = most < _LEAST_MAGNITUDE
    codes = (groups * (127.0 / most).masked_fill_(is_zero, 0)).round_()
    return codes.to(torch.int8).flatten(1), (most / 127.0).masked_fill_(is_zero, 0).squeeze(-1)


def _panel(
    weight: Weight, start: int, stop: int, dtype: torch.dtype, scratch: torch.Tensor, widen: Widen
) -> torch.Tensor:
    """Rows start..stop of the weight as `dtype`: where they lie, or else at the beginning of `scratch`."""
    if isinstance(weight, torch.Tensor) and weight.dtype == dtype:
        return weight[start:stop]
    shape = stop - start, weight.shape[1]
    panel = scratch[: shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)
    if isinstance(weight, torch.Tensor):
        panel.copy_(weight[start:stop])
    else:
        widen(weight.part(start, stop), panel)
    return panel


def _steps(total: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, step):
        yield start, min(start + step, total)
