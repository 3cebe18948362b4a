"""Token embedding rows on demand: a few rows of a table that is never held whole.

In: distinct token ids. Out: their rows. A row may begin at any byte of the file, so it is read with the 4096-byte
disk pages around it; rows whose disk pages touch become one read. Scales and zeros are resident.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from tiered.errors import StoreError
from tiered.io import ChunkVerifier, DiskReader, Slab
from tiered.quant import QuantizedTensor, QuantizedWeight
from tiered.store import CHUNK_NBYTES, PAGE, BlockInfo, Store, TensorEntry, Weight
from tiered.units import round_down, round_up

STAGING_NBYTES: Final = CHUNK_NBYTES
"""Rows are read through this much memory, which is also what testing the checksum of one chunk takes."""


@dataclass(frozen=True)
class _Run:
    """Adjacent disk pages, bytes `offset` to `stop` of the file, that hold the wanted `rows`."""

    offset: int
    stop: int
    rows: tuple[int, ...]


class EmbeddingRows:
    """The embedding table of `store`, row by row. `staging` is lent for its lifetime."""

    def __init__(self, store: Store, reader: DiskReader, verifier: ChunkVerifier, staging: Slab) -> None:
        self._block: BlockInfo = store.blocks["embed"]
        layout = store.layout(self._block)
        (unit,) = layout.units
        (self._weight,) = unit.weights.values()
        self._offset = unit.offset
        """Where the unit starts in the file; offsets of the weight's parts count from there."""
        if layout.compressed:
            raise StoreError(
                f"{layout.file.path}: {self._weight.name} is compressed, expected rows that can be read one by one; "
                "convert the model again"
            )
        self._reader, self._verifier, self._staging = reader, verifier, staging
        self._side: tuple[torch.Tensor, torch.Tensor] | None = None

    @staticmethod
    def side_nbytes(weight: Weight) -> int:
        """Bytes of the scales and zeros that stay resident."""
        return sum(round_up(e.nbytes, PAGE) + PAGE for part, e in weight.parts.items() if part in ("scale", "zero"))

    @property
    def vocab(self) -> int:
        return self._weight.shape[0]

    async def load_side(self, slab: Slab | None) -> None:
        """Read scales and zeros into `slab`, once."""
        if slab is None or self._weight.scheme is None:
            return
        views, position = [], 0
        for part in ("scale", "zero"):
            entry = self._weight.parts[part]
            offset = self._offset + entry.offset
            await self._verify(offset, offset + entry.nbytes)
            first, last = round_down(offset, PAGE), round_up(offset + entry.nbytes, PAGE)
            await self._reader.read_pages(self._block.file, first, slab.view[position : position + last - first])
            raw = slab.tensor()[position + offset - first :][: entry.nbytes]
            views.append(raw.view(entry.dtype).view(entry.shape))
            position += last - first
        self._side = (views[0], views[1])

    async def fetch(self, ids: Sequence[int]) -> torch.Tensor:
        """Read the rows of `ids`, which are distinct and ascending, as stored: uint8 [len(ids), bytes of a row]."""
        row_nbytes = self._row_nbytes
        packed = torch.empty(len(ids), row_nbytes, dtype=torch.uint8)
        done = 0
        for batch in _batches(_runs(ids, self._offset + self._entry.offset, row_nbytes), self._staging.nbytes):
            for run in batch:
                await self._verify(run.offset, run.stop)
            positions = list(itertools.accumulate((run.stop - run.offset for run in batch), initial=0))
            parts = [
                (run.offset, self._staging.view[start:stop])
                for run, start, stop in zip(batch, positions, positions[1:], strict=False)
            ]
            await self._reader.read_parts(self._block.file, parts)
            rows = sum(len(run.rows) for run in batch)
            await self._reader.call(
                functools.partial(self._copy_rows, batch, positions, packed[done : done + rows], row_nbytes)
            )
            done += rows
        return packed

    def widen(self, packed: torch.Tensor, ids: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """What `fetch(ids)` read, as numbers: [len(ids), width] of `dtype`."""
        if self._weight.scheme is None:
            return packed.view(self._entry.dtype).to(dtype)
        assert self._side is not None, "load_side comes first"
        index = torch.tensor(ids)
        codes = QuantizedTensor(packed, self._side[0][index], self._side[1][index])
        return QuantizedWeight(codes, self._weight.scheme).rows(0, len(ids), dtype)

    @property
    def _entry(self) -> TensorEntry:
        """The part of the weight that is read row by row."""
        return self._weight.parts["" if self._weight.scheme is None else "q"]

    @property
    def _row_nbytes(self) -> int:
        return self._entry.nbytes // self._weight.shape[0]

    def _copy_rows(self, batch: Sequence[_Run], positions: Sequence[int], out: torch.Tensor, row_nbytes: int) -> None:
        staged, done = self._staging.tensor(), 0
        for run, position in zip(batch, positions, strict=False):
            for row in run.rows:
                start = position + self._offset + self._entry.offset + row * row_nbytes - run.offset
                out[done] = staged[start : start + row_nbytes]
                done += 1

    async def _verify(self, start: int, stop: int) -> None:
        """Read the chunks around [start, stop) whole and test their checksums, where the policy wants them tested."""
        file = self._block.file
        for number in file.chunks_around(start, stop):
            if self._verifier.wants(file, number):
                chunk = file.chunks[number]
                part = self._staging.view[: chunk.nbytes]
                await self._reader.read_pages(file, chunk.offset, part)
                await self._reader.call(functools.partial(self._verifier.check, file, number, part))


def _runs(ids: Sequence[int], base: int, row_nbytes: int) -> list[_Run]:
    """The disk pages of rows `ids` (ascending); adjacent ones are joined up to the size of the staging memory."""
    runs: list[_Run] = []
    for row in ids:
        start = base + row * row_nbytes
        offset, stop = round_down(start, PAGE), round_up(start + row_nbytes, PAGE)
        if runs and offset <= runs[-1].stop and stop - runs[-1].offset <= STAGING_NBYTES:
            runs[-1] = _Run(runs[-1].offset, max(stop, runs[-1].stop), (*runs[-1].rows, row))
        else:
            runs.append(_Run(offset, stop, (row,)))
    return runs


def _batches(runs: Sequence[_Run], room: int) -> list[list[_Run]]:
    """Runs in groups that fit the staging memory together."""
    batches: list[list[_Run]] = []
    used = room
    for run in runs:
        nbytes = run.stop - run.offset
        if used + nbytes > room:
            batches.append([])
            used = 0
        batches[-1].append(run)
        used += nbytes
    return batches
