"""What the block writer needs of a source of weights: a checkpoint's files, or random numbers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from tiered.convert.recipe import BlockRecipe, TensorRecipe
from tiered.quant import folded


@dataclass(frozen=True)
class Packed:
    """A quantized weight as three streams of bytes, to be consumed in this order."""

    q: Iterator[memoryview]
    scale: Iterable[memoryview]
    zero: Iterable[memoryview]


class WeightSource(Protocol):
    """Where the weights of one conversion come from."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """kind, name, revision and fingerprint: goes into the manifest, and must match when resuming."""

    @property
    def synthetic(self) -> bool:
        """Whether the weights are random."""

    @property
    def warnings(self) -> tuple[str, ...]: ...

    def extra_files(self) -> Mapping[str, Callable[[], bytes]]:
        """What lies beside the blocks (configuration, tokenizer), by file name."""

    def files_of(self, block: BlockRecipe) -> frozenset[str]:
        """The weight files a block is read from."""

    def check(self, block: BlockRecipe) -> None:
        """Compare the block's tensors with what the files at hand say of them, as far as that costs no reading."""

    def fetch(self, block: BlockRecipe) -> None:
        """Bring the files of the block here; from then on `working_nbytes` counts them."""

    def fetch_nbytes(self, blocks: Iterable[BlockRecipe]) -> tuple[int, ...]:
        """Sizes of the files that these blocks need and that are not here yet."""

    def open_block(self, block: BlockRecipe) -> None:
        """Check all of the block, whose files are here; called before any of its tensors is read."""

    def dtype(self, tensor: TensorRecipe) -> torch.dtype:
        """Of the tensor in the source; until its block is open this may be a guess."""

    def plain(self, tensor: TensorRecipe) -> Iterator[memoryview]:
        """The bytes of an unquantized tensor. A chunk is valid until the next one is asked for."""

    def packed(self, tensor: TensorRecipe) -> Packed:
        """The three parts of a quantized tensor. A chunk is valid until the next one is asked for."""

    def release(self, files: frozenset[str]) -> None:
        """No block needs these files any more."""

    def working_nbytes(self) -> int:
        """Memory the source itself takes while it is read, at most."""

    def close(self) -> None: ...


class WeightFiles(Protocol):
    """The files of one checkpoint: in a folder, or on the hub."""

    @property
    def kind(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str | None: ...

    @property
    def names(self) -> frozenset[str]: ...

    def nbytes(self, name: str) -> int | None:
        """Size of a file; None where that is not known before it is here."""

    def is_here(self, name: str) -> bool:
        """Whether `path` returns at once."""

    def path(self, name: str) -> Path:
        """Where the file is, after fetching it where needed."""

    def release(self, name: str) -> None:
        """The conversion needs this file no more."""

    def fingerprint(self, names: Iterable[str]) -> str:
        """Of the named files' contents, cheaply; the same wherever and whenever they were put."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a checkpoint file holds it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


class WeightReader(Protocol):
    """Reads weight files of one format."""

    def tensors(self, path: Path) -> Mapping[str, StoredTensor]:
        """What `path` holds; raises CheckpointError where it is damaged or of another format."""

    def panels(self, path: Path, name: str) -> Iterator[torch.Tensor]:
        """The tensor in runs of whole rows, each valid until the next is asked for; a stack's rows are folded."""

    def known(self, path: Path) -> Mapping[str, StoredTensor] | None:
        """As `tensors`, or None where that would mean reading the whole file and has not been done yet."""

    def working_nbytes(self, path: Path) -> int:
        """Memory that reading takes at most."""

    def close(self) -> None: ...


PANEL_NBYTES = 8 << 20
"""Source bytes read, quantized and written at a time: large enough for the disk, small beside the interpreter."""


def panel_rows(shape: tuple[int, ...], itemsize: int) -> tuple[int, int, int]:
    """(rows, values in a row, rows in a panel) of a tensor; a scalar is one row, a stack has those of all."""
    rows, row_numel = folded(shape) if len(shape) > 1 else (shape[0] if shape else 1, 1)
    return rows, row_numel, max(1, PANEL_NBYTES // max(1, row_numel * itemsize))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor; nothing is copied."""
    # A scalar has no last dimension to reinterpret, and numpy knows no bfloat16.
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
