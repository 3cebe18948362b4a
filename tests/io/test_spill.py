"""The spill file: what was written comes back, whatever the system calls do, and nothing is left on the disk."""

import asyncio
import errno
import fcntl
import os
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tests.open_files import open_below
from tests.quick import examples
from tests.store.make import bytes_of, random_bytes
from tests.waiting import SECONDS, turns_of_the_loop, until
from tiered.errors import ConfigError, DiskFullError, InterruptedRun, ReadError, TieredError
from tiered.io import PIECE_NBYTES, Arena, Faults, ReadMode, SpillFile, all_of
from tiered.io.filesystem import mount_of
from tiered.store import PAGE
from tiered.trace import Tracer

WHOLE: Final = 5 * PIECE_NBYTES + 3 * PAGE
Outcome = Callable[[int, int], int | None]
"""(how many calls went before, bytes wanted) -> bytes to transfer at most; None: all. May raise."""


@pytest.fixture
def memory() -> Iterator[memoryview]:
    with Arena(2 * WHOLE) as arena:
        yield arena.borrow(2 * WHOLE, "test").view


class Calls:
    """`preadv` or `pwritev` that does what `outcome` says and remembers what it was asked."""

    def __init__(self, call: Faults, outcome: Outcome = lambda number, wanted: None) -> None:
        self._call, self._outcome = call, outcome
        self._lock = threading.Lock()
        self.asked: list[tuple[int, int]] = []
        self.fd = -1

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        (buffer,) = buffers
        with self._lock:
            self.fd = fd
            number = len(self.asked)
            self.asked.append((offset, buffer.nbytes))
        count = self._outcome(number, buffer.nbytes)
        return self._call(fd, [buffer if count is None else buffer[:count]], offset, flags)


def failing(number: int, times: int = 1 << 30) -> Outcome:
    def outcome(call: int, wanted: int) -> None:
        if call < times:
            raise OSError(number, os.strerror(number))

    return outcome


def spill_of(folder: Path, nbytes: int = WHOLE, threads: int = 4, **more: Any) -> SpillFile:
    return SpillFile(folder, nbytes, threads, more.pop("trace", Tracer()), **more)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, SECONDS))


def fill(memory: memoryview, seed: int = 1) -> bytes:
    """Random bytes in the first half of `memory`, which is what is written; the second half is read into."""
    content = bytes(bytes_of(random_bytes(WHOLE, seed)))
    memory[:WHOLE] = content
    return content


async def there_and_back(spill: SpillFile, memory: memoryview) -> None:
    await spill.write(0, memory[:WHOLE])
    await spill.read(0, memory[WHOLE : 2 * WHOLE])


def assert_comes_back(spill: SpillFile, memory: memoryview) -> None:
    content = fill(memory)
    run(there_and_back(spill, memory))
    assert bytes(memory[WHOLE : 2 * WHOLE]) == content


def test_what_was_written_comes_back(tmp_path: Path, memory: memoryview) -> None:
    reads, writes = Calls(os.preadv), Calls(os.pwritev)
    with spill_of(tmp_path, preadv=reads, pwritev=writes) as spill:
        assert_comes_back(spill, memory)
        assert spill.bytes_read == spill.bytes_written == WHOLE
    for calls in (reads, writes):
        assert max(nbytes for _, nbytes in calls.asked) == PIECE_NBYTES
        assert sum(nbytes for _, nbytes in calls.asked) == WHOLE


@examples(20, HealthCheck.function_scoped_fixture)
@given(
    extents=st.lists(st.tuples(st.integers(0, 63), st.integers(1, 64), st.integers(0, 9)), min_size=1, max_size=12),
    threads=st.integers(1, 5),
)
def test_a_page_holds_what_was_written_last(
    tmp_path: Path, memory: memoryview, extents: list[tuple[int, int, int]], threads: int
) -> None:
    expected = bytearray(64 * PAGE)
    with spill_of(tmp_path, len(expected), threads) as spill:
        for first, pages, seed in extents:
            start, nbytes = first * PAGE, min(pages, 64 - first) * PAGE
            content = bytes(bytes_of(random_bytes(nbytes, seed)))
            memory[:nbytes] = content
            expected[start : start + nbytes] = content
            run(spill.write(start, memory[:nbytes]))
        run(spill.read(0, memory[: len(expected)]))
    assert bytes(memory[: len(expected)]) == expected


