"""The reader: whatever the system call does, memory holds the file's bytes or an error names what is wrong."""

import asyncio
import errno
import fcntl
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tests.open_files import open_below
from tests.quick import examples
from tests.store.make import bytes_of, random_bytes, write_block
from tests.waiting import SECONDS, turns_of_the_loop, until
from tiered.errors import InterruptedRun, ReadError, StoreError, TieredError
from tiered.io import (
    PIECE_NBYTES,
    Arena,
    ChunkBuffers,
    ChunkVerifier,
    DiskReader,
    Faults,
    ReadMode,
    VerifyPolicy,
    all_of,
)
from tiered.store import CHUNK_NBYTES, PAGE, FileInfo, hash_chunk
from tiered.store.block import read_layout
from tiered.trace import Tracer

Outcome = Callable[[int, int, int], int | None]
"""(how many calls went before, offset, bytes wanted) -> bytes to deliver at most; None: all. May raise."""

WHOLE = 2 * CHUNK_NBYTES + 3 * PIECE_NBYTES + 5 * PAGE


def one_region(root: Path, file: FileInfo) -> FileInfo:
    """The same file without units: its chunks are 16 MiB from the first byte."""
    content = (root / file.path).read_bytes()
    starts = range(0, len(content), CHUNK_NBYTES)
    return FileInfo(file.path, file.nbytes, tuple(hash_chunk(content[i : i + CHUNK_NBYTES]) for i in starts))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FileInfo]:
    """A file of three chunks, the last one short."""
    root = tmp_path_factory.mktemp("disk")
    return root, one_region(root, write_block(root, "blocks/large.safetensors", {"a": random_bytes(WHOLE, 1)}))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FileInfo]:
    root = tmp_path_factory.mktemp("disk")
    return root, write_block(root, "blocks/small.safetensors", {"a": random_bytes(PIECE_NBYTES + 5 * PAGE, 2)})


@pytest.fixture
def memory() -> Iterator[memoryview]:
    with Arena(WHOLE + 16 * PAGE) as arena:
        yield arena.borrow(WHOLE + 16 * PAGE, "test").view


class Calls:
    """A `preadv` that does what `outcome` says and remembers what it was asked."""

    def __init__(self, outcome: Outcome = lambda number, offset, wanted: None) -> None:
        self._outcome = outcome
        self._lock = threading.Lock()
        self.asked: list[tuple[int, int]] = []
        self.flags: list[int] = []

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        (buffer,) = buffers
        with self._lock:
            number = len(self.asked)
            self.asked.append((offset, buffer.nbytes))
            self.flags.append(flags)
        count = self._outcome(number, offset, buffer.nbytes)
        return os.preadv(fd, [buffer if count is None else buffer[:count]], offset, flags)


def failing(number: int, times: int = 1 << 30) -> Outcome:
    def outcome(call: int, offset: int, wanted: int) -> None:
        if call < times:
            raise OSError(number, os.strerror(number))

    return outcome


def reader_of(
    root: Path,
    preadv: Faults = os.preadv,
    policy: VerifyPolicy = VerifyPolicy.FIRST,
    mode: ReadMode | None = None,
    threads: int = 4,
    trace: Tracer | None = None,
) -> DiskReader:
    trace = trace or Tracer()
    return DiskReader(root, ChunkVerifier(policy, trace), trace, threads, mode, preadv)


async def read_chunk(reader: DiskReader, file: FileInfo, chunk: int, memory: memoryview) -> None:
    """Read a chunk to its place in the memory of the whole file."""
    await reader.read_chunk(file, chunk, memory[file.chunks[chunk].offset : file.chunks[chunk].stop])


async def read_whole(reader: DiskReader, file: FileInfo, memory: memoryview) -> None:
    await all_of(read_chunk(reader, file, chunk, memory) for chunk in range(len(file.chunks)))


def read(reader: DiskReader, file: FileInfo, memory: memoryview) -> None:
    asyncio.run(asyncio.wait_for(read_whole(reader, file, memory), SECONDS))


def assert_read(root: Path, file: FileInfo, memory: memoryview) -> None:
    assert bytes(memory[: file.nbytes]) == (root / file.path).read_bytes()


