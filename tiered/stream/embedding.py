"""Token embedding rows on demand: a few rows of a table that is never held whole.

In: distinct token ids. Out: their rows. A row may begin at any byte of the file, so it is read with the 4096-byte
disk pages around it; rows whose disk pages touch become one read. Scales and zeros are resident. A large table is
stored in ranges of its rows, one behind the other.
"""

import bisect
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from tiered.errors import StoreError
from tiered.io import ChunkVerifier, DiskReader, Slab
from tiered.quant import QuantizedTensor, QuantizedWeight
from tiered.store import CHUNK_NBYTES, PAGE, Store, TensorEntry, Weight
from tiered.store.manifest import RANGE
from tiered.units import round_down, round_up

STAGING_NBYTES: Final = CHUNK_NBYTES
"""Rows are read through this much memory, which is also what testing the checksum of one chunk takes."""


@dataclass(frozen=True)
class _Run:
    """Adjacent disk pages, bytes `offset` to `stop` of the file, that hold the wanted `rows`."""

    offset: int
    stop: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class _Range:
    """Rows `first` to `stop` of the table, all in one unit."""

    first: int
    stop: int
    weight: Weight
    unit_offset: int
    """Where its unit starts in the file; offsets of the weight's parts count from there."""

    @property
    def entry(self) -> TensorEntry:
        """The part of the weight that is read row by row."""
        return self.weight.parts["" if self.weight.scheme is None else "q"]

    @property
    def row_nbytes(self) -> int:
        return self.entry.nbytes // self.weight.shape[0]

    def offset_of(self, row: int) -> int:
        """Where `row` of the table begins in the file."""
        return self.unit_offset + self.entry.offset + (row - self.first) * self.row_nbytes


class EmbeddingRows:
    """The embedding table of `store`, row by row. `staging` is lent for its lifetime."""

    def __init__(self, store: Store, reader: DiskReader, verifier: ChunkVerifier, staging: Slab) -> None:
        block = store.blocks["embed"]
        self._file, layout = block.file, store.layout(block)
        if layout.compressed:
            raise StoreError(
                f"{self._file.path}: the embedding is compressed, expected rows that can be read one by one; "
                "convert the model again"
            )
        stored = [(weight, unit.offset) for unit in layout.units for weight in unit.weights.values()]
        firsts = list(itertools.accumulate((weight.shape[0] for weight, _ in stored), initial=0))
        spans = zip(firsts, firsts[1:], stored, strict=False)
        self._ranges = [_Range(first, stop, weight, offset) for first, stop, (weight, offset) in spans]
        self._stops = firsts[1:]
        self._scheme, self._row_nbytes = self._ranges[0].weight.scheme, self._ranges[0].row_nbytes
        self._reader, self._verifier, self._staging = reader, verifier, staging
        self._side: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Scales and zeros of each range."""

    @staticmethod
    def side_nbytes(weight: Weight) -> int:
        """Bytes of the scales and zeros of the table `weight`, in all its ranges, that stay resident."""
        parts = ((part.partition(RANGE)[0], entry) for part, entry in weight.parts.items())
        return sum(round_up(entry.nbytes, PAGE) + PAGE for part, entry in parts if part in ("scale", "zero"))

    @property
    def vocab(self) -> int:
        return self._stops[-1]

    async def load_side(self, slab: Slab | None) -> None:
        """Read scales and zeros into `slab`, once."""
        if slab is None or self._scheme is None:
            return
        side, position = [], 0
        for part in self._ranges:
            views = []
            for entry in (part.weight.parts[name] for name in ("scale", "zero") if name in part.weight.parts):
                offset = part.unit_offset + entry.offset
                await self._verify(offset, offset + entry.nbytes)
                first, last = round_down(offset, PAGE), round_up(offset + entry.nbytes, PAGE)
                await self._reader.read_pages(self._file, first, slab.view[position : position + last - first])
                raw = slab.tensor()[position + offset - first :][: entry.nbytes]
                views.append(raw.view(entry.dtype).view(entry.shape))
                position += last - first
            scale = views[0]
            side.append((scale, views[1] if len(views) > 1 else scale.new_empty(len(scale), 0, dtype=torch.uint8)))
        self._side = side

    async def fetch(self, ids: Sequence[int]) -> torch.Tensor:
        """Read the rows of `ids`, which are distinct and ascending, as stored: uint8 [len(ids), bytes of a row]."""
        packed = torch.empty(len(ids), self._row_nbytes, dtype=torch.uint8)
        done = 0
        for batch in _batches(_runs(ids, self._offset_of, self._row_nbytes), self._staging.nbytes):
            for run in batch:
                await self._verify(run.offset, run.stop)
            positions = list(itertools.accumulate((run.stop - run.offset for run in batch), initial=0))
            parts = [
                (run.offset, self._staging.view[start:stop])
                for run, start, stop in zip(batch, positions, positions[1:], strict=False)
            ]
            await self._reader.read_parts(self._file, parts)
            rows = sum(len(run.rows) for run in batch)
            await self._reader.call(functools.partial(self._copy_rows, batch, positions, packed[done : done + rows]))
            done += rows
        return packed

    def widen(self, packed: torch.Tensor, ids: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """What `fetch(ids)` read, as numbers: [len(ids), width] of `dtype`."""
        if self._scheme is None:
            return packed.view(self._ranges[0].entry.dtype).to(dtype)
        assert self._side, "load_side comes first"
        sides, start = [], 0
        for part, (scale, zero) in zip(self._ranges, self._side, strict=True):
            stop = bisect.bisect_left(ids, part.stop)
            index = torch.tensor(ids[start:stop], dtype=torch.int64) - part.first
            sides.append((scale[index], zero[index]))
            start = stop
        scales, zeros = (torch.cat(found) for found in zip(*sides, strict=True))
        return QuantizedWeight(QuantizedTensor(packed, scales, zeros), self._scheme).rows(0, len(ids), dtype)

    def _offset_of(self, row: int) -> int:
        """Where `row` begins in the file."""
        return self._ranges[bisect.bisect_right(self._stops, row)].offset_of(row)

    def _copy_rows(self, batch: Sequence[_Run], positions: Sequence[int], out: torch.Tensor) -> None:
        staged, done = self._staging.tensor(), 0
        for run, position in zip(batch, positions, strict=False):
            for row in run.rows:
                start = position + self._offset_of(row) - run.offset
                out[done] = staged[start : start + self._row_nbytes]
                done += 1

    async def _verify(self, start: int, stop: int) -> None:
        """Read the chunks around [start, stop) whole and test their checksums, where the policy wants them tested."""
        file = self._file
        for number in file.chunks_around(start, stop):
            if self._verifier.wants(file, number):
                chunk = file.chunks[number]
                part = self._staging.view[: chunk.nbytes]
                await self._reader.read_pages(file, chunk.offset, part)
                await self._reader.call(functools.partial(self._verifier.check, file, number, part))


def _runs(ids: Sequence[int], offset_of: Callable[[int], int], row_nbytes: int) -> list[_Run]:
    """The disk pages of rows `ids` (ascending), each of which begins at `offset_of` it in the file; adjacent ones are
    joined up to the size of the staging memory."""
    runs: list[_Run] = []
    for row in ids:
        start = offset_of(row)
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
