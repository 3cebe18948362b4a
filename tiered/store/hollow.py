"""Block files of their true size with nothing in them: a header that says where everything lies, and then a hole.

In: what a `BlockWriter` takes. Out: the same file, but for its data and checksums. Called where a store's layout is
wanted and its weights are not: whoever opens it as a store learns sizes and places from the code that writes real ones.
"""

import io
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from tiered.store.format import tensor_nbytes
from tiered.store.sweep import Sweep
from tiered.store.write import BlockWriter
from tiered.units import MIB

_PIECE: Final = bytes(4 * MIB)


def write_hollow(path: Path, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a safetensors file of `tensors` (dtype, shape and data_offsets of each), with a hole for its data. Raises
    TypeError or ValueError where they are no such, and OSError."""
    names = ("dtype", "shape", "data_offsets")
    header = json.dumps({name: {key: tensor[key] for key in names} for name, tensor in tensors.items()}).encode()
    end = max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)


class HollowWriter(BlockWriter):
    """Writes headers only; what is added is not even asked for."""

    def add(self, name: str, dtype: torch.dtype, shape: Sequence[int], pieces: Iterable[memoryview]) -> None:
        nbytes = tensor_nbytes(dtype, shape)
        super().add(name, dtype, shape, (memoryview(_PIECE)[: nbytes - at] for at in range(0, nbytes, len(_PIECE))))

    def _start_sweep(self, file: io.RawIOBase) -> Sweep:
        return _Hole(file)

    def _hash(self, data: memoryview) -> None:
        pass


class _Hole(Sweep):
    """Counts what is appended, and makes the file as long."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file, self._nbytes = file, 0

    def append(self, data: memoryview) -> None:
        self._nbytes += data.nbytes

    def finish(self) -> None:
        os.ftruncate(self._file.fileno(), self._nbytes)

    def close(self) -> None:
        pass