@pytest.mark.parametrize("verb", ["read", "write"])
def test_large_memory_is_shared_out_among_the_threads(tmp_path: Path, memory: memoryview, verb: str) -> None:
    # Of five pieces, two for each thread.
    together = threading.Barrier(3)

    def outcome(number: int, wanted: int) -> None:
        if number < 3:
            together.wait(SECONDS)

    with spill_of(tmp_path, preadv=Calls(os.preadv, outcome), pwritev=Calls(os.pwritev, outcome)) as spill:
        run(getattr(spill, verb)(0, memory[:WHOLE]))


@pytest.mark.parametrize("most", [PAGE, 5 * PAGE, PAGE + 512, 100_000])
def test_short_reads_and_writes_are_continued_from_a_page(tmp_path: Path, memory: memoryview, most: int) -> None:
    reads, writes = (Calls(call, lambda number, wanted: min(most, wanted)) for call in (os.preadv, os.pwritev))
    with spill_of(tmp_path, preadv=reads, pwritev=writes) as spill:
        assert_comes_back(spill, memory)
    assert all(offset % PAGE == 0 for offset, _ in reads.asked)


def test_interrupted_calls_are_tried_again(tmp_path: Path, memory: memoryview) -> None:
    reads, writes = (Calls(call, failing(errno.EINTR, times=3)) for call in (os.preadv, os.pwritev))
    with spill_of(tmp_path, preadv=reads, pwritev=writes) as spill:
        assert_comes_back(spill, memory)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("refused", [(ReadMode.DIRECT,), (ReadMode.DIRECT, ReadMode.DONTCACHE)])
