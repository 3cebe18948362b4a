"""Stores whose blocks have several units, made of stores of one unit per block.

A unit is an extent of some file: here each has a file of its own beside the store's. What is tested with them is
whatever reads, plans and computes by unit.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from tests.store.make import write_block
from tiered.quant import GroupScheme, QuantizedTensor, QuantizedWeight
from tiered.store import BlockInfo, Store, Unit
from tiered.store.block import read_layout


class Rows(NamedTuple):
    """A range of a weight's rows."""

    name: str
    start: int
    stop: int


class Group(NamedTuple):
    """What one unit holds: weights, by name inside the block, or ranges of their rows."""

    kind: Literal["small", "dense"]
    members: Sequence[str | Rows]


Cut = Callable[[BlockInfo, Sequence[str]], Sequence[Group]]
"""Says of a block with these weights what its units are, in the order of use."""


def in_units(store: Store, folder: Path, cut: Cut) -> Store:
    """`store` with the blocks of its tape cut into units, whose files are in `folder`."""
    layouts = dict(store.layouts)
    for block in dict.fromkeys(store.tape):
        layout = replace(store.layout(block))  # a copy, whose units are its own
        memory = torch.frombuffer(bytearray(store.file_path(block).read_bytes()), dtype=torch.uint8)
        assert not layout.compressed
        views = {name.removeprefix(block.prefix): weight.view(memory) for name, weight in layout.weights.items()}
        groups = cut(block, list(views))
        units = [
            _write(store.path, folder / f"{block.name}-{number}.safetensors", block, group, views)
            for number, group in enumerate(groups)
        ]
        layout.__dict__["units"] = tuple(units)
        layouts[block.file.path] = layout
    return replace(store, layouts=layouts)


def _write(
    root: Path, path: Path, block: BlockInfo, group: Group, views: dict[str, torch.Tensor | QuantizedWeight]
) -> Unit:
    plain: dict[str, torch.Tensor] = {}
    quantized: dict[str, tuple[GroupScheme, QuantizedTensor]] = {}
    for member in group.members:
        name, view = (member, views[member]) if isinstance(member, str) else (member.name, _rows(views, member))
        if isinstance(view, QuantizedWeight):
            quantized[block.prefix + name] = view.scheme, view.codes
        else:
            plain[block.prefix + name] = view
    # Files of a store are named from its folder on.
    file = write_block(root, str(path.relative_to(root)), plain, quantized)
    layout = read_layout(root, file)
    number = path.stem.rpartition("-")[2]
    chunks = range(len(file.checksums))
    return Unit(f"unit-{number}", file, 0, file.nbytes, chunks, layout.weights, (), layout.memory_nbytes, group.kind)


def _rows(views: dict[str, torch.Tensor | QuantizedWeight], rows: Rows) -> torch.Tensor | QuantizedWeight:
    view = views[rows.name]
    return view.part(rows.start, rows.stop) if isinstance(view, QuantizedWeight) else view[rows.start : rows.stop]
