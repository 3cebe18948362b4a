"""Weights that a checkpoint holds as [in, out], or [experts, in, out], read as the [out, in] that a store has.

In: a reader of the checkpoint's files, and a tensor's name. Out: panels of rows. Each of a tensor's matrices is read
whole, as every row that is wanted has one number of each row that is there; so one matrix is in memory.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from tiered.convert.source import WeightReader, panel_rows
from tiered.convert.workers import one_torch_thread
from tiered.quant import folded


def turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a matrix, or of a stack of matrices, with each of them transposed."""
    *stack, rows, columns = shape
    return *stack, columns, rows


def transposed_panels(reader: WeightReader, path: Path, name: str, rows: range | None = None) -> Iterator[torch.Tensor]:
    """The tensor `name` of `path` with its matrices transposed, or these of its rows, as `WeightReader.panels` says.

    When this returns, the first panel is being read if the reader reads ahead.
    """
    stored = reader.tensors(path)[name]
    *_, height, width = stored.shape
    count = folded(stored.shape)[0] // height if height else 0
    rows = range(count * width) if rows is None else rows
    numbers = range(rows.start // width, -(-rows.stop // width)) if rows else range(0)

    def begin(number: int) -> Iterator[torch.Tensor]:
        return reader.panels(path, name, range(number * height, (number + 1) * height))

    following = begin(numbers.start) if numbers else None

    def deliver(panels: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        for number in numbers:
            start, stop = (min(max(row - number * width, 0), width) for row in (rows.start, rows.stop))
            matrix, done = torch.empty(stop - start, height, dtype=stored.dtype), 0
            for panel in panels:
                with one_torch_thread():
                    # Turned before it is put in its place, which is twice as fast as both at once.
                    matrix[:, done : done + len(panel)] = panel[:, start:stop].T.contiguous()
                done += len(panel)
            if number + 1 in numbers:
                panels = begin(number + 1)
            yield from matrix.split(panel_rows(tuple(matrix.shape), matrix.itemsize)[2])

    return iter(()) if following is None else deliver(following)
