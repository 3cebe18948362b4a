"""Checkpoints in safetensors: positional reads of row panels. Nothing is mapped: it would count as our memory.

A thread reads ahead: while one panel is quantized and written, the next ones are on their way from the disk.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import torch

from tiered.convert.source import PANEL_NBYTES, StoredTensor, panel_rows, tensor_bytes
from tiered.errors import CheckpointError, ReadError
from tiered.files import reading
from tiered.store import TensorEntry, checkpoint_header

_BUFFERS: Final = 3
"""Panels of one tensor in memory: the one that is used, and those that are read meanwhile."""


class SafetensorsReader:
    """A `WeightReader` of safetensors files. It keeps headers, and the last file open."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None  # the only one that opens and reads weight files
        self._entries: dict[Path, dict[str, TensorEntry]] = {}
        self._tensors: dict[Path, dict[str, StoredTensor]] = {}
        self._open: tuple[Path, int] | None = None

    def tensors(self, path: Path) -> Mapping[str, StoredTensor]:
        if path not in self._tensors:  # asked for once per tensor, of which there may be thousands
            entries = self._header(path)
            self._tensors[path] = {name: StoredTensor(entry.dtype, entry.shape) for name, entry in entries.items()}
        return self._tensors[path]

    def panels(self, path: Path, name: str, rows: range | None = None) -> Iterator[torch.Tensor]:
        """As `WeightReader` says; when this returns, the first panel is being read already."""
        entry = self._header(path)[name]
        count, row_numel, step = panel_rows(entry.shape, entry.dtype.itemsize)
        rows = range(count) if rows is None else rows
        starts = range(rows.start, rows.stop if row_numel else rows.start, step)
        buffers: list[torch.Tensor] = []

        def begin(index: int) -> Future[torch.Tensor]:
            if len(buffers) < _BUFFERS:
                buffers.append(torch.empty(min(step, len(rows)) * row_numel, dtype=entry.dtype))
            start = starts[index]
            flat = buffers[index % _BUFFERS][: min(step, rows.stop - start) * row_numel]
            panel = flat.view(-1, row_numel) if len(entry.shape) > 1 else flat.view(entry.shape and (-1,))
            return self._submit(path, entry.offset + start * row_numel * entry.dtype.itemsize, panel)

        return _read_ahead(begin, len(starts))

    def known(self, path: Path) -> Mapping[str, StoredTensor] | None:
        return self.tensors(path)

    def working_nbytes(self, path: Path) -> int:
        largest = max((tensor.nbytes for tensor in self.tensors(path).values()), default=0)
        return (_BUFFERS + 1) * min(PANEL_NBYTES, largest)  # one for the first panel of the tensor that comes next

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
        self._close_file()

    def _header(self, path: Path) -> dict[str, TensorEntry]:
        if path not in self._entries:
            self._entries[path] = {entry.name: entry for entry in checkpoint_header(path)}
        return self._entries[path]

    def _submit(self, path: Path, offset: int, panel: torch.Tensor) -> Future[torch.Tensor]:
        """Begin to fill `panel` from byte `offset` of the file; panels are filled in the order of the calls."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "read-ahead")

        def fill() -> torch.Tensor:
            _read(self._fd(path), path, offset, tensor_bytes(panel))
            return panel

        return self._thread.submit(fill)

    def _fd(self, path: Path) -> int:
        if self._open is None or self._open[0] != path:
            self._close_file()
            with reading(path):
                self._open = (path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return self._open[1]

    def _close_file(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None


def _read_ahead(begin: Callable[[int], Future[torch.Tensor]], count: int) -> Iterator[torch.Tensor]:
    """`count` panels in order: the first is begun now, the others as soon as there is a buffer for them."""
    begun = deque([begin(0)] if count else [])

    def deliver() -> Iterator[torch.Tensor]:
        for index in range(count):
            panel = begun.popleft().result()
            while (following := index + 1 + len(begun)) < min(count, index + _BUFFERS):
                begun.append(begin(following))
            yield panel

    return deliver()


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
