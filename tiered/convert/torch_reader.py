"""Checkpoints in torch's own format (`pytorch_model*.bin`), read without executing pickles.

The zip format is mapped, and mapped anew every so often so that pages already read do not pile up in our memory.
The legacy format (before torch 1.6) can only be read whole: there the conversion needs memory for one file.
"""

import errno
import pickle
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from tiered.convert.panels import Panels, rooms_nbytes
from tiered.convert.source import PANEL_NBYTES, StoredTensor, WeightReader, panel_rows
from tiered.errors import BudgetError, CheckpointError, ReadError
from tiered.files import reading
from tiered.kernels import room_in

_REMAP_NBYTES: Final = 32 << 20
ZIP_MAGIC: Final = b"PK\x03\x04"


class TorchReader(WeightReader):
    """Holds at most one file: mapped (zip) or in memory (legacy)."""

    def __init__(self) -> None:
        self._held: tuple[Path, dict[str, torch.Tensor]] | None = None
        self._tensors: dict[Path, dict[str, StoredTensor]] = {}
        self._touched = 0
        self._reading = threading.Lock()

    def tensors(self, path: Path) -> Mapping[str, StoredTensor]:
        if path not in self._tensors:
            self._tensors[path] = {
                name: StoredTensor(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._load(path).items()
            }
        return self._tensors[path]

    def panels(self, path: Path, name: str, rows: range | None = None) -> Panels[torch.Tensor]:
        stored = self.tensors(path)[name]
        count, row_numel, step = panel_rows(stored.shape, stored.dtype.itemsize)
        rows = range(count) if rows is None else rows
        starts = range(rows.start, rows.stop, step)

        def make(number: int, room: torch.Tensor) -> torch.Tensor:
            with self._reading:
                whole = self._load(path)[name]
                start = starts[number]
                part = _folded(whole)[start : min(rows.stop, start + step)] if stored.shape else whole
                return self._copied(path, part, room)

        return Panels(len(starts), make, min(step, len(rows)) * row_numel * stored.dtype.itemsize)

    def rectangle(
        self,
        path: Path,
        name: str,
        rows: range | None = None,
        columns: range | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        with self._reading:
            whole = self._load(path)[name]
            matrix = _folded(whole) if whole.ndim > 1 else whole.view(1, -1)
            rows = range(matrix.shape[0]) if rows is None else rows
            columns = range(matrix.shape[1]) if columns is None else columns
            return self._copied(path, matrix[rows.start : rows.stop, columns.start : columns.stop], out)

    def known(self, path: Path) -> Mapping[str, StoredTensor] | None:
        return self.tensors(path) if path in self._tensors or is_zip(path) else None

    def working_nbytes(self, path: Path) -> int:
        if is_zip(path):
            # What is mapped until it is mapped anew, and copies of panels.
            return min(_REMAP_NBYTES + rooms_nbytes(PANEL_NBYTES), rooms_nbytes(path.stat().st_size))
        return path.stat().st_size + rooms_nbytes(PANEL_NBYTES)

    def close(self) -> None:
        self._held = None
        self._touched = 0

    def _copied(self, path: Path, part: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """A copy of a part of `path`, in the memory `out` if that is large enough: it may be a strided view, and must
        not keep the mapping alive. Map `path` anew once so much of it has been read."""
        # Of a strip of columns the pages of whole rows.
        self._touched += max(part.nbytes, part.stride(0) * len(part) * part.itemsize if part.ndim > 1 else 0)
        copy = room_in(out, part.shape, part.dtype).copy_(part)
        if self._touched >= _REMAP_NBYTES and is_zip(path):
            self.close()
        return copy

    def _load(self, path: Path) -> dict[str, torch.Tensor]:
        if self._held is None or self._held[0] != path:
            self.close()  # before loading the next: two legacy files would not fit
            self._held = (path, _load_state_dict(path))
        return self._held[1]


def _folded(tensor: torch.Tensor) -> torch.Tensor:
    """A stack with its matrices one below the other; any other tensor unchanged."""
    return tensor.flatten(end_dim=-2) if tensor.ndim > 2 else tensor


def is_zip(path: Path) -> bool:
    """Whether torch wrote `path` in the zip format."""
    with reading(path), path.open("rb") as file:
        return file.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def _load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    try:
        mapped = is_zip(path)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except MemoryError as error:
        raise BudgetError(
            f"{path}: a file in torch's legacy format is read whole, and there is no memory for it; "
            "use a safetensors copy of the checkpoint"
        ) from error
    # Damaged input raises whatever the damaged part happens to hit, inside the unpickler too.
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        AssertionError,
        UnicodeDecodeError,
        OverflowError,
        ImportError,
        OSError,
    ) as error:
        if isinstance(error, OSError) and error.errno == errno.EIO:
            raise ReadError(f"{path}: reading failed: {error.strerror}") from error
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{path}: cannot be read as a torch checkpoint of plain tensors ({type(error).__name__}: {reason}); "
            "pickled code is never run: download the file again, or use a safetensors copy of the checkpoint"
        ) from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{path}: expected a dict of tensors by name, found {type(loaded).__name__}")
    tensors = {str(name): tensor for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)}
    strange = sorted(name for name, tensor in tensors.items() if tensor.layout != torch.strided or tensor.is_meta)
    if strange:
        raise CheckpointError(
            f"{path}: {strange[0]} is {'without data' if tensors[strange[0]].is_meta else 'sparse'}, expected a plain "
            "tensor; use a safetensors copy of the checkpoint"
        )
    return tensors
