"""Embedding rows: those of the table, whatever they are stored as and wherever they lie."""

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.quick import examples
from tests.store.make import bytes_of, random_quantized, write_block, write_manifest, write_store
from tests.waiting import SECONDS
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import ReadError, StoreError
from tiered.io import Arena, ChunkVerifier, DiskReader, Faults, VerifyPolicy
from tiered.io.scrub import scrub
from tiered.quant import GroupScheme, QuantizedTensor, dequantize
from tiered.store import CHUNK_NBYTES, PAGE, BlockInfo, BlockWriter, RowLayout, Store
from tiered.stream import EmbeddingRows
from tiered.stream.embedding import STAGING_NBYTES
from tiered.trace import Tracer

DOCS = Path(__file__).parents[1] / "data/models/opt-docs-8m"
INT8 = GroupScheme(8)
FAST = examples(25, HealthCheck.function_scoped_fixture)


@dataclass(frozen=True)
class Table:
    store: Store
    rows: torch.Tensor  # [vocab, width], what the store stands for, in float32


@pytest.fixture(
    scope="module",
    params=[
        *("int8", "int8, three ranges", "bfloat16", "bfloat16, three ranges", "float16, two chunks"),
        *("int8 records", "int4 records", "bfloat16 records"),
    ],
)
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Rows that straddle pages, and chunks."""
    root = tmp_path_factory.mktemp("embedding") / "x"
    path = "blocks/embed.safetensors"
    if "records" in request.param:
        return in_records(root, path, GroupScheme(int(request.param[3])) if request.param[:3] == "int" else None)
    if "ranges" in request.param:
        return in_ranges(root, path, INT8 if "int8" in request.param else None)
    if request.param == "int8":
        codes = random_quantized(700, 320, INT8)
        file = write_block(root, path, {}, {"embed.weight": (INT8, codes)})
        return Table(write_store(root, [100, 100], file), dequantize(*codes, INT8))
    shape, dtype = ((500, 333), torch.bfloat16) if request.param == "bfloat16" else ((4100, 2099), torch.float16)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    file = write_block(root, path, {"embed.weight": rows})
    return Table(write_store(root, [100, 100], file), rows.float())


def in_ranges(root: Path, path: str, scheme: GroupScheme | None) -> Table:
    """A table of 700 rows in three ranges of them, the first two in one unit."""
    codes = random_quantized(700, 320, INT8)
    rows = dequantize(*codes, INT8) if scheme else dequantize(*codes, INT8).bfloat16()
    parts = codes._asdict() if scheme else {"": rows}
    with BlockWriter(root / path, root, [f"embed.weight#{number}" for number in range(3)]) as writer:
        for number, (start, stop) in enumerate([(0, 128), (128, 512), (512, 700)]):
            if number != 1:
                writer.start_unit(f"unit-{number}")
            for part, tensor in parts.items():
                name, piece = f"embed.weight#{number}" + (f".{part}" if part else ""), tensor[start:stop]
                writer.add(name, piece.dtype, piece.shape, [bytes_of(piece)])
        writer.add_weight("embed.weight", (700, 320), scheme, 3)
        file = writer.finish()
    return Table(write_store(root, [100, 100], file), rows.float())


def in_records(root: Path, path: str, scheme: GroupScheme | None) -> Table:
    """A table of 700 rows, each with its own scales, zeros and checksum."""
    codes = random_quantized(700, 320, scheme or INT8)
    rows = dequantize(*codes, scheme or INT8)
    rows = rows if scheme else rows.bfloat16()
    layout = RowLayout(320, scheme, torch.uint8 if scheme else torch.bfloat16)
    with BlockWriter(root / path, root, ["embed.weight"]) as writer:
        writer.start_unit("embed")
        # Packed in two goes: a row's checksum depends on its number.
        packed = [
            layout.pack(codes if scheme else rows, 0)[:300],
            layout.pack(_from(codes if scheme else rows, 300), 300),
        ]
        writer.add("embed.weight.rows", torch.uint8, (700, layout.nbytes), map(bytes_of, packed))
        writer.add_weight("embed.weight", (700, 320), scheme, rows=layout)
        file = writer.finish()
    return Table(write_store(root, [100, 100], file), rows.float())


def _from(rows: torch.Tensor | QuantizedTensor, first: int) -> torch.Tensor | QuantizedTensor:
    return rows[first:] if isinstance(rows, torch.Tensor) else QuantizedTensor(*(part[first:] for part in rows))


@dataclass
class Setup:
    embedding: EmbeddingRows
    reader: DiskReader
    trace: Tracer

    async def rows(self, ids: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        fetched = await asyncio.wait_for(self.embedding.fetch({"embed": ids}), SECONDS)
        rows, index = fetched["embed"].of(torch.tensor(ids), dtype)
        return rows[index]


@asynccontextmanager
async def opened(
    store: Store, policy: VerifyPolicy = VerifyPolicy.FIRST, preadv: Faults = os.preadv, load_side: bool = True
) -> AsyncIterator[Setup]:
    trace = Tracer()
    (weight,) = store.layout(store.blocks["embed"]).weights.values()
    side_nbytes = EmbeddingRows.side_nbytes(weight)
    with Arena(STAGING_NBYTES + side_nbytes + 2 * PAGE) as arena:
        verifier = ChunkVerifier(policy, trace)
        with DiskReader(store.path, verifier, trace, 4, preadv=preadv) as reader:
            embedding = EmbeddingRows(store, reader, verifier, arena.borrow(STAGING_NBYTES, "staging"))
            if load_side:
                await embedding.load_side(arena.borrow(side_nbytes, "side") if side_nbytes else None)
            yield Setup(embedding, reader, trace)


def rows_of(table: Table, ids: Sequence[int], policy: VerifyPolicy = VerifyPolicy.FIRST) -> torch.Tensor:
    async def scenario() -> torch.Tensor:
        async with opened(table.store, policy) as setup:
            return await setup.rows(ids)

    return asyncio.run(scenario())


@FAST
@given(data=st.data(), policy=st.sampled_from(VerifyPolicy))
def test_any_rows_are_those_of_the_table(table: Table, data: st.DataObject, policy: VerifyPolicy) -> None:
    vocab = table.rows.shape[0]
    ids = sorted(data.draw(st.sets(st.integers(0, vocab - 1), min_size=1, max_size=40)))
    assert torch.equal(rows_of(table, ids, policy), table.rows[ids])


def test_the_first_and_the_last_row_are_whole(table: Table) -> None:
    ids = [0, table.rows.shape[0] - 1]
    assert torch.equal(rows_of(table, ids), table.rows[ids])


def test_all_rows_pass_through_the_staging_memory(table: Table) -> None:
    ids = range(table.rows.shape[0])
    assert torch.equal(rows_of(table, ids), table.rows)


def test_rows_far_apart_pass_through_the_staging_memory(table: Table) -> None:
    ids = range(0, table.rows.shape[0], 3)
    assert torch.equal(rows_of(table, ids), table.rows[::3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_in_the_dtype_asked_for(table: Table, dtype: torch.dtype) -> None:
    async def scenario() -> None:
        async with opened(table.store) as setup:
            found = await setup.rows([3, 5], dtype)
            assert found.dtype == dtype
            assert torch.equal(found, table.rows[[3, 5]].to(dtype))
            assert setup.embedding.vocab == table.rows.shape[0]

    asyncio.run(scenario())


def test_fetching_again_and_again_gives_the_same(table: Table) -> None:
    async def scenario() -> None:
        async with opened(table.store) as setup:
            for ids in ([1, 2, 9], [0], [1, 2, 9]):
                assert torch.equal(await setup.rows(ids), table.rows[ids])

    asyncio.run(scenario())


@pytest.mark.parametrize("quant", ["int4", "int8", "none"])
def test_a_converted_model_s_rows_are_its_embedding(quant: str, tmp_path: Path) -> None:
    convert_checkpoint(DOCS, tmp_path / "x", ConvertOptions(quant=quant))
    store = Store.open(tmp_path / "x")
    (weight,) = (t for name, t in load_file(DOCS / "model.safetensors").items() if name.endswith("embed_tokens.weight"))
    ids = [0, 1, 2, 100, 101, weight.shape[0] - 1]
    found = rows_of(Table(store, weight.float()), ids)
    error = (found - weight[ids].float()).abs().max()
    assert error == 0 if quant == "none" else error < weight.abs().max() / 100


def test_neighbours_are_read_together_and_nothing_else(table: Table) -> None:
    (weight,) = table.store.layout(table.store.blocks["embed"]).weights.values()
    codes = [e.nbytes for part, e in weight.parts.items() if part.partition("#")[0] in ("", "q", "rows")]
    row = sum(codes) // weight.shape[0]
    ids = list(range(10, 10 + 3 * PAGE // row))

    async def scenario() -> None:
        async with opened(table.store, VerifyPolicy.NEVER) as setup:
            before, spans = setup.reader.bytes_read, setup.trace.total("disk").spans
            await setup.rows(ids)
            assert setup.trace.total("disk").spans == spans + 1
            assert setup.reader.bytes_read - before <= len(ids) * row + 2 * PAGE

    asyncio.run(scenario())


@pytest.mark.parametrize(("policy", "times"), [("first", 1), ("always", 3), ("never", 0)])
def test_the_chunks_of_rows_are_tested_as_the_policy_says(table: Table, policy: str, times: int) -> None:
    async def scenario() -> None:
        async with opened(table.store, VerifyPolicy(policy)) as setup:
            before = setup.trace.total("verify").spans
            loaded = table.store.blocks["embed"].file.nbytes <= CHUNK_NBYTES and before > 0
            for _ in range(3):
                await setup.rows([1])  # of the first unit
            # Rows with checksums of their own are tested without their chunks.
            in_records = next(iter(table.store.layout(table.store.blocks["embed"]).weights.values())).rows is not None
            expected = 0 if in_records or (loaded and policy == "first") else times
            assert setup.trace.total("verify").spans - before == expected

    asyncio.run(scenario())


def damaged(tmp_path: Path) -> Store:
    rows = torch.randn(600, 64, generator=torch.Generator().manual_seed(5))
    file = write_block(tmp_path / "x", "blocks/embed.safetensors", {"embed.weight": rows})
    store = write_store(tmp_path / "x", [100, 100], file)
    with (store.path / file.path).open("r+b") as opened_file:
        opened_file.seek(file.nbytes - 5000)
        opened_file.write(b"flipped")
    return store


def test_a_damaged_table_is_found_before_any_row_is_used(tmp_path: Path) -> None:
    store = damaged(tmp_path)

    async def scenario() -> None:
        async with opened(store) as setup:
            for _ in range(2):
                with pytest.raises(StoreError, match=r"embed\.safetensors: chunk 1 .* is corrupt"):
                    await setup.rows([0])

    asyncio.run(scenario())


def test_a_damaged_record_is_named_and_others_are_used(tmp_path: Path) -> None:
    table = in_records(tmp_path / "x", "blocks/embed.safetensors", INT8)
    file = table.store.blocks["embed"].file
    record = RowLayout(320, INT8).nbytes
    with (table.store.path / file.path).open("r+b") as opened_file:
        opened_file.seek(file.units[0].offset + 5 * record)
        fifth = opened_file.read(record)
        opened_file.seek(file.units[0].offset + 9 * record)
        opened_file.write(fifth)  # a whole row, of another place
        opened_file.seek(file.units[0].offset + 11 * record + 100)
        opened_file.write(b"flipped")

    async def scenario() -> None:
        async with opened(table.store) as setup:
            before = setup.reader.bytes_read
            for row in (9, 11):
                with pytest.raises(StoreError, match=rf"embed\.safetensors: row {row} is corrupt.*tiered verify"):
                    await setup.rows([4, row])
            ids = [4, 5, 10, 12]
            assert torch.equal(await setup.rows(ids), table.rows[ids])
            assert setup.reader.bytes_read - before <= 3 * 2 * PAGE
        async with opened(table.store, VerifyPolicy.NEVER) as setup:
            assert torch.equal(await setup.rows([9]), table.rows[[5]])

    asyncio.run(scenario())
    assert {finding.chunk for finding in scrub(table.store.path, table.store.manifest).corrupt} == {1}


def test_rows_of_several_tables_come_together(tmp_path: Path) -> None:
    embed = write_block(tmp_path / "x", "blocks/embed.safetensors", {"embed.weight": torch.randn(80, 96)})
    extra = in_records(tmp_path / "other", "blocks/table-000.safetensors", INT8)
    folder = tmp_path / "x/blocks"
    (folder / "table-000.safetensors").write_bytes((extra.store.path / "blocks/table-000.safetensors").read_bytes())
    plain = write_store(tmp_path / "x", [100, 100], embed)
    table = BlockInfo("table-000", "table", extra.store.blocks["embed"].file, "embed.")
    store = write_manifest(tmp_path / "x", [*plain.manifest.blocks, table])

    async def scenario() -> None:
        async with opened(store, VerifyPolicy.NEVER) as setup:
            assert setup.embedding.tables == ("embed", "table-000")
            ids = [3, 5, 79]
            fetched = await setup.embedding.fetch({"embed": ids, "table-000": [*ids, 699]})
            rows, index = fetched["table-000"].of(torch.tensor([[5, 699, 5]]), torch.float32)
            assert torch.equal(rows[index], extra.rows[torch.tensor([[5, 699, 5]])])
            rows, index = fetched["embed"].of(torch.tensor([79, 3]), torch.float32)
            assert rows[index].shape == (2, 96)

    asyncio.run(scenario())


def test_a_failed_read_is_named_and_leaves_no_read_running(table: Table) -> None:
    lock, calls = threading.Lock(), [0, 0]
    fail = False

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        with lock:
            calls[0] += 1
            number = calls[0]
        try:
            if fail and number % 4 == 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return os.preadv(fd, buffers, offset, flags)
        finally:
            with lock:
                calls[1] += 1

    async def scenario() -> None:
        nonlocal fail
        async with opened(table.store, VerifyPolicy.NEVER, preadv) as setup:
            ids = range(0, table.rows.shape[0], 60)
            before, fail = asyncio.all_tasks(), True
            with pytest.raises(ReadError, match=r"embed\.safetensors: read of .*\(EIO\)"):
                await setup.rows(ids)
            assert calls[0] == calls[1] and asyncio.all_tasks() == before
            fail = False
            assert torch.equal(await setup.rows(ids), table.rows[list(ids)])

    asyncio.run(scenario())


def test_scales_are_needed_before_rows_are_widened(tmp_path: Path) -> None:
    codes = random_quantized(70, 64, INT8)
    file = write_block(tmp_path / "x", "blocks/embed.safetensors", {}, {"embed.weight": (INT8, codes)})
    store = write_store(tmp_path / "x", [100, 100], file)

    async def scenario() -> None:
        async with opened(store, load_side=False) as setup:
            with pytest.raises(AssertionError, match="load_side comes first"):
                await setup.rows([0])

    asyncio.run(scenario())
