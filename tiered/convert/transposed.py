"""Weights that a checkpoint holds as [in, out], or [experts, in, out], read as the [out, in] that a store has.

In: a reader of the checkpoint's files, and a tensor's name. Out: panels of rows, of which each is a strip of columns of
what is there.
"""

from pathlib import Path

import torch

from tiered.convert.panels import Panels
from tiered.convert.source import WeightReader, panel_rows
from tiered.kernels import room_in
from tiered.quant import folded


def turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a matrix, or of a stack of matrices, with each of them transposed."""
    *stack, rows, columns = shape
    return *stack, columns, rows


def transposed_panels(reader: WeightReader, path: Path, name: str, rows: range | None = None) -> Panels[torch.Tensor]:
    """The tensor `name` of `path` with its matrices transposed, or these of its rows, as `WeightReader.panels` says."""
    stored = reader.tensors(path)[name]
    *_, height, width = stored.shape
    count = folded(stored.shape)[0] // height if height else 0
    rows = range(count * width) if rows is None else rows
    step = panel_rows((width, height), stored.dtype.itemsize)[2]
    # None is of two matrices.
    starts = [
        start
        for number in range(count)
        for start in range(max(rows.start, number * width), min(rows.stop, (number + 1) * width), step)
    ]
    nbytes = min(step, width) * height * stored.dtype.itemsize

    def make(index: int, room: torch.Tensor) -> torch.Tensor:
        start = starts[index]
        number, column = divmod(start, width)
        stop = min(rows.stop - start + column, column + step, width)
        matrix = range(number * height, (number + 1) * height)
        strip = reader.rectangle(path, name, matrix, range(column, stop), room[nbytes:])
        return room_in(room, (stop - column, height), stored.dtype).copy_(strip.T)

    return Panels(len(starts), make, 2 * nbytes)
