"""Rows of a checkpoint as the store holds them: with the codes that they have, quantized anew, or plain.

In: panels of rows, in order, and what the recipe wants of them. Out: codes, scales and zeros, or pieces of plain
weights; and what that changed of weights that had been quantized. `checkpoint.py` calls it.
"""

import math
from collections.abc import Iterator
from typing import Final, Literal

import torch

from tiered.convert.blocks import TensorRecipe
from tiered.convert.taken import Taken, Tally
from tiered.convert.workers import Quantizers, one_torch_thread
from tiered.errors import CheckpointError
from tiered.quant import QuantizedTensor, dequantize, folded
from tiered.quant.codebook import widened_scales

_PIECE_NUMEL: Final = 1 << 20
_SAMPLE_NUMEL: Final = 1 << 14
"""Weights of each panel that are compared with what they were, where they had been quantized before."""
_GREATEST: Final = torch.finfo(torch.bfloat16).max


class StoredRows:
    """Makes rows of the checkpoint `name` what the store holds; `close` ends the threads that quantize."""

    def __init__(self, name: str, clip: Literal["mse", "minmax"]) -> None:
        self._name, self._clip = name, clip
        self._quantizers, self._tally = Quantizers(), Tally()

    @property
    def taken(self) -> tuple[Taken, ...]:
        """What became of weights that the checkpoint holds quantized."""
        return tuple(self._tally.taken())

    def close(self) -> None:
        """End the threads; the next rows start them again."""
        self._quantizers.close()

    def plain(
        self, panel: torch.Tensor, tensor: TensorRecipe, dtype: torch.dtype, method: str | None
    ) -> Iterator[torch.Tensor]:
        """The rows of `panel`, which are some of `tensor`, in pieces of `dtype`."""
        # In pieces that are mostly still in the cache when they are copied and hashed.
        for piece in panel.view(-1).split(_PIECE_NUMEL):
            _check_finite(piece, tensor.name)
            kept = piece
            if method is not None:
                with one_torch_thread():
                    kept = piece.to(dtype)
                    self._tally.add_changed(tensor.name, method, str(dtype).removeprefix("torch."), piece, kept)
            yield kept

    def quantized(
        self, panel: torch.Tensor | QuantizedTensor, tensor: TensorRecipe, method: str | None
    ) -> Iterator[QuantizedTensor]:
        """The rows of `panel`, which are some of `tensor`, quantized, in order; `method`: that of the checkpoint."""
        if isinstance(panel, torch.Tensor):
            yield from self._anew(panel, tensor, method)
        else:
            yield self._taken_over(panel, tensor, method)

    def _taken_over(self, panel: QuantizedTensor, tensor: TensorRecipe, method: str | None) -> QuantizedTensor:
        """Rows of `tensor` as the checkpoint quantizes them, with scales of the store's dtype."""
        scheme = tensor.scheme
        assert scheme is not None and method is not None
        with one_torch_thread():
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

    def _anew(self, panel: torch.Tensor, tensor: TensorRecipe, method: str | None) -> Iterator[QuantizedTensor]:
        """Rows of `tensor` quantized here."""
        scheme, done = tensor.scheme, 0
        assert scheme is not None
        for made in self._quantizers.quantize(panel, scheme, self._clip, f"{self._name}: {tensor.name}"):
            if method is not None:
                rows = _sampled(len(made.q), panel.shape[1])
                with one_torch_thread():
                    after = dequantize(*QuantizedTensor(*(part[rows].contiguous() for part in made)), scheme)
                    before = panel[done : done + len(made.q)][rows]
                    self._tally.add_changed(tensor.name, method, scheme.name, before, after)
            done += len(made.q)
            yield made


def _check_finite(values: torch.Tensor, name: str) -> None:
    """Raise CheckpointError where one of `values` is NaN, infinite or beyond what bfloat16 holds.

    This is for tensors that are not quantized; the quantizer tests the others.
    """
    if not values.numel():
        return
    with one_torch_thread():
        low, high = (float(end) for end in values.aminmax())  # both NaN where a value is NaN
    if max(abs(low), abs(high)) <= _GREATEST:
        return
    bad = int((~(values.abs() <= _GREATEST)).sum())
    raise CheckpointError(
        f"{name}: expected finite weights, found {bad:,} among {values.numel():,} that are NaN, infinite or beyond "
        "what bfloat16 holds; check the source checkpoint"
    )


def _sampled(rows: int, width: int) -> slice:
    """Some of so many rows of `width` weights, from all over them: _SAMPLE_NUMEL weights, but one row at least."""
    return slice(None, None, -(-rows // max(1, _SAMPLE_NUMEL // width)) or 1)