@pytest.mark.parametrize("mode", [None, *ReadMode])
def test_every_mode_reads_the_same_bytes(
    large: tuple[Path, FileInfo], memory: memoryview, mode: ReadMode | None
) -> None:
    root, file = large
    calls = Calls()
    with reader_of(root, calls, mode=mode) as reader:
        read(reader, file, memory)
        assert reader.bytes_read == file.nbytes
        assert mode is None or reader.mode is mode or reader.refused
    assert_read(root, file, memory)
    assert max(wanted for _, wanted in calls.asked) == PIECE_NBYTES


def test_reads_and_tests_show_in_the_trace(large: tuple[Path, FileInfo], memory: memoryview) -> None:
    root, file = large
    trace = Tracer()
    with reader_of(root, trace=trace) as reader:
        read(reader, file, memory)
    assert trace.total("disk").nbytes == trace.total("verify").nbytes == file.nbytes
    assert trace.total("verify").spans == 3


def test_what_has_been_read_of_a_chunk_counts_before_the_chunk_ends(
    large: tuple[Path, FileInfo], memory: memoryview
) -> None:
    root, file = large
    seen: list[int] = []
    readers: list[DiskReader] = []

    def outcome(number: int, offset: int, wanted: int) -> None:
        seen.append(readers[0].bytes_read)

    with reader_of(root, Calls(outcome), threads=1, mode=ReadMode.BUFFERED) as reader:
        readers.append(reader)
        asyncio.run(read_chunk(reader, file, 0, memory))
        assert reader.bytes_read == CHUNK_NBYTES
    assert seen == [i * PIECE_NBYTES for i in range(CHUNK_NBYTES // PIECE_NBYTES)]


def test_single_pages_are_read_without_checksums(small: tuple[Path, FileInfo], memory: memoryview) -> None:
    root, file = small
    damaged = replace(file, checksums=("0" * 16,))
    with reader_of(root, policy=VerifyPolicy.ALWAYS) as reader:
        asyncio.run(reader.read_pages(damaged, 2 * PAGE, memory[: 3 * PAGE]))
        assert reader.bytes_read == 3 * PAGE
    assert bytes(memory[: 3 * PAGE]) == (root / file.path).read_bytes()[2 * PAGE : 5 * PAGE]


@pytest.mark.parametrize("count", [1, 3, 4, 11])
def test_scattered_pages_each_land_where_they_belong(
    large: tuple[Path, FileInfo], memory: memoryview, count: int
) -> None:
    root, file = large
    places = [(7 * i % 40 * PAGE, i * 2 * PAGE) for i in range(count)]
    trace = Tracer()
    with reader_of(root, threads=4, trace=trace) as reader:
        asyncio.run(reader.read_parts([(file, offset, memory[at : at + PAGE]) for offset, at in places]))
        assert reader.bytes_read == count * PAGE
    whole = (root / file.path).read_bytes()
    for offset, at in places:
        assert bytes(memory[at : at + PAGE]) == whole[offset : offset + PAGE]


def test_nothing_to_read_scattered_is_nothing_read(large: tuple[Path, FileInfo]) -> None:
    root, _ = large
    with reader_of(root) as reader:
        asyncio.run(reader.read_parts([]))
        assert reader.bytes_read == 0


def test_an_error_among_scattered_pages_is_raised_when_none_is_read_any_more(
    large: tuple[Path, FileInfo], memory: memoryview
) -> None:
    root, file = large
    calls = Calls(lambda number, offset, wanted: failing(errno.EIO)(number, offset, wanted) if offset == 0 else None)
    with reader_of(root, calls, mode=ReadMode.BUFFERED, threads=2) as reader:
        parts = [(file, i * PAGE, memory[i * PAGE : (i + 1) * PAGE]) for i in range(6)]
        with pytest.raises(ReadError, match="at 0 failed"):
            asyncio.run(reader.read_parts(parts))
        # The other thread's share was read to its end.
        assert {offset for offset, _ in calls.asked} == {0, PAGE, 3 * PAGE, 5 * PAGE}


@pytest.mark.parametrize("most", [PAGE, 5 * PAGE, PAGE + 1, 3 * PAGE - 512, 100_000])
@pytest.mark.parametrize("mode", ReadMode)
def test_short_reads_are_continued(small: tuple[Path, FileInfo], memory: memoryview, most: int, mode: ReadMode) -> None:
    root, file = small
    with reader_of(root, Calls(lambda number, offset, wanted: most), mode=mode) as reader:
        read(reader, file, memory)
    assert_read(root, file, memory)


def test_short_direct_reads_go_on_from_a_page(small: tuple[Path, FileInfo], memory: memoryview) -> None:
    root, file = small
    calls = Calls(lambda number, offset, wanted: PAGE + 700)
    with reader_of(root, calls) as reader:
        read(reader, file, memory)
    assert all(offset % PAGE == 0 for offset, _ in calls.asked)


@examples(20, HealthCheck.function_scoped_fixture)
@given(counts=st.lists(st.integers(1, 3 * PIECE_NBYTES // 2), min_size=1, max_size=10))
def test_any_sequence_of_short_reads_delivers_the_file(
    small: tuple[Path, FileInfo], memory: memoryview, counts: list[int]
) -> None:
    root, file = small
    calls = Calls(lambda number, offset, wanted: counts[number] if number < len(counts) else None)
    with reader_of(root, calls) as reader:
        read(reader, file, memory)
    assert_read(root, file, memory)


def test_interrupted_reads_are_tried_again(small: tuple[Path, FileInfo], memory: memoryview) -> None:
    root, file = small
    with reader_of(root, Calls(failing(errno.EINTR, times=3))) as reader:
        read(reader, file, memory)
    assert_read(root, file, memory)


def test_a_failing_disk_is_named_with_file_offset_and_errno(large: tuple[Path, FileInfo], memory: memoryview) -> None:
    root, file = large

    def outcome(call: int, offset: int, wanted: int) -> None:
        if offset == CHUNK_NBYTES + PIECE_NBYTES:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with reader_of(root, Calls(outcome)) as reader, pytest.raises(ReadError) as caught:
        read(reader, file, memory)
    assert str(caught.value) == (
        f"{root}/blocks/large.safetensors: read of {PIECE_NBYTES:,} bytes at {CHUNK_NBYTES + PIECE_NBYTES:,} failed: "
        "Input/output error (EIO); check the disk and the kernel log"
    )
    assert caught.value.exit_code == 1


def test_a_failing_read_is_not_counted(small: tuple[Path, FileInfo], memory: memoryview) -> None:
    root, file = small
    with reader_of(root, Calls(failing(errno.EIO))) as reader:
        with pytest.raises(ReadError):
            read(reader, file, memory)
        assert reader.bytes_read == 0


@pytest.mark.parametrize("left", [0, PAGE, PAGE + 100, 5 * PAGE])
def test_a_file_truncated_while_in_use_is_told_with_where_it_ends(
    tmp_path: Path, memory: memoryview, left: int
) -> None:
    file = write_block(tmp_path, "x.safetensors", {"a": random_bytes(20 * PAGE, 3)})
    with reader_of(tmp_path, mode=ReadMode.DIRECT) as reader:
        read(reader, file, memory)  # the file is open now
        os.truncate(tmp_path / file.path, left)
        message = rf"x\.safetensors: ends at byte {left:,}, expected {file.nbytes:,}; it was truncated while in use"
        with pytest.raises(StoreError, match=message):
            read(reader, file, memory)


def test_a_file_removed_while_in_use_is_told(tmp_path: Path, memory: memoryview) -> None:
    file = write_block(tmp_path, "x.safetensors", {"a": random_bytes(PAGE, 3)})
    (tmp_path / file.path).unlink()
    with reader_of(tmp_path) as reader, pytest.raises(StoreError, match=r"x\.safetensors: missing; it was removed whi"):
        read(reader, file, memory)


def test_a_file_that_cannot_be_opened_is_a_failed_read(tmp_path: Path, memory: memoryview) -> None:
    (tmp_path / "x").symlink_to("x")
    file = FileInfo("x", PAGE, ("0" * 16,))
    with reader_of(tmp_path) as reader, pytest.raises(ReadError, match="x: cannot be opened: Too many levels"):
        read(reader, file, memory)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("refused", [(ReadMode.DIRECT,), (ReadMode.DIRECT, ReadMode.DONTCACHE)])
def test_a_refusal_while_reading_steps_down_and_still_delivers(
    large: tuple[Path, FileInfo], memory: memoryview, refused: tuple[ReadMode, ...], number: int
) -> None:
    root, file = large

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        direct = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        if direct or (flags and ReadMode.DONTCACHE in refused):
            raise OSError(number, os.strerror(number))
        return os.preadv(fd, buffers, offset)

    with reader_of(root, preadv, mode=ReadMode.DIRECT) as reader:
        read(reader, file, memory)
        assert reader.mode is refused[-1].next
        assert reader.refused == tuple(f"{mode.value}: {os.strerror(number)}" for mode in refused)
    assert_read(root, file, memory)


def test_a_refusal_on_the_last_rung_is_a_failed_read(small: tuple[Path, FileInfo], memory: memoryview) -> None:
    root, file = small
    with reader_of(root, Calls(failing(errno.EINVAL))) as reader:
        with pytest.raises(ReadError, match=r"small\.safetensors: .*\(EINVAL\)"):
            read(reader, file, memory)
        assert reader.mode is ReadMode.BUFFERED


@pytest.mark.parametrize("policy", [VerifyPolicy.FIRST, VerifyPolicy.ALWAYS])
def test_a_flipped_bit_is_found_and_its_chunk_named(tmp_path: Path, memory: memoryview, policy: VerifyPolicy) -> None:
    file = one_region(tmp_path, write_block(tmp_path, "x", {"a": random_bytes(CHUNK_NBYTES + 9 * PAGE, 3)}))
    with (tmp_path / file.path).open("r+b") as opened:
        opened.seek(CHUNK_NBYTES + PAGE)
        byte = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte[0] ^ 4]))
    with reader_of(tmp_path, policy=policy) as reader:
        asyncio.run(read_chunk(reader, file, 0, memory))
        with pytest.raises(StoreError, match=r"x: chunk 1 \(bytes 16,777,216 to .*is corrupt") as caught:
            asyncio.run(read_chunk(reader, file, 1, memory))
    assert caught.value.exit_code == 4


def test_never_means_that_nobody_looks(tmp_path: Path, memory: memoryview) -> None:
    file = write_block(tmp_path, "x.safetensors", {"a": random_bytes(9 * PAGE, 3)})
    with reader_of(tmp_path, policy=VerifyPolicy.NEVER) as reader:
        read(reader, replace(file, checksums=("0" * 16,)), memory)


@pytest.mark.parametrize(("policy", "tests"), [("first", 3), ("always", 9), ("never", 0)])
def test_chunks_are_tested_as_often_as_the_policy_says(
    large: tuple[Path, FileInfo], memory: memoryview, policy: str, tests: int
) -> None:
    root, file = large
    trace = Tracer()
    with reader_of(root, policy=VerifyPolicy(policy), trace=trace) as reader:
        for _ in range(3):
            read(reader, file, memory)
    assert trace.total("verify").spans == tests


class Slow(Calls):
    """Reads that wait until they are let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        super().__init__(self._wait)

    def _wait(self, number: int, offset: int, wanted: int) -> None:
        self.begun.set()
        assert self.go.wait(SECONDS)


def test_closing_drops_queued_reads_and_waits_for_running_ones(
    large: tuple[Path, FileInfo], memory: memoryview
) -> None:
    root, file = large
    slow = Slow()
    reader = reader_of(root, slow, threads=1)

    async def read_and_close() -> None:
        reads = asyncio.gather(*(read_chunk(reader, file, chunk, memory) for chunk in range(3)), return_exceptions=True)
        await asyncio.to_thread(slow.begun.wait)
        closing = asyncio.create_task(asyncio.to_thread(reader.close))
        await until(lambda: reader._threads._closing)
        await asyncio.sleep(0.05)
        assert not closing.done()  # one read runs
        slow.go.set()
        await asyncio.wait_for(closing, SECONDS)
        after = bytes(memory)
        results = await asyncio.wait_for(reads, SECONDS)
        assert all(isinstance(result, (InterruptedRun, asyncio.CancelledError)) for result in results)
        await asyncio.sleep(0.05)
        assert bytes(memory) == after

    asyncio.run(read_and_close())
    assert len(slow.asked) == 1
    assert not any(memory[PIECE_NBYTES:])


def test_a_cancelled_read_has_ended_when_its_caller_goes_on(large: tuple[Path, FileInfo], memory: memoryview) -> None:
    root, file = large
    slow = Slow()

    async def cancel() -> None:
        with reader_of(root, slow, threads=1) as reader:
            reads = [asyncio.create_task(read_chunk(reader, file, chunk, memory)) for chunk in range(2)]
            await asyncio.to_thread(slow.begun.wait)
            for task in reads:
                task.cancel()
            await turns_of_the_loop()
            await asyncio.sleep(0.05)
            assert not reads[0].done()  # a thread still writes into the memory
            slow.go.set()
            await asyncio.wait(reads, timeout=SECONDS)
            assert all(task.cancelled() for task in reads)
            # The memory is the caller's again, and the reader works on.
            memory[:PAGE] = bytes(PAGE)
            await asyncio.sleep(0.05)
            assert len(slow.asked) == 1 and not any(memory[:PAGE])
            await asyncio.wait_for(read_whole(reader, file, memory), SECONDS)

    asyncio.run(cancel())
    assert_read(root, file, memory)


def test_the_first_error_surfaces_when_no_read_runs_any_more(large: tuple[Path, FileInfo], memory: memoryview) -> None:
    root, file = large

    def outcome(number: int, offset: int, wanted: int) -> None:
        if offset == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        time.sleep(0.001)

    async def fail() -> int:
        with reader_of(root, calls, threads=3) as reader:
            with pytest.raises(ReadError):
                await read_whole(reader, file, memory)
            before = len(calls.asked)
            await asyncio.sleep(0.05)
            return before

    calls = Calls(outcome)
    assert asyncio.run(fail()) == len(calls.asked)


def test_descriptors_are_closed_with_the_reader(large: tuple[Path, FileInfo], memory: memoryview) -> None:
    root, file = large
    with reader_of(root, Calls(failing(errno.EINVAL, times=1)), mode=ReadMode.DIRECT) as reader:
        read(reader, file, memory)
    assert open_below(root) == []


def test_threads_end_with_the_reader(small: tuple[Path, FileInfo], memory: memoryview) -> None:
    root, file = small
    with reader_of(root) as reader:
        read(reader, file, memory)
    assert not any(thread.name.startswith("tiered-read") for thread in threading.enumerate())


def test_idle_time_is_time_without_reads(small: tuple[Path, FileInfo], memory: memoryview) -> None:
    root, file = small
    slow = Slow()
    with reader_of(root, slow) as reader:
        time.sleep(0.05)
        idle = reader.idle_seconds
        assert idle >= 0.05
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(read, reader, file, memory)
            slow.begun.wait()
            idle, start = reader.idle_seconds, time.perf_counter()
            time.sleep(0.05)
            assert reader.idle_seconds == idle
            slow.go.set()
            running.result()
        time.sleep(0.02)
        assert 0.02 <= reader.idle_seconds - idle <= time.perf_counter() - start - 0.05


def test_work_in_the_pool_raises_in_the_caller(tmp_path: Path) -> None:
    def work() -> None:
        raise StoreError("damaged frame")

    with reader_of(tmp_path) as reader, pytest.raises(TieredError, match="damaged frame"):
        asyncio.run(reader.call(work))


def test_memory_behind_the_file_is_left_alone(small: tuple[Path, FileInfo]) -> None:
    root, file = small
    memory = torch.full((file.nbytes + 4 * PAGE,), 7, dtype=torch.uint8)
    view = bytes_of(memory)
    start = -memory.data_ptr() % PAGE
    with reader_of(root) as reader:
        read(reader, file, view[start:])
    assert bool((memory[:start] == 7).all()) and bool((memory[start + file.nbytes :] == 7).all())


def test_a_chunk_of_a_compressed_unit_passes_through_few_buffers(tmp_path: Path) -> None:
    wide = torch.randn(3 * CHUNK_NBYTES // 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    bias = {"bias": torch.ones(5)}
    file = write_block(tmp_path, "x.safetensors", bias, compressed={"wide": wide}, frame_nbytes=1 << 18)
    (unit,) = read_layout(tmp_path, file).units
    memory = memoryview(mmap.mmap(-1, unit.memory_nbytes))

    async def read(reader: DiskReader, count: int) -> None:
        buffers = [memoryview(mmap.mmap(-1, CHUNK_NBYTES)) for _ in range(count)]
        await reader.read_unit(unit, memory, ChunkBuffers(buffers))

    for count in (1, 2):
        memory[:] = bytes(len(memory))
        with reader_of(tmp_path) as reader:
            asyncio.run(read(reader, count))
        found = torch.frombuffer(memory, dtype=torch.uint8)
        assert torch.equal(unit.weights["wide"].view(found), wide)  # type: ignore[arg-type]
        assert torch.equal(unit.weights["bias"].view(found), torch.ones(5))  # type: ignore[arg-type]
    with reader_of(tmp_path) as reader, pytest.raises(StoreError, match="expected only what is streamed"):
        asyncio.run(read(reader, 0))
    path = tmp_path / file.path
    content = bytearray(path.read_bytes())
    content[file.chunks[unit.chunks[1]].offset + 20] ^= 0xFF  # among the numbers of a frame
    path.write_bytes(content)
    for policy, told in ((VerifyPolicy.NEVER, "wide: a damaged frame"), (VerifyPolicy.FIRST, "corrupt")):
        with reader_of(tmp_path, policy=policy) as reader, pytest.raises(StoreError, match=told):
            asyncio.run(read(reader, 2))


@pytest.mark.parametrize("what", ["rows", "checksum"])
def test_neither_rows_nor_checksums_wait_behind_queued_reads(
    what: str, large: tuple[Path, FileInfo], memory: memoryview
) -> None:
    root, file = large
    trace, gate = Tracer(keep_spans=True), threading.Event()

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        if file.chunks[1].offset <= offset < file.chunks[2].offset:
            assert gate.wait(SECONDS)
        return os.preadv(fd, buffers, offset, flags)

    async def scenario() -> None:
        with reader_of(root, preadv, threads=1, trace=trace) as reader:
            chunks = [asyncio.create_task(read_chunk(reader, file, chunk, memory)) for chunk in range(3)]
            try:
                if what == "checksum":  # of the first chunk, while the second is being read and the third waits
                    await asyncio.wait_for(chunks[0], SECONDS)
                    assert trace.total("verify").spans == 1
                else:
                    page = memory[WHOLE + PAGE :][:PAGE]
                    await asyncio.wait_for(reader.read_parts([(file, 0, page)]), SECONDS)
                    assert page == (root / file.path).read_bytes()[:PAGE]
            finally:
                gate.set()
                await asyncio.gather(*chunks)

    asyncio.run(scenario())


def test_reads_of_the_stream_give_way_to_a_unit_that_is_asked_for(
    large: tuple[Path, FileInfo], small: tuple[Path, FileInfo], memory: memoryview
) -> None:
    _, file = large
    root, other = small
    unit = read_layout(root, other).units[0]
    (root / file.path).write_bytes((large[0] / file.path).read_bytes())
    streams, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    order: list[str] = []

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        order.append(name)
        if name == "large.safetensors":
            streams.set()
            go_on.wait(SECONDS)
        return os.preadv(fd, buffers, offset, flags)

    async def scenario() -> None:
        with DiskReader(root, ChunkVerifier(VerifyPolicy.ALWAYS, Tracer()), Tracer(), 2, preadv=preadv) as reader:
            stream = asyncio.create_task(read_chunk(reader, file, 0, memory[PAGE * 1024 :][:CHUNK_NBYTES]))
            await asyncio.to_thread(streams.wait, SECONDS)
            errors: list[Exception | None] = []

            def done(error: Exception | None) -> None:
                errors.append(error)
                ended.set()

            reader.begin_unit(unit, memory[: unit.nbytes], lambda: None, done)
            go_on.set()
            await asyncio.to_thread(ended.wait, SECONDS)
            assert errors == [None]
            assert bytes(memory[: unit.nbytes]) == (root / other.path).read_bytes()[unit.offset :][: unit.nbytes]
            await stream

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))
    # Of the stream only the system calls that ran already, one for each of the two threads.
    last = len(order) - order[::-1].index("small.safetensors")
    assert order[:last].count("large.safetensors") <= 2 < order.count("large.safetensors")
