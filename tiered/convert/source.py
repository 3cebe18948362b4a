"""The interfaces of a conversion: of a source of weights, and of a reader of one checkpoint file format.

A `WeightSource` is a checkpoint (`checkpoint.py`) or random numbers (`synthetic.py`), and a store that is upgraded has
the weights of one block after the other (`stored.py`); a `WeightReader` knows one file
format (`safetensors_reader.py`, `torch_reader.py`) and is listed in the table of `index.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from tiered.convert.blocks import BlockRecipe, RangeRecipe, TensorRecipe
from tiered.convert.panels import Panels
from tiered.convert.taken import Taken
from tiered.kernels import CodedRows
from tiered.quant import QuantizedTensor, Scheme, folded


@dataclass(frozen=True)
class Packed:
    """A quantized weight as three streams of bytes, to be consumed in this order; `zero` has none where the scheme has
    no zeros."""

    q: Iterator[memoryview]
    scale: Iterable[memoryview]
    zero: Iterable[memoryview]


Fetching = Callable[[BlockRecipe], None]
"""Called with a block before its files are downloaded, which takes a while."""


class Weights(Protocol):
    """The weights of a block, piece by piece."""

    def dtype(self, tensor: TensorRecipe) -> torch.dtype:
        """The tensor's dtype in the source; this may be a guess until its block can be read."""

    def plain(self, part: RangeRecipe) -> Iterator[memoryview]:
        """The bytes of an unquantized tensor, or of some of its rows, in pieces. Each is valid until the next is asked
        for."""

    def packed(self, part: RangeRecipe) -> Packed:
        """The three parts of a quantized tensor, or of some of its rows, in pieces. Each is valid until the next is
        asked for."""


class WeightSource(Weights, Protocol):
    """Where the weights of one conversion come from."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """kind, name, revision and fingerprint: goes into the manifest, and must match when resuming."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know of the weights."""

    @property
    def taken(self) -> tuple[Taken, ...]:
        """What has become, so far, of weights that were quantized already."""

    def extra_files(self) -> Mapping[str, Callable[[], bytes]]:
        """What lies beside the blocks (configuration, tokenizer), by file name."""

    def room_nbytes(self, blocks: Sequence[BlockRecipe]) -> Mapping[Path, int]:
        """Bytes of disk that downloading the files of these blocks takes, by folder."""

    def opened(
        self, blocks: Sequence[BlockRecipe], fetching: Fetching
    ) -> AbstractContextManager[Iterable[BlockRecipe]]:
        """A context with `blocks`, those still to be converted, in the order that suits the source.

        Each can be read until the next is asked for. Leaving the context without an error means that the store is
        whole: files that were downloaded for it may be deleted. `fetching` is called before downloads.
        """


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a checkpoint file holds it.

    One that is quantized there looks like a plain one: float32, by the name and of the shape [..., out, in] that it
    would have in 16 bits.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    method: str | None = None
    """How it is quantized, such as "gptq"; None: it is plain. A quantized one is [..., out, in] even where
    transformers' model has it transposed."""
    scheme: Scheme | None = None
    """The scheme of a store that holds the very codes of a quantized one; None where there is none."""
    is_certain: bool = True
    """Whether its tensors alone tell the numbers of a quantized one; else config.json is believed in part."""

    @property
    def nbytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


class WeightReader(Protocol):
    """Reads weight files of one format, which say what `StoredTensor` does of each tensor. Panels are made, and
    rectangles read, by any threads; the files are one thread's at a time."""

    def tensors(self, path: Path) -> Mapping[str, StoredTensor]:
        """What `path` holds; raises CheckpointError where it is damaged or of another format."""

    def panels(self, path: Path, name: str, rows: range | None = None) -> Panels[torch.Tensor]:
        """The tensor, or these of its rows, in panels of whole rows; a stack is one matrix."""

    def packed(self, path: Path, name: str, rows: range | None = None) -> Panels[QuantizedTensor]:
        """As `panels`, for a tensor that has a `scheme`: its codes, scales and zeros in the layout of that scheme.

        Scales come in the source's own dtype; whoever stores them in another one answers for the rounding.
        """
        raise AssertionError(f"{name} of {path} is not quantized")

    def coded(self, path: Path, name: str, rows: range | None = None) -> Panels[CodedRows] | None:
        """As `panels`, but the codes that the numbers of a quantized tensor are looked up by; None where there are
        none."""
        return None

    def rectangle(
        self,
        path: Path,
        name: str,
        rows: range | None = None,
        columns: range | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """These rows and columns of the tensor's matrix [rows, last dimension], read at once; a vector is one row. They
        may be in the memory `out`, u8, if that is large enough.

        For readers below one of quantized weights, and for what a checkpoint holds transposed.
        """
        raise AssertionError(f"{name} of {path} is not read by rectangles")

    def known(self, path: Path) -> Mapping[str, StoredTensor] | None:
        """As `tensors`, or None where the whole file would have to be read for it and has not been read yet."""

    def working_nbytes(self, path: Path) -> int:
        """Bytes of memory that reading `path` takes at most."""

    def close(self) -> None: ...


PANEL_NBYTES = 8 << 20
"""Source bytes read, quantized and written at a time: large enough for the disk, small beside the interpreter."""


def panel_rows(shape: tuple[int, ...], itemsize: int) -> tuple[int, int, int]:
    """(rows, values in a row, rows in a panel) of a tensor; a scalar is one row, a stack has all its matrices' rows."""
    rows, row_numel = folded(shape) if len(shape) > 1 else (shape[0] if shape else 1, 1)
    return rows, row_numel, max(1, PANEL_NBYTES // max(1, row_numel * itemsize))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor; nothing is copied."""
    # A scalar has no last dimension to reinterpret, and numpy knows no bfloat16.
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
