"""The recipe of a store: which tensors each block file holds and in which form. Decided before anything is read.

In: the skeleton's blocks and the options. Out: one `BlockRecipe` for each block file, with its exact size in bytes
but for what zstd saves. Pure.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

import torch

from tiered.arch import BlockTensors, ParameterInfo
from tiered.convert.options import ConvertOptions
from tiered.quant import GroupScheme, folded
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
        """(rows, in) as which it is quantized: a stack [experts, out, in] one expert below the other."""
        return folded(self.shape)

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class BlockRecipe:
    """One block file: the tensors in the order they are written."""

    name: str
    role: str
    prefix: str
    tensors: tuple[TensorRecipe, ...]

    @property
    def path(self) -> str:
        """Relative to the store."""
        return str(PurePosixPath(BLOCK_FOLDER, f"{self.name}.safetensors"))

    def nbytes(self, dtype_of: Callable[[TensorRecipe], torch.dtype]) -> int:
        """About the size of the block file: data exactly, the header's room from above."""
        data = sum(tensor.nbytes(dtype_of(tensor)) for tensor in self.tensors)
        return header_room_nbytes(tensor.name for tensor in self.tensors) + round_up(data, PAGE)


def block_recipes(blocks: Iterable[BlockTensors], options: ConvertOptions) -> tuple[BlockRecipe, ...]:
    """The recipe of every block that holds anything: a family may have no `outer` tensors."""
    return tuple(
        BlockRecipe(
            block.name, block.role, block.prefix, tuple(_tensor(p, block.role, options) for p in block.parameters)
        )
        for block in blocks
        if block.parameters
    )


def unquantized(recipes: Iterable[BlockRecipe], linear: Iterable[str]) -> tuple[str, ...]:
    """The weights named in `linear` that stay in the source's precision."""
    plain = {tensor.name for block in recipes for tensor in block.tensors if tensor.scheme is None}
    return tuple(name for name in linear if name in plain)


def quantizable(block: BlockTensors) -> tuple[str, ...]:
    """The tensors of `block` that a scheme is meant for."""
    return tuple(parameter.name for parameter in block.parameters if _is_quantizable(parameter, block.role))


def _tensor(parameter: ParameterInfo, role: str, options: ConvertOptions) -> TensorRecipe:
    scheme = options.layer_scheme if role == "layer" else options.embed_scheme
    if scheme is not None and not (_is_quantizable(parameter, role) and scheme.accepts(*folded(parameter.shape))):
        scheme = None
    return TensorRecipe(parameter.name, parameter.shape, scheme)


def _is_quantizable(parameter: ParameterInfo, role: str) -> bool:
    """Embedding, head and the layers' linear weights; what is outside them stays resident and small."""
    return role == "embed" or (role in ("layer", "head") and parameter.is_linear)