def test_where_direct_access_is_refused_the_page_cache_serves(
    tmp_path: Path, memory: memoryview, refused: tuple[ReadMode, ...], number: int
) -> None:
    def refusing(call: Faults) -> Faults:
        def refuse(fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT or (flags and ReadMode.DONTCACHE in refused):
                raise OSError(number, os.strerror(number))
            return call(fd, buffers, offset, 0)

        return refuse

    with spill_of(tmp_path, preadv=refusing(os.preadv), pwritev=refusing(os.pwritev)) as spill:
        assert_comes_back(spill, memory)
        assert spill.mode is refused[-1].next


def test_a_failed_read_is_told_with_folder_offset_and_errno(tmp_path: Path, memory: memoryview) -> None:
    with spill_of(tmp_path, preadv=Calls(os.preadv, failing(errno.EIO))) as spill:
        with pytest.raises(ReadError) as caught:
            run(spill.read(3 * PAGE, memory[: 2 * PAGE]))
        assert spill.bytes_read == 0
    assert str(caught.value) == (
        f"{tmp_path}: read of 8,192 bytes at 12,288 of the KV cache's file failed: Input/output error (EIO); "
        "check the disk and the kernel log"
    )


def test_a_failed_write_is_told_with_folder_offset_and_errno(tmp_path: Path, memory: memoryview) -> None:
    message = re.escape(f"{tmp_path}: write of 4,096 bytes at 0 of the KV cache's file failed: Input/output error (EIO")
    with spill_of(tmp_path, pwritev=Calls(os.pwritev, failing(errno.EIO))) as spill:
        with pytest.raises(TieredError, match=message):
            run(spill.write(0, memory[:PAGE]))
        assert spill.bytes_written == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_meanwhile_is_told_with_what_to_do(
    tmp_path: Path, memory: memoryview, number: int
) -> None:
    with (
        spill_of(tmp_path, pwritev=Calls(os.pwritev, failing(number))) as spill,
        pytest.raises(DiskFullError, match=r"no space for the 10 MiB of the KV cache: .*; free some, .* --kv-dir"),
    ):
        run(spill.write(0, memory[:WHOLE]))


def test_a_file_that_ends_too_early_is_told(tmp_path: Path, memory: memoryview) -> None:
    calls = Calls(os.preadv)
    with spill_of(tmp_path, preadv=calls) as spill:
        run(spill.read(0, memory[:PAGE]))
        os.ftruncate(calls.fd, 2 * PAGE)
        with pytest.raises(ReadError, match=f"file ends at byte 8,192, expected {WHOLE:,}; something has truncated it"):
            run(spill.read(PAGE, memory[: 4 * PAGE]))


def test_the_file_has_no_name_and_its_space_is_taken_at_once(tmp_path: Path, memory: memoryview) -> None:
    calls = Calls(os.preadv)
    with spill_of(tmp_path, preadv=calls) as spill:
        assert list(tmp_path.iterdir()) == []
        run(spill.read(0, memory[:PAGE]))
        found = os.fstat(calls.fd)
        assert found.st_size == WHOLE and found.st_nlink == 0
        if mount_of(tmp_path).kind in ("ext4", "xfs", "btrfs"):
            assert found.st_blocks * 512 >= WHOLE


def test_where_files_need_a_name_it_is_taken_away_at_once(
    tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def open_(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", open_)
    with spill_of(tmp_path) as spill:
        assert list(tmp_path.iterdir()) == []
        assert_comes_back(spill, memory)


def test_where_space_cannot_be_taken_beforehand_the_file_is_sparse(tmp_path: Path, memory: memoryview) -> None:
    def allocate(fd: int, nbytes: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    with spill_of(tmp_path, allocate=allocate) as spill:
        assert_comes_back(spill, memory)


def test_space_that_cannot_be_had_is_told_before_anything_runs(tmp_path: Path) -> None:
    def allocate(fd: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DiskFullError, match="no space for the 10 MiB of the KV cache: No space left on device"):
        spill_of(tmp_path, allocate=allocate)
    assert open_below(tmp_path) == []


def test_a_cache_larger_than_the_free_space_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the KV cache needs 1024 TiB there, .* are free; .* --kv-dir, or use"):
        spill_of(tmp_path, 1 << 50)


def test_memory_is_no_disk(memory: memoryview) -> None:
    folder = Path("/dev/shm")
    if not folder.is_dir() or mount_of(folder).kind != "tmpfs":
        pytest.skip("/dev/shm: no tmpfs here")
    with pytest.raises(ConfigError, match="/dev/shm: expected a disk for the KV cache, found tmpfs, which is memory"):
        spill_of(folder)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing: expected a folder for the KV cache, found none; name one with --k"):
        spill_of(tmp_path / "missing")


def test_a_folder_that_takes_no_files_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_(*_: Any, **__: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_)
        with pytest.raises(ConfigError, match="no file for the KV cache can be made here: Read-only file system; name"):
            spill_of(tmp_path)


class Slow(Calls):
    """Reads that wait until they are let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        super().__init__(os.preadv, self._wait)

    def _wait(self, number: int, wanted: int) -> None:
        self.begun.set()
        assert self.go.wait(SECONDS)


@pytest.mark.parametrize("times", [1, 3])
def test_a_cancelled_read_has_ended_when_its_caller_goes_on(tmp_path: Path, memory: memoryview, times: int) -> None:
    slow = Slow()

    async def cancel() -> None:
        with spill_of(tmp_path, threads=2, preadv=slow) as spill:
            read = asyncio.create_task(spill.read(0, memory[:WHOLE]))
            await asyncio.to_thread(slow.begun.wait)
            for _ in range(times):
                read.cancel()
                await turns_of_the_loop()
            await asyncio.sleep(0.02)
            assert not read.done()  # threads still write into the memory
            slow.go.set()
            await asyncio.wait([read], timeout=SECONDS)
            assert read.cancelled()
            # The memory is the caller's again, and the file works on. Only a thread that had begun has read into it:
            # one or both, as the machine let them.
            asked = len(slow.asked)
            memory[:WHOLE] = b"x" * WHOLE
            await asyncio.sleep(0.02)
            assert len(slow.asked) == asked and bytes(memory[:WHOLE]) == b"x" * WHOLE
            await there_and_back(spill, memory)
            assert bytes(memory[WHOLE : 2 * WHOLE]) == b"x" * WHOLE

    run(cancel())


def test_closing_drops_what_is_queued_and_waits_for_what_runs(tmp_path: Path, memory: memoryview) -> None:
    slow = Slow()
    spill = spill_of(tmp_path, threads=1, preadv=slow)

    async def read_and_close() -> None:
        reads = asyncio.gather(*(spill.read(0, memory[:WHOLE]) for _ in range(3)), return_exceptions=True)
        await asyncio.to_thread(slow.begun.wait)
        closing = asyncio.create_task(asyncio.to_thread(spill.close))
        await until(lambda: spill._threads._closing)
        await asyncio.sleep(0.05)
        assert not closing.done()
        slow.go.set()
        await asyncio.wait_for(closing, SECONDS)
        results = await reads
        assert all(isinstance(result, (InterruptedRun, asyncio.CancelledError)) for result in results)

    run(read_and_close())
    assert len(slow.asked) == 1


def test_the_first_error_surfaces_when_nothing_runs_any_more(tmp_path: Path, memory: memoryview) -> None:
    def outcome(number: int, wanted: int) -> None:
        if number == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        time.sleep(0.002)

    async def fail() -> None:
        with spill_of(tmp_path, pwritev=calls) as spill:
            with pytest.raises(TieredError):
                await all_of([spill.write(0, memory[:WHOLE]), spill.write(0, memory[:WHOLE])])
            before = len(calls.asked)
            await asyncio.sleep(0.05)
            assert len(calls.asked) == before

    calls = Calls(os.pwritev, outcome)
    run(fail())


def test_reads_and_writes_show_in_the_trace(tmp_path: Path, memory: memoryview) -> None:
    trace = Tracer(keep_spans=True)
    with spill_of(tmp_path, trace=trace) as spill:
        assert_comes_back(spill, memory)
    assert trace.total("disk").nbytes == 2 * WHOLE
    assert {span.name for span in trace.spans} == {"KV read", "KV write"}


def test_idle_time_is_time_without_transfers(tmp_path: Path, memory: memoryview) -> None:
    slow = Slow()

    async def wait() -> None:
        with spill_of(tmp_path, preadv=slow) as spill:
            time.sleep(0.02)  # noqa: ASYNC251
            read = asyncio.create_task(spill.read(0, memory[:PAGE]))
            await asyncio.to_thread(slow.begun.wait)
            idle = spill.idle_seconds
            assert idle >= 0.02
            await asyncio.sleep(0.05)
            assert spill.idle_seconds == idle
            slow.go.set()
            await read
            await asyncio.sleep(0.02)
            assert spill.idle_seconds >= idle + 0.02

    run(wait())


def test_the_file_and_its_threads_go_with_it(tmp_path: Path, memory: memoryview) -> None:
    with spill_of(tmp_path) as spill:
        assert_comes_back(spill, memory)
    spill.close()
    assert open_below(tmp_path) == []
    assert not any(thread.name.startswith("tiered-spill") for thread in threading.enumerate())


def test_memory_behind_what_is_asked_for_is_left_alone(tmp_path: Path) -> None:
    memory = torch.full((8 * PAGE,), 7, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE
    with spill_of(tmp_path) as spill:
        run(spill.read(0, bytes_of(memory)[start : start + 3 * PAGE]))
    assert bool((memory[:start] == 7).all()) and bool((memory[start + 3 * PAGE :] == 7).all())
    assert not memory[start : start + 3 * PAGE].any()
