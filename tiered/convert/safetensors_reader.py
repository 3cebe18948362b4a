"""Checkpoints in safetensors: a tensor is one slice of one file."""

from collections.abc import Mapping
from pathlib import Path

import torch

from tiered.convert.gather import Extent, Gathered, Gatherer, Region, panels_nbytes
from tiered.convert.panels import Panels
from tiered.convert.source import StoredTensor, WeightReader
from tiered.quant import folded
from tiered.store import TensorEntry, checkpoint_header


class SafetensorsReader(WeightReader):
    """A `WeightReader` of safetensors files. It keeps headers."""

    def __init__(self) -> None:
        self._gatherer = Gatherer()
        self._entries: dict[Path, dict[str, TensorEntry]] = {}
        self._tensors: dict[Path, dict[str, StoredTensor]] = {}

    def tensors(self, path: Path) -> Mapping[str, StoredTensor]:
        if path not in self._tensors:  # asked for once per tensor, of which there may be thousands
            entries = self._header(path)
            self._tensors[path] = {name: StoredTensor(entry.dtype, entry.shape) for name, entry in entries.items()}
        return self._tensors[path]

    def panels(self, path: Path, name: str, rows: range | None = None) -> Panels[torch.Tensor]:
        entry, stored = self._header(path)[name], self.tensors(path)[name]
        region = Region(entry.dtype, entry.shape, (Extent(path, entry.offset, stored.nbytes),))
        return self._gatherer.panels(Gathered.of([region]), rows)

    def rectangle(
        self,
        path: Path,
        name: str,
        rows: range | None = None,
        columns: range | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        entry = self._header(path)[name]
        count, width = folded(entry.shape or (1,))
        itemsize = entry.dtype.itemsize
        inside = range(width) if columns is None else columns
        extent = Extent(path, entry.offset, entry.nbytes)
        read = self._gatherer.rectangle(
            extent,
            width * itemsize,
            range(count) if rows is None else rows,
            range(inside.start * itemsize, inside.stop * itemsize),
            out,
        )
        return read.view(entry.dtype)

    def known(self, path: Path) -> Mapping[str, StoredTensor] | None:
        return self.tensors(path)

    def working_nbytes(self, path: Path) -> int:
        return panels_nbytes(self.tensors(path).values())

    def close(self) -> None:
        self._gatherer.close()

    def _header(self, path: Path) -> dict[str, TensorEntry]:
        if path not in self._entries:
            self._entries[path] = {entry.name: entry for entry in checkpoint_header(path)}
        return self._entries[path]
