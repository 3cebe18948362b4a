"""Rows of tables on demand: the token embedding, and other tables whose rows are known by id before a pass begins.

In: for each table, distinct ids. Out: their rows, of tables that are never held whole. A row may begin at any byte of
the file, so it is read with the 4096-byte disk pages around it; rows whose disk pages touch become one read. All reads
of all tables go out together.

A row is a record with its own scales, zeros and checksum (`tiered/store/rows.py`), so nothing else is read for it. A
token embedding that is the head too is stored as heads are, and so are those of older stores: the codes of a row are
read, scales and zeros are resident, and a large one is stored in ranges of its rows, one behind the other.
"""

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from tiered.errors import StoreError
from tiered.io import ChunkVerifier, DiskReader, Slab
from tiered.quant import QuantizedTensor, QuantizedWeight
from tiered.store import CHUNK_NBYTES, PAGE, BlockInfo, FileInfo, Store, TensorEntry, Weight
from tiered.store.manifest import RANGE
from tiered.store.rows import ROWS
from tiered.units import round_down, round_up

STAGING_NBYTES: Final = CHUNK_NBYTES
"""Rows are read through this much memory, which is also what testing the checksum of one chunk takes."""


class FetchedRows:
    """Rows of one table as they were read, by the `ids` that chose them, which are ascending.

    `widen` makes numbers [n, width] of the rows with these positions among `ids`, in the dtype asked for.
    """

    def __init__(self, ids: Sequence[int], widen: Callable[[torch.Tensor, torch.dtype], torch.Tensor]) -> None:
        self._ids, self._widen = torch.tensor(ids), widen

    def of(self, wanted: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A small table [n, width] of `dtype` with the rows of the `n` ids `wanted`, and for each its number there."""
        positions = torch.searchsorted(self._ids, wanted.contiguous())
        return self._widen(positions.view(-1), dtype), torch.arange(positions.numel()).view(wanted.shape)


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
        weight = self.weight
        return weight.parts[ROWS if weight.rows is not None else "" if weight.scheme is None else "q"]

    @property
    def row_nbytes(self) -> int:
        return self.entry.nbytes // self.weight.shape[0]

    def offset_of(self, row: int) -> int:
        """Where `row` of the table begins in the file."""
        return self.unit_offset + self.entry.offset + (row - self.first) * self.row_nbytes


class _Table:
    """Where the rows of the one weight of `block` lie, and what they are."""

    def __init__(self, store: Store, block: BlockInfo) -> None:
        self.file, layout = block.file, store.layout(block)
        if layout.compressed:
            raise StoreError(
                f"{store.file_path(block)}: {block.name} is compressed, expected rows that can be read one by one; "
                "convert the model again"
            )
        stored = [(weight, unit.offset) for unit in layout.units for weight in unit.weights.values()]
        firsts = list(itertools.accumulate((weight.shape[0] for weight, _ in stored), initial=0))
        spans = zip(firsts, firsts[1:], stored, strict=False)
        self.ranges = [_Range(first, stop, weight, offset) for first, stop, (weight, offset) in spans]
        self._stops = firsts[1:]
        self.layout, self.row_nbytes = self.ranges[0].weight.rows, self.ranges[0].row_nbytes
        self._scheme, self._dtype = self.ranges[0].weight.scheme, self.ranges[0].weight.dtype
        self.side: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Scales and zeros of each range, of a table that has them apart."""

    @property
    def has_side(self) -> bool:
        return self._scheme is not None and self.layout is None

    @property
    def count(self) -> int:
        return self._stops[-1]

    def offset_of(self, row: int) -> int:
        """Where `row` begins in the file."""
        return self.ranges[bisect.bisect_right(self._stops, row)].offset_of(row)

    def widen(
        self, packed: torch.Tensor, ids: Sequence[int], positions: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Of `packed`, the rows of `ids` as stored, those at `positions`, as numbers [n, width] of `dtype`."""
        packed = packed[positions]
        if self.layout is not None:
            found = self.layout.view(packed)
            if isinstance(found, torch.Tensor):
                return found.to(dtype)
            codes = QuantizedTensor(*(part.contiguous() for part in found.codes))
            return QuantizedWeight(codes, found.scheme).rows(0, len(packed), dtype)
        if self._scheme is None:
            return packed.view(self._dtype).to(dtype)
        assert self.side, "load_side comes first"
        rows = torch.tensor(ids)[positions]
        scales, zeros = (side.new_empty(len(rows), side.shape[1]) for side in self.side[0])
        for part, (scale, zero) in zip(self.ranges, self.side, strict=True):
            inside = (rows >= part.first) & (rows < part.stop)
            scales[inside], zeros[inside] = scale[rows[inside] - part.first], zero[rows[inside] - part.first]
        return QuantizedWeight(QuantizedTensor(packed, scales, zeros), self._scheme).rows(0, len(packed), dtype)


@dataclass(frozen=True)
class _Run:
    """Adjacent disk pages, bytes `offset` to `stop` of a file, that hold rows of `table`."""

    table: _Table
    offset: int
    stop: int
    rows: tuple[int, ...]
    out: memoryview
    """Where they go, one behind the other."""


class EmbeddingRows:
    """The tables of `store` that are read row by row, by block: its embedding, and what else it has. `staging` is lent
    for its lifetime."""

    def __init__(self, store: Store, reader: DiskReader, verifier: ChunkVerifier, staging: Slab) -> None:
        blocks = (block for block in store.manifest.blocks if block.role in ("embed", "table"))
        self._tables = {block.name: _Table(store, block) for block in blocks}
        self._reader, self._verifier, self._staging = reader, verifier, staging

    @staticmethod
    def side_nbytes(weight: Weight) -> int:
        """Bytes of the scales and zeros of the table `weight`, in all its ranges, that stay resident."""
        parts = ((part.partition(RANGE)[0], entry) for part, entry in weight.parts.items())
        return sum(round_up(entry.nbytes, PAGE) + PAGE for part, entry in parts if part in ("scale", "zero"))

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of their blocks: "embed" is the token embedding."""
        return tuple(self._tables)

    @property
    def vocab(self) -> int:
        return self._tables["embed"].count

    async def load_side(self, slab: Slab | None) -> None:
        """Read scales and zeros that are apart from their rows into `slab`, once."""
        table = self._tables["embed"]
        if slab is None or not table.has_side:
            return
        side, position = [], 0
        for part in table.ranges:
            views = []
            for entry in (part.weight.parts[name] for name in ("scale", "zero") if name in part.weight.parts):
                offset = part.unit_offset + entry.offset
                await self._verify(table.file, offset, offset + entry.nbytes)
                first, last = round_down(offset, PAGE), round_up(offset + entry.nbytes, PAGE)
                await self._reader.read_pages(table.file, first, slab.view[position : position + last - first])
                raw = slab.tensor()[position + offset - first :][: entry.nbytes]
                views.append(raw.view(entry.dtype).view(entry.shape))
                position += last - first
            scale = views[0]
            side.append((scale, views[1] if len(views) > 1 else scale.new_empty(len(scale), 0, dtype=torch.uint8)))
        table.side = side

    async def fetch(self, ids: Mapping[str, Sequence[int]]) -> dict[str, FetchedRows]:
        """Read the rows of `ids`, which are distinct and ascending, of each table. Raises ReadError or StoreError."""
        found: dict[str, FetchedRows] = {}
        runs: list[_Run] = []
        for name, wanted in ids.items():
            table = self._tables[name]
            packed = torch.empty(len(wanted), table.row_nbytes, dtype=torch.uint8)
            runs += _runs(table, wanted, packed)
            found[name] = FetchedRows(wanted, functools.partial(table.widen, packed, wanted))
        for batch in _batches(runs, self._staging.nbytes):
            if (table := batch[0].table).layout is None:
                for run in batch:
                    await self._verify(table.file, run.offset, run.stop)
            positions = list(itertools.accumulate((run.stop - run.offset for run in batch), initial=0))
            staged = [self._staging.view[start:stop] for start, stop in itertools.pairwise(positions)]
            parts = [(run.table.file, run.offset, memory) for run, memory in zip(batch, staged, strict=True)]
            await self._reader.read_parts(parts)
            await self._reader.call(functools.partial(self._copy_rows, batch, staged))
        return found

    def _copy_rows(self, batch: Sequence[_Run], staged: Sequence[memoryview]) -> None:
        """Test the rows that have checksums of their own, and put all rows in their places."""
        for run, memory in zip(batch, staged, strict=True):
            table, done, nbytes = run.table, 0, run.table.row_nbytes
            for row in run.rows:
                start = table.offset_of(row) - run.offset
                record = memory[start : start + nbytes]
                if table.layout is not None:
                    self._verifier.check_row(table.file, table.layout, row, record)
                run.out[done : done + nbytes] = record
                done += nbytes

    async def _verify(self, file: FileInfo, start: int, stop: int) -> None:
        """Read the chunks around [start, stop) whole and test their checksums, where the policy wants them tested."""
        for number in file.chunks_around(start, stop):
            if self._verifier.wants(file, number):
                chunk = file.chunks[number]
                part = self._staging.view[: chunk.nbytes]
                await self._reader.read_pages(file, chunk.offset, part)
                await self._reader.call(functools.partial(self._verifier.check, file, number, part))


def _runs(table: _Table, ids: Sequence[int], packed: torch.Tensor) -> Iterator[_Run]:
    """The disk pages of rows `ids` (ascending), which go to `packed`; adjacent ones are joined up to the size of the
    staging memory."""
    out = memoryview(packed.numpy()).cast("B")  # type: ignore[arg-type]  # numpy's stubs lack the buffer protocol here
    nbytes, first, begin, end = table.row_nbytes, 0, 0, 0
    for number, row in enumerate(ids):
        start = table.offset_of(row)
        offset, stop = round_down(start, PAGE), round_up(start + nbytes, PAGE)
        if number > first and (offset > end or stop - begin > STAGING_NBYTES):
            yield _Run(table, begin, end, tuple(ids[first:number]), out[first * nbytes : number * nbytes])
            first = number
        begin, end = (offset, stop) if number == first else (begin, stop)
    yield _Run(table, begin, end, tuple(ids[first:]), out[first * nbytes :])


def _batches(runs: Sequence[_Run], room: int) -> Iterator[list[_Run]]:
    """Runs in groups that fit the staging memory together; those of tables that are tested by the chunk are apart, as
    their chunks pass through it first."""
    for _, alike in itertools.groupby(runs, key=lambda run: run.table.layout is None):
        batch: list[_Run] = []
        used = 0
        for run in alike:
            nbytes = run.stop - run.offset
            if batch and used + nbytes > room:
                yield batch
                batch, used = [], 0
            batch.append(run)
            used += nbytes
        yield batch
