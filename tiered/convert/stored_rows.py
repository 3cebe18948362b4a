"""Rows of a checkpoint as the store holds them: with the codes that they have, quantized anew, or plain.

In: panels of rows, and what the recipe wants of them. Out: codes, scales and zeros, or plain weights; and what that
changed of weights that had been quantized. `checkpoint.py` has the threads that read a panel call it.
"""

import math
from typing import Final, Literal

import torch

from tiered.convert.blocks import TensorRecipe
from tiered.convert.taken import Taken, Tally
from tiered.convert.workers import Quantizers
from tiered.errors import CheckpointError
from tiered.kernels import CodedRows, room_in
from tiered.quant import QuantizedTensor, dequantize, folded
from tiered.quant.codebook import widened_scales

_SAMPLE_NUMEL: Final = 1 << 14
"""Weights of each panel that are compared with what they were, where they had been quantized before."""
_GREATEST: Final = torch.finfo(torch.bfloat16).max


class StoredRows:
    """Makes rows of the checkpoint `name` what the store holds, in any thread; `close` gives its kernels back."""

    def __init__(self, name: str, clip: Literal["mse", "minmax"]) -> None:
        self._name, self._clip = name, clip
        self._quantizers, self._tally = Quantizers(), Tally()

    @property
    def taken(self) -> tuple[Taken, ...]:
        """What became of weights that the checkpoint holds quantized."""
        return tuple(self._tally.taken())

    def close(self) -> None:
        """Give the kernels back; the next rows take others."""
        self._quantizers.close()

    def rounded(
        self, panel: torch.Tensor, room: torch.Tensor, tensor: TensorRecipe, method: str, dtype: torch.dtype
    ) -> torch.Tensor:
        """Rows of `tensor`, which the checkpoint quantizes and the store does not."""
        rounded = room_in(room, panel.shape, dtype).copy_(checked(panel, tensor.name))
        self._tally.add_changed(tensor.name, method, str(dtype).removeprefix("torch."), panel, rounded)
        return rounded

    def taken_over(self, panel: QuantizedTensor, tensor: TensorRecipe, method: str) -> QuantizedTensor:
        """Rows of `tensor` as the checkpoint quantizes them, with scales of the store's dtype."""
        scheme = tensor.scheme
        assert scheme is not None
        made = panel._replace(scale=panel.scale.to(scheme.scale_dtype))
        after = widened_scales(made.scale)
        before = after if panel.scale.dtype == made.scale.dtype else widened_scales(panel.scale)
        if not all(math.isfinite(float(end)) for end in after.aminmax()):  # both NaN where one is
            raise CheckpointError(
                f"{self._name}: {tensor.name}: expected finite scales that fit {scheme.scale_dtype}, found "
                f"one of {float(before.abs().max()):,.4g}; check the source checkpoint"
            )
        if before is after or torch.equal(before, after):
            self._tally.add(tensor.name, method, scheme.name)
        else:
            # Of each group all values change by the same share.
            rows = _sampled(len(made.q), folded(tensor.shape)[1])
            ones = torch.ones_like(made.scale[rows])
            numbers = dequantize(made.q[rows].contiguous(), ones, made.zero[rows].contiguous(), scheme)
            groups = numbers.view(*ones.shape, -1)
            form = f"{scheme.name}, scales rounded"
            values = (groups * each[rows].unsqueeze(-1) for each in (before, after))
            self._tally.add_changed(tensor.name, method, form, *values)
        return made

    def quantized(
        self, panel: torch.Tensor | CodedRows, room: torch.Tensor, tensor: TensorRecipe, method: str | None
    ) -> QuantizedTensor:
        """Rows of `tensor` quantized here; the checkpoint quantizes them by `method`, or not at all."""
        scheme, name = tensor.scheme, f"{self._name}: {tensor.name}"
        assert scheme is not None
        made = self._quantizers.quantize(panel, scheme, self._clip, name, room)
        if method is not None:
            rows = _sampled(len(made.q), panel.shape[1])
            after = dequantize(*QuantizedTensor(*(part[rows].contiguous() for part in made)), scheme)
            before = panel.rows(rows).numbers() if isinstance(panel, CodedRows) else panel[rows]
            self._tally.add_changed(tensor.name, method, scheme.name, before, after)
        return made


def checked(panel: torch.Tensor, name: str) -> torch.Tensor:
    """`panel`; raises CheckpointError where one of its values is NaN, infinite or beyond what bfloat16 holds.

    This is for tensors that are not quantized; the quantizer tests the others.
    """
    low, high = (float(end) for end in panel.aminmax()) if panel.numel() else (0.0, 0.0)  # both NaN where a value is
    if max(abs(low), abs(high)) <= _GREATEST:
        return panel
    bad = int((~(panel.abs() <= _GREATEST)).sum())
    raise CheckpointError(
        f"{name}: expected finite weights, found {bad:,} among {panel.numel():,} that are NaN, infinite or beyond "
        "what bfloat16 holds; check the source checkpoint"
    )


def _sampled(rows: int, width: int) -> slice:
    """Some of so many rows of `width` weights, from all over them: _SAMPLE_NUMEL weights, but one row at least."""
    return slice(None, None, -(-rows // max(1, _SAMPLE_NUMEL // width)) or 1)
