"""What a block file will hold: its tensors, their form, and the units they are written in.

Its size in bytes is exact but for what compression saves. Pure: `recipe.py` makes these from shapes and options,
`block.py` writes them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

import torch

from tiered.quant import GroupScheme, folded
from tiered.store import CHUNK_NBYTES
from tiered.store.block import BlockLayout
from tiered.store.file import Kind
from tiered.store.format import ALIGNMENT, header_room_nbytes, tensor_nbytes
from tiered.units import PAGE, round_up

BLOCK_FOLDER: Final = "blocks"


@dataclass(frozen=True)
class TensorRecipe:
    """One tensor of a block: its model name and shape, and how it is stored."""

    name: str
    shape: tuple[int, ...]
    scheme: GroupScheme | None
    """None keeps the source's dtype."""
    kind: Kind = "dense"
    """Of the unit it goes into."""

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes in the block file, where the source holds it as `dtype`."""
        if self.scheme is None:
            return round_up(tensor_nbytes(dtype, self.shape), ALIGNMENT)
        out, in_ = self.matrix
        scale = self.scheme.scale_shape(out, in_)
        sizes = [tensor_nbytes(torch.uint8, self.scheme.q_shape(out, in_))]
        sizes += [tensor_nbytes(torch.float16, scale), tensor_nbytes(torch.uint8, scale)]
        return sum(round_up(size, ALIGNMENT) for size in sizes)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, in) of the matrix that is quantized: of a stack [experts, out, in], one expert below the other."""
        return folded(self.shape)

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


DtypeOf = Callable[[TensorRecipe], torch.dtype]
"""The dtype that the source holds a tensor in."""


@dataclass(frozen=True)
class UnitRecipe:
    """One unit of a block file: whole weights in the order they are written."""

    name: str
    kind: Kind
    tensors: tuple[TensorRecipe, ...]
    nbytes: int
    """Before compression."""


@dataclass(frozen=True)
class BlockRecipe:
    """One block file: the tensors in the order they are written, small ones first."""

    name: str
    role: str
    prefix: str
    tensors: tuple[TensorRecipe, ...]

    def fits(self, layout: BlockLayout) -> bool:
        """Whether the file of `layout` holds exactly these tensors, in this form."""
        found = {name: (weight.shape, weight.scheme) for name, weight in layout.weights.items()}
        return found == {tensor.name: (tensor.shape, tensor.scheme) for tensor in self.tensors}

    @property
    def path(self) -> str:
        """The file's path, relative to the store."""
        return str(PurePosixPath(BLOCK_FOLDER, f"{self.name}.safetensors"))

    def nbytes(self, dtype_of: DtypeOf) -> int:
        """Bytes of the block file, before what compression saves and what its frames' table adds."""
        units = sum(unit.nbytes for unit in self.units(dtype_of))
        return header_room_nbytes(tensor.name for tensor in self.tensors) + units

    def units(self, dtype_of: DtypeOf) -> tuple[UnitRecipe, ...]:
        """The units that the tensors are written in, where the source holds them as `dtype_of` says.

        Neighbours of one kind share a unit of at most CHUNK_NBYTES, so that small models do not fall into crumbs. A
        larger weight has a unit of its own.
        """
        groups: list[list[TensorRecipe]] = []
        room = 0
        for tensor in self.tensors:
            nbytes = tensor.nbytes(dtype_of(tensor))
            is_other = not groups or groups[-1][-1].kind != tensor.kind
            if is_other or (tensor.kind == "dense" and nbytes > room):
                groups.append([])
                room = CHUNK_NBYTES
            groups[-1].append(tensor)
            room -= nbytes
        return tuple(self._unit(group, sum(t.nbytes(dtype_of(t)) for t in group)) for group in groups)

    def _unit(self, tensors: list[TensorRecipe], nbytes: int) -> UnitRecipe:
        """Dense units are called by their first weight and how many others follow: "self_attn.q_proj+6"."""
        first, kind = tensors[0], tensors[0].kind
        name = first.name.removesuffix(".weight").removeprefix(self.prefix)
        if len(tensors) > 1:
            name += f"+{len(tensors) - 1}"
        return UnitRecipe("small" if kind == "small" else name, kind, tuple(tensors), round_up(nbytes, PAGE))
