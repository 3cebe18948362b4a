"""Checkpoints in safetensors: positional reads of row panels. Not mapped: mapped pages would count as our memory."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from tiered.convert.source import PANEL_NBYTES, StoredTensor, panel_rows
from tiered.errors import CheckpointError, ReadError
from tiered.store import TensorEntry, checkpoint_header


class SafetensorsReader:
    """Keeps headers, and the last file open."""

    def __init__(self) -> None:
        self._entries: dict[Path, dict[str, TensorEntry]] = {}
        self._tensors: dict[Path, dict[str, StoredTensor]] = {}
        self._open: tuple[Path, int] | None = None

    def tensors(self, path: Path) -> Mapping[str, StoredTensor]:
        if path not in self._tensors:  # asked for once per tensor, of which there may be thousands
            entries = self._header(path)
            self._tensors[path] = {name: StoredTensor(entry.dtype, entry.shape) for name, entry in entries.items()}
        return self._tensors[path]

    def panels(self, path: Path, name: str) -> Iterator[torch.Tensor]:
        entry = self._header(path)[name]
        rows, row_numel, step = panel_rows(entry.shape, entry.dtype.itemsize)
        row_nbytes = row_numel * entry.dtype.itemsize
        buffer = bytearray(min(step, rows) * row_nbytes)
        if not buffer:
            return
        for start in range(0, rows, step):
            count = min(step, rows - start)
            data = memoryview(buffer)[: count * row_nbytes]
            _read(self._fd(path), path, entry.offset + start * row_nbytes, data)
            flat = torch.frombuffer(data, dtype=entry.dtype)
            yield flat.view(count, row_numel) if len(entry.shape) > 1 else flat.view(entry.shape and (count,))

    def known(self, path: Path) -> Mapping[str, StoredTensor] | None:
        return self.tensors(path)

    def working_nbytes(self, path: Path) -> int:
        return PANEL_NBYTES

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def _header(self, path: Path) -> dict[str, TensorEntry]:
        if path not in self._entries:
            self._entries[path] = {entry.name: entry for entry in checkpoint_header(path)}
        return self._entries[path]

    def _fd(self, path: Path) -> int:
        if self._open is None or self._open[0] != path:
            self.close()
            self._open = (path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return self._open[1]


def _read(fd: int, path: Path, offset: int, data: memoryview) -> None:
    """Fill `data` from `offset` of the file, leaving nothing of it in the page cache."""
    done = 0
    while done < len(data):
        try:
            count = os.preadv(fd, [data[done:]], offset + done)
        except OSError as error:
            raise ReadError(f"{path}: reading {len(data):,} bytes at {offset:,} failed: {error.strerror}") from error
        if count == 0:
            raise CheckpointError(f"{path}: ends at byte {offset + done:,}, its header promises more; it was truncated")
        done += count
    os.posix_fadvise(fd, offset, len(data), os.POSIX_FADV_DONTNEED)
