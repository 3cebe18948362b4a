"""Reads the tensors of a GGUF model: as numbers, or as the codes that a store holds as they are.

In: each tensor of the model, and where in which file it lies. Out: panels of its rows. Numbers come from the package
gguf, codes are the file's own bytes put in the store's order: of a block of 32 values

    Q4_0    d, 16 bytes of nibbles        d * (q - 8)        the very bytes of int4-g32
    Q5_0    d, 32 bits, 16 nibbles        d * (q - 16)       int8-g32
    Q8_0    d, 32 signed bytes            d * q              int8-g32, with 128 added to code and zero
    IQ4_NL  d, 16 bytes of nibbles        d * values[q]      iq4nl-g32
    MXFP4   exponent, 16 bytes            2**(e - 127) * q   mxfp4-g32
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch

from tiered.convert.gather import Gatherer
from tiered.convert.gguf_file import GgufTensor, gguf_package
from tiered.convert.panels import Panels, rooms_nbytes
from tiered.convert.source import PANEL_NBYTES, StoredTensor, WeightReader
from tiered.errors import CheckpointError
from tiered.quant import QuantizedTensor, Scheme, folded
from tiered.units import round_up

PLAIN_KINDS: Final = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_KEPT: Final = {
    "Q4_0": "int4-g32",
    "Q5_0": "int8-g32",
    "Q8_0": "int8-g32",
    "IQ4_NL": "iq4nl-g32",
    "MXFP4": "mxfp4-g32",
}
"""The schemes of a store that hold the values of a type exactly."""


class GgufWeight(NamedTuple):
    """A tensor of the model, which is all of a file's tensor, or one matrix of a stack."""

    tensor: GgufTensor
    head_rows: int = 0
    """Rows of an attention head whose halves lie interleaved, as llama.cpp's rotary embedding wants Llama's; 0: as in
    the model."""
    shift: float = 0.0
    """What is added to each value."""

    @property
    def is_plain(self) -> bool:
        return self.tensor.kind in PLAIN_KINDS

    @property
    def rows(self) -> int:
        shape = self.tensor.shape
        return folded(shape)[0] if len(shape) > 1 else shape[0]

    @property
    def stored(self) -> StoredTensor:
        kind, shape, _ = self.tensor
        if self.is_plain:
            return StoredTensor(PLAIN_KINDS[kind], shape)
        scheme = Scheme.parse(_KEPT[kind]) if kind in _KEPT else None
        return StoredTensor(torch.float32, shape, f"GGUF {kind}", scheme)


