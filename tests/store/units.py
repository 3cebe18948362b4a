"""Stores whose blocks are cut into units as a test wants them, made of stores as they are converted.

A unit is an extent of some file: here each has a file of its own beside the store's. What is tested with them is
whatever reads, plans and computes by unit.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from tests.store.make import load_unit, write_block
from tiered.quant import GroupScheme, QuantizedTensor, QuantizedWeight
from tiered.store import BlockInfo, Store, Unit
from tiered.store.block import BlockLayout, read_layout


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
    layouts, blocks = dict(store.layouts), dict(store.blocks)
    for block in dict.fromkeys(store.tape):
        views: dict[str, torch.Tensor | QuantizedWeight] = {}
        for unit in store.layout(block).units:
            memory = load_unit(store.path, unit)
            views |= {name.removeprefix(block.prefix): weight.view(memory) for name, weight in unit.weights.items()}
        groups = cut(block, list(views))
        units = [
            _write(store.path, folder / f"{block.name}-{number}.safetensors", block, group, views)
            for number, group in enumerate(groups)
        ]
        # A tied head gets a file of its own, as the embedding stays as it is.
        file = replace(block.file, path=f"{folder.name}/{block.name}")
        layouts[file.path] = BlockLayout(file, tuple(units))
        for name, info in blocks.items():
            if info.file == block.file and info.role == block.role:
                blocks[name] = replace(info, file=file)
    return replace(store, layouts=layouts, manifest=replace(store.manifest, blocks=tuple(blocks.values())))


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
    (unit,) = read_layout(root, file).units
    return replace(unit, name=f"unit-{path.stem.rpartition('-')[2]}", kind=group.kind)


def _rows(views: dict[str, torch.Tensor | QuantizedWeight], rows: Rows) -> torch.Tensor | QuantizedWeight:
    view = views[rows.name]
    return view.part(rows.start, rows.stop) if isinstance(view, QuantizedWeight) else view[rows.start : rows.stop]
