"""Stores whose blocks are cut into units as a test wants them, made of stores as they are converted.

Their files are beside the store's own. What is tested with them is whatever reads, plans and computes by unit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from tests.store.make import bytes_of, load_unit
from tiered.quant import QuantizedWeight
from tiered.store import BlockInfo, BlockWriter, FileInfo, Store
from tiered.store.block import read_layout

View = torch.Tensor | QuantizedWeight


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
        views: dict[str, View] = {}
        for unit in store.layout(block).units:
            memory = load_unit(store.path, unit)
            views |= {name.removeprefix(block.prefix): weight.view(memory) for name, weight in unit.weights.items()}
        # A tied head gets a file of its own, as the embedding stays as it is.
        file = _write(store.path, folder / f"{block.name}.safetensors", block, cut(block, list(views)), views)
        layouts[file.path] = read_layout(store.path, file)
        for name, info in blocks.items():
            if info.file == block.file and info.role == block.role:
                blocks[name] = replace(info, file=file)
    return replace(store, layouts=layouts, manifest=replace(store.manifest, blocks=tuple(blocks.values())))


def _write(root: Path, path: Path, block: BlockInfo, groups: Sequence[Group], views: Mapping[str, View]) -> FileInfo:
    ranges: dict[str, list[Rows]] = {}
    for group in groups:
        for member in group.members:
            if isinstance(member, Rows):
                ranges.setdefault(member.name, []).append(member)
    # Room for any names that the views' own and their ranges' may have.
    names = [block.prefix + name for name in views] + [
        f"{block.prefix}{r.name}#{r.start}" for g in ranges.values() for r in g
    ]
    with BlockWriter(path, root, names) as writer:
        for number, group in enumerate(groups):
            writer.start_unit(f"unit-{number}", group.kind)
            for member in group.members:
                if isinstance(member, Rows):
                    rows = ranges[member.name]
                    whole = views[member.name]
                    if isinstance(whole, torch.Tensor) and whole.dim() == 1:
                        whole = whole[:, None]  # only matrices have rows
                    _add(writer, f"{block.prefix}{member.name}#{rows.index(member)}", _rows(whole, member))
                    scheme = whole.scheme if isinstance(whole, QuantizedWeight) else None
                    writer.add_weight(block.prefix + member.name, whole.shape, scheme, len(rows))
                else:
                    _add(writer, block.prefix + member, views[member])
                    if isinstance(view := views[member], QuantizedWeight):
                        writer.add_weight(block.prefix + member, view.shape, view.scheme)
        return writer.finish()


def _add(writer: BlockWriter, name: str, view: View) -> None:
    parts = {"": view} if isinstance(view, torch.Tensor) else {f".{k}": v for k, v in view.codes._asdict().items()}
    for part, tensor in parts.items():
        writer.add(name + part, tensor.dtype, tensor.shape, [bytes_of(tensor)])


def _rows(view: View, rows: Rows) -> View:
    return view.part(rows.start, rows.stop) if isinstance(view, QuantizedWeight) else view[rows.start : rows.stop]