class GgufReader(WeightReader):
    """A `WeightReader` of one model, whose tensors may be spread over several files: a path says nothing of them."""

    def __init__(self, weights: Mapping[str, GgufWeight]) -> None:
        self._weights, self._gatherer = weights, Gatherer()
        self._stored = {name: weight.stored for name, weight in weights.items()}

    def tensors(self, path: Path) -> Mapping[str, StoredTensor]:
        return self._stored

    def panels(self, path: Path, name: str, rows: range | None = None) -> Panels[torch.Tensor]:
        weight, stored = self._weights[name], self._stored[name]
        # Of numbers, which are larger than what they are read from.
        read = self._read(weight, rows, stored.nbytes // weight.rows)
        return read.then(lambda raw, _: _numbers(weight, stored, raw))

    def packed(self, path: Path, name: str, rows: range | None = None) -> Panels[QuantizedTensor]:
        weight = self._weights[name]
        read = self._read(weight, rows, _row_nbytes(weight))
        return read.then(lambda raw, _: _codes(weight.tensor.kind, raw, name))

    def known(self, path: Path) -> Mapping[str, StoredTensor]:
        return self._stored

    def working_nbytes(self, path: Path) -> int:
        return max((_working_nbytes(weight, self._stored[name]) for name, weight in self._weights.items()), default=0)

    def close(self) -> None:
        self._gatherer.close()

    def _read(self, weight: GgufWeight, rows: range | None, panel_row_nbytes: int) -> Panels[torch.Tensor]:
        """u8 [rows, bytes of a row] in the model's order, for panels of rows of `panel_row_nbytes`."""
        rows = range(weight.rows) if rows is None else rows
        unit, row_nbytes = weight.head_rows or 1, _row_nbytes(weight)
        step = max(1, PANEL_NBYTES // (panel_row_nbytes * unit)) * unit
        starts = range(rows.start // unit * unit, rows.stop, step)

        def make(number: int, room: torch.Tensor) -> torch.Tensor:
            start = starts[number]
            inside = range(start, min(start + step, -(-rows.stop // unit) * unit))
            panel = self._gatherer.rectangle(weight.tensor.extent, row_nbytes, inside, range(row_nbytes), room)
            if unit > 1:
                panel = panel.view(-1, unit // 2, 2, row_nbytes).transpose(1, 2).reshape(-1, row_nbytes)
            return panel[max(rows.start - start, 0) : rows.stop - start]

        return Panels(len(starts), make, min(step, round_up(len(rows) + unit, unit)) * row_nbytes)


def _numbers(weight: GgufWeight, stored: StoredTensor, raw: torch.Tensor) -> torch.Tensor:
    """The values of rows of bytes."""
    values = raw.view(stored.dtype) if weight.is_plain else _dequantized(weight.tensor.kind, raw)
    if weight.shift:
        values = (values.to(torch.float32) + weight.shift).to(stored.dtype)
    return values if len(stored.shape) > 1 else values.flatten()


def _dequantized(kind: str, raw: torch.Tensor) -> torch.Tensor:
    """The values of rows of blocks."""
    gguf = gguf_package()
    return torch.from_numpy(gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind]))


def small_values(weight: GgufWeight) -> list[float]:
    """All values of a small plain tensor; raises CheckpointError where it is large or not plain."""
    if not weight.is_plain or prod(weight.tensor.shape) > 1 << 16:
        raise CheckpointError(
            f"{weight.tensor.extent.path}: expected a few plain numbers, found {weight.tensor.kind} "
            f"{list(weight.tensor.shape)}; convert the original Hugging Face checkpoint"
        )
    reader = GgufReader({"": weight})
    try:
        return [float(value) for panel in reader.panels(weight.tensor.extent.path, "") for value in panel.flatten()]
    finally:
        reader.close()


def _row_nbytes(weight: GgufWeight) -> int:
    return weight.tensor.extent.nbytes // weight.rows


def _working_nbytes(weight: GgufWeight, stored: StoredTensor) -> int:
    """Memory that reading a tensor takes at most: of each panel its bytes, their copy in the model's order, its numbers
    and what gguf makes of them on the way."""
    return rooms_nbytes(2 * min(PANEL_NBYTES, weight.tensor.extent.nbytes) + 2 * min(PANEL_NBYTES, stored.nbytes))


def _codes(kind: str, raw: torch.Tensor, name: str) -> QuantizedTensor:
    """Rows of blocks as a store has them."""
    rows = raw.shape[0]
    scale_nbytes = 1 if kind == "MXFP4" else 2
    block_nbytes = {"Q5_0": 22, "Q8_0": 34}.get(kind, 16 + scale_nbytes)
    # In numpy: torch would wake its own threads for each of these.
    blocks = raw.numpy().reshape(rows, -1, block_nbytes)
    scale = np.ascontiguousarray(blocks[..., :scale_nbytes]).reshape(rows, -1)
    if kind != "MXFP4":
        scale = scale.view(np.float16)
    if not (scale != 255 if kind == "MXFP4" else np.isfinite(scale)).all():
        raise CheckpointError(f"{name}: expected finite scales, found some that are not; check the source checkpoint")
    q = blocks[..., scale_nbytes:]
    if kind == "Q5_0":
        high = np.unpackbits(q[..., :4], axis=-1, bitorder="little")
        high <<= 4
        high[..., :16] |= q[..., 4:] & 15
        high[..., 16:] |= q[..., 4:] >> 4
        q = high
    elif kind == "Q8_0":
        q = q ^ 128
    zero = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}.get(kind)
    zeros = np.full((rows, 0 if zero is None else scale.shape[1]), zero or 0, np.uint8)
    return QuantizedTensor(*(torch.from_numpy(part) for part in (q.reshape(rows, -1), scale, zeros)))
