"""What a store holds, in figures: pure functions of its manifest and headers, for `tiered inspect` and reports.

In: an opened store. Out: one row per kind of block, and totals. No weight is read.
"""

import itertools
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from tiered.store.format import DTYPE_NAMES
from tiered.store.manifest import BlockInfo, Weight
from tiered.store.open import Store


@dataclass(frozen=True)
class BlockRow:
    """Consecutive blocks that are alike in role, weights and formats."""

    first: str
    last: str
    role: str
    count: int
    nbytes: int
    """Bytes of all these blocks' files together."""
    smallest_nbytes: int
    largest_nbytes: int
    """Bytes of the largest file: compressed blocks differ a little."""
    weights: int
    """How many weights one block holds."""
    formats: tuple[tuple[str, int], ...]
    """Each format and how many of those weights have it, most first: ("int4-g64", 7077888), ("F16", 12288)."""
    units: int
    """How many units one block has at most."""
    largest_unit_nbytes: int
    experts: int = 0
    """How many experts one block has that are units of their own."""
    expert_nbytes: int = 0
    """Bytes of the largest of them."""
    shared: bool = False
    """The block reads another block's file: a tied head."""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.weights * self.count)

    def to_json(self) -> dict[str, Any]:
        return {
            "first": self.first,
            "last": self.last,
            "role": self.role,
            "count": self.count,
            "nbytes": self.nbytes,
            "smallest_nbytes": self.smallest_nbytes,
            "largest_nbytes": self.largest_nbytes,
            "weights_each": self.weights,
            "bits_per_weight": self.bits_per_weight,
            "formats": dict(self.formats),
            "shares_file": self.shared,
            "experts": self.experts,
            "expert_nbytes": self.expert_nbytes,
        }


@dataclass(frozen=True)
class StoreSummary:
    """A store at a glance."""

    rows: tuple[BlockRow, ...]
    parameters: int
    """How many weights the model has: a repeated synthetic layer counts every time, a tied head not again."""
    model_nbytes: int
    """Bytes of all blocks, counted like `parameters`."""
    disk_nbytes: int
    """Bytes of the block files, each counted once."""
    tape_nbytes: int
    """S: what one pass streams when nothing is resident."""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.model_nbytes / self.parameters


def summarize(store: Store) -> StoreSummary:
    """The figures of `store`."""
    singles = [_single(store, block) for block in store.manifest.blocks]
    own = [row for row in singles if not row.shared]
    return StoreSummary(
        rows=tuple(_fold(list(group)) for _, group in itertools.groupby(singles, key=_likeness)),
        parameters=sum(row.weights for row in own),
        model_nbytes=sum(row.nbytes for row in own),
        disk_nbytes=sum(file.nbytes for file in store.manifest.files),
        tape_nbytes=store.tape_nbytes,
    )


def format_of(weight: Weight) -> str:
    """How a weight is stored: its scheme's name, or its dtype as safetensors spells it."""
    if weight.scheme is not None:
        return weight.scheme.name
    return DTYPE_NAMES[next(iter(weight.parts.values())).dtype]  # of whichever range comes first


def _single(store: Store, block: BlockInfo) -> BlockRow:
    layout = store.layout(block)
    formats: Counter[str] = Counter()
    compressed = {item.target.name for item in layout.compressed}
    for weight in layout.weights.values():
        name = format_of(weight)
        if any(entry.name in compressed for entry in weight.parts.values()):
            name += "+planes"
        formats[name] += _numel(weight)
    # Repeated synthetic layers are blocks of their own; only a tied head is the same weights once more.
    shared = block.role == "head" and store.manifest.tied
    size, weights = block.file.nbytes, layout.weight_count
    experts = [unit.nbytes for unit in layout.units if unit.kind == "expert"]
    return BlockRow(
        first=block.name,
        last=block.name,
        role=block.role,
        count=1,
        nbytes=size,
        smallest_nbytes=size,
        largest_nbytes=size,
        weights=weights,
        formats=tuple(formats.most_common()),
        units=len(layout.units),
        largest_unit_nbytes=max((unit.nbytes for unit in layout.units), default=0),
        experts=len(experts),
        expert_nbytes=max(experts, default=0),
        shared=shared,
    )


def _numel(weight: Weight) -> int:
    count = 1
    for n in weight.shape:
        count *= n
    return count


def _likeness(row: BlockRow) -> tuple[object, ...]:
    return row.role, row.weights, row.formats, row.experts, row.shared


def _fold(rows: list[BlockRow]) -> BlockRow:
    return replace(
        rows[0],
        last=rows[-1].last,
        count=len(rows),
        nbytes=sum(row.nbytes for row in rows),
        smallest_nbytes=min(row.nbytes for row in rows),
        largest_nbytes=max(row.nbytes for row in rows),
        units=max(row.units for row in rows),
        largest_unit_nbytes=max(row.largest_unit_nbytes for row in rows),
        expert_nbytes=max(row.expert_nbytes for row in rows),
    )
