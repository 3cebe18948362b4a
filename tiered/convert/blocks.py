"""What a block file will hold: its tensors, their form, and the units they are written in.

Its size in bytes is exact but for what compression saves. Pure: `recipe.py` makes these from shapes and options,
`block.py` writes them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import PurePosixPath
from typing import Final

import torch

from tiered.quant import Scheme, folded
from tiered.store import CHUNK_NBYTES, RowLayout
from tiered.store.block import BlockLayout
from tiered.store.file import Kind
from tiered.store.format import ALIGNMENT, header_room_nbytes, tensor_nbytes
from tiered.store.manifest import RANGE
from tiered.units import MIB, PAGE, round_up

BLOCK_FOLDER: Final = "blocks"
RECORDS_NBYTES: Final = 4 * MIB
"""Records of rows that are put together at a time, beside which their parts are in memory."""
RANGE_NBYTES: Final = 32 * MIB
"""A larger weight is stored in ranges of its rows: two units must fit in memory, or reading and computing take turns,
the first must be there before anything is computed, and what they take weights cannot that would stay. Two chunks keep
a disk as busy as eight (docs/benchmarks/streaming.md)."""
_ROWS: Final = 64
"""Rows of a range are a multiple of this, which kernels like."""


@dataclass(frozen=True)
class TensorRecipe:
    """One tensor of a block: its model name and shape, and how it is stored."""

    name: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    """None keeps the source's dtype."""
    kind: Kind = "dense"
    """Of the unit it goes into."""
    by_row: bool = False
    """Each row is a record of its own (`tiered/store/rows.py`)."""

    def row_layout(self, dtype: torch.dtype) -> RowLayout | None:
        """How its rows lie, where each is a record of its own and the source holds it as `dtype`."""
        if not self.by_row:
            return None
        return RowLayout(self.shape[1], self.scheme, dtype if self.scheme is None else torch.uint8)

    is_transposed: bool = False
    """A checkpoint as transformers saves it has each of its matrices as [in, out]."""

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes in the block file, where the source holds it as `dtype`."""
        if (layout := self.row_layout(dtype)) is not None:
            return round_up(self.shape[0] * layout.nbytes, ALIGNMENT)
        if self.scheme is None:
            return round_up(tensor_nbytes(dtype, self.shape), ALIGNMENT)
        parts = self.scheme.parts(*self.matrix).values()
        return sum(round_up(tensor_nbytes(*part), ALIGNMENT) for part in parts)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, in) of the matrix that is quantized: of a stack [experts, out, in], one expert below the other."""
        return folded(self.shape)

    def ranges(self, dtype: torch.dtype) -> tuple["RangeRecipe", ...]:
        """The ranges of rows that it is stored in: one for each expert of a stack, and of any other tensor as few as
        do not exceed RANGE_NBYTES, or have no more than _ROWS rows. Of one that is stored whole, all of it."""
        rows, _ = self.matrix if len(self.shape) > 1 else (1, 0)
        if self.kind == "expert":
            step = rows // self.shape[0]
        elif self.kind == "dense" and len(self.shape) == 2 and not self.by_row:
            step = self._range_rows(dtype)
        else:
            step = rows
        if step >= rows and self.kind != "expert":
            return (RangeRecipe(self),)
        return tuple(
            RangeRecipe(self, number, start, min(rows, start + step))
            for number, start in enumerate(range(0, rows, step))
        )

    def _range_rows(self, dtype: torch.dtype) -> int:
        """Rows of each range but perhaps the last, all alike as far as that goes."""
        rows, columns = self.shape
        count, step = 0, rows
        while step > _ROWS and replace(self, shape=(step, columns)).nbytes(dtype) > RANGE_NBYTES:
            # Rounding up may take a range beyond what so many of the exact size would not exceed.
            count = max(count + 1, -(-self.nbytes(dtype) // RANGE_NBYTES))
            step = round_up(-(-rows // count), _ROWS)
        return step

    def records(self, dtype: torch.dtype) -> Iterator["RangeRecipe"]:
        """Of a table of records, as many rows at a time as are RECORDS_NBYTES."""
        layout = self.row_layout(dtype)
        assert layout is not None
        step = max(1, RECORDS_NBYTES // layout.nbytes)
        for start in range(0, self.shape[0], step):
            yield RangeRecipe(self, 0, start, min(start + step, self.shape[0]))

    @property
    def stack(self) -> str:
        """The module whose experts it has a matrix of; "" where it is no stack."""
        return self.name.rpartition(".")[0] if self.kind == "expert" else ""

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


DtypeOf = Callable[[TensorRecipe], torch.dtype]
"""The dtype that the source holds a tensor in."""


@dataclass(frozen=True)
class RangeRecipe:
    """Rows `start` to `stop` of a tensor's matrix, stored as NAME#number; with `number` None all of it, as NAME."""

    whole: TensorRecipe
    number: int | None = None
    start: int = 0
    stop: int = 0

    @property
    def name(self) -> str:
        return self.whole.name if self.number is None else f"{self.whole.name}{RANGE}{self.number}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape if self.number is None else (self.stop - self.start, self.whole.shape[-1])

    @property
    def rows(self) -> range:
        """Numbers of the rows of the whole tensor's matrix."""
        return range(self.start, self.stop) if self.number is not None else range(self.whole.matrix[0])

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes in the block file, where the source holds the tensor as `dtype`."""
        return replace(self.whole, name=self.name, shape=self.shape).nbytes(dtype)


@dataclass(frozen=True)
class UnitRecipe:
    """One unit of a block file: weights, or ranges of their rows, in the order they are written."""

    name: str
    kind: Kind
    ranges: tuple[RangeRecipe, ...]
    nbytes: int
    """Before compression."""


@dataclass(frozen=True)
class BlockRecipe:
    """One block file: the tensors in the order they are written, small ones first."""

    name: str
    role: str
    prefix: str
    tensors: tuple[TensorRecipe, ...]

    def fits(self, layout: BlockLayout, *, has_records: bool = True) -> bool:
        """Whether the file of `layout` holds exactly these tensors, in this form. Where not `has_records`, it is of a
        format version that has rows of tables in no records."""
        found = {name: (w.shape, w.scheme, w.rows is not None) for name, w in layout.weights.items()}
        wanted = {t.name: (t.shape, t.scheme, t.by_row and has_records) for t in self.tensors}
        return found == wanted

    @property
    def path(self) -> str:
        """The file's path, relative to the store."""
        return str(PurePosixPath(BLOCK_FOLDER, f"{self.name}.safetensors"))

    def nbytes(self, dtype_of: DtypeOf) -> int:
        """Bytes of the block file, before what compression saves and what its frames' table adds."""
        units = self.units(dtype_of)
        return header_room_nbytes(self.names(units)) + sum(unit.nbytes for unit in units)

    @staticmethod
    def names(units: Iterable[UnitRecipe]) -> list[str]:
        """What the weights, and ranges of weights, of `units` are called."""
        return [part.name for unit in units for part in unit.ranges]

    def units(self, dtype_of: DtypeOf) -> tuple[UnitRecipe, ...]:
        """The units that the tensors are written in, where the source holds them as `dtype_of` says.

        Neighbours of one kind share a unit of at most CHUNK_NBYTES, so that small models do not fall into crumbs. A
        larger weight has a unit of its own, or one for each range of its rows; an expert has one with all its matrices.
        """
        groups: list[list[RangeRecipe]] = []
        room = 0
        for (kind, _), tensors in groupby(self.tensors, key=lambda tensor: (tensor.kind, tensor.stack)):
            # What is outside layers, embedding and head is never streamed.
            is_cut = self.role != "outer"
            cut = [tensor.ranges(dtype_of(tensor)) if is_cut else (RangeRecipe(tensor),) for tensor in tensors]
            if kind == "expert":
                groups += [list(matrices) for matrices in zip(*cut, strict=True)]
                continue
            for part in chain.from_iterable(cut):
                nbytes = part.nbytes(dtype_of(part.whole))
                is_other = not groups or groups[-1][-1].whole.kind != kind
                if is_other or (kind == "dense" and nbytes > room):
                    groups.append([])
                    room = CHUNK_NBYTES
                groups[-1].append(part)
                room -= nbytes
        return tuple(self._unit(group, sum(p.nbytes(dtype_of(p.whole)) for p in group)) for group in groups)

    def _unit(self, ranges: list[RangeRecipe], nbytes: int) -> UnitRecipe:
        """Dense units are called by their first weight and how many others follow: "self_attn.q_proj+6"; an expert by
        its module: "mlp.experts#5"."""
        first, kind = ranges[0], ranges[0].whole.kind
        name = first.whole.name.removesuffix(".weight").removeprefix(self.prefix)
        if kind == "expert":
            name = name.rpartition(".")[0]
        if first.number is not None:
            name += f"{RANGE}{first.number}"
        if kind == "dense" and len(ranges) > 1:
            name += f"+{len(ranges) - 1}"
        return UnitRecipe("small" if kind == "small" else name, kind, tuple(ranges), round_up(nbytes, PAGE))
