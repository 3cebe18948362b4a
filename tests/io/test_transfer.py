"""The transfer loop: what it moves, what it tells of failures, and how a refusal is passed on to other files."""

import errno
import fcntl
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from tests.open_files import open_below
from tests.store.make import bytes_of, random_bytes
from tests.waiting import SECONDS
from tiered.errors import InterruptedRun
from tiered.io import PIECE_NBYTES, Arena, Faults, ReadMode
from tiered.io.transfer import ByteCounter, Ladder, TransferError, describe
from tiered.store import PAGE

WHOLE: Final = 2 * PIECE_NBYTES + 3 * PAGE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "file"
    made.write_bytes(bytes_of(random_bytes(WHOLE, 1)))
    return made


@pytest.fixture
def memory() -> Iterator[memoryview]:
    with Arena(WHOLE + PAGE) as arena:
        yield arena.borrow(WHOLE + PAGE, "test").view


def wanted() -> None:
    """A check that lets the transfer go on."""


def refusing(*modes: ReadMode) -> Faults:
    """`os.preadv` that refuses these rungs."""

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        direct = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        mode = ReadMode.DIRECT if direct else ReadMode.DONTCACHE if flags else ReadMode.BUFFERED
        if mode in modes:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.preadv(fd, buffers, offset)

    return preadv


def test_fewer_bytes_come_back_only_where_the_file_ends(path: Path, memory: memoryview) -> None:
    file, moved = Ladder(ReadMode.BUFFERED).open(path), ByteCounter()
    assert file.transfer(os.preadv, PAGE, memory, wanted, moved) == moved.nbytes == WHOLE - PAGE
    assert bytes(memory[: WHOLE - PAGE]) == path.read_bytes()[PAGE:]
    file.close()


def test_a_failure_tells_which_bytes_were_asked_for(path: Path, memory: memoryview) -> None:
    def failing(fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        if offset >= 2 * PIECE_NBYTES:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(fd, buffers, offset, flags)

    file, moved = Ladder(ReadMode.BUFFERED).open(path), ByteCounter()
    with pytest.raises(TransferError) as caught:
        file.transfer(failing, 0, memory[:WHOLE], wanted, moved)
    assert (caught.value.offset, caught.value.nbytes) == (2 * PIECE_NBYTES, 3 * PAGE)
    assert describe(caught.value) == "Input/output error (EIO)"
    assert moved.nbytes == 2 * PIECE_NBYTES
    file.close()


def test_nothing_is_asked_for_once_the_check_raises(path: Path, memory: memoryview) -> None:
    calls: list[int] = []

    def check() -> None:
        if calls:
            raise InterruptedRun("no longer wanted")

    def counting(fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        calls.append(offset)
        return os.preadv(fd, buffers, offset, flags)

    file = Ladder(ReadMode.BUFFERED).open(path)
    with pytest.raises(InterruptedRun):
        file.transfer(counting, 0, memory[:WHOLE], check, ByteCounter())
    assert calls == [0]
    file.close()


def test_files_opened_before_and_after_a_refusal_are_all_read(path: Path, memory: memoryview) -> None:
    told: list[tuple[ReadMode, ReadMode]] = []
    ladder = Ladder(ReadMode.DIRECT, lambda refused, error, used: told.append((refused, used)))
    call, moved = refusing(ReadMode.DIRECT), ByteCounter()
    files = [ladder.open(path), ladder.open(path)]
    for file in files:
        assert file.transfer(call, 0, memory[:WHOLE], wanted, moved) == WHOLE
    files.append(ladder.open(path))
    assert {file.mode for file in files} == {ladder.mode} == {ReadMode.DONTCACHE}
    # Each file was refused by itself, the rung only once.
    assert told == [(ReadMode.DIRECT, ReadMode.DONTCACHE)]
    assert ladder.refused == ("O_DIRECT: Invalid argument",)
    for file in files:
        file.close()


def test_threads_that_are_refused_together_step_down_one_rung(path: Path, memory: memoryview) -> None:
    together, refuse = threading.Barrier(2), refusing(ReadMode.DIRECT)

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        try:
            return refuse(fd, buffers, offset, flags)
        except OSError:
            together.wait(SECONDS)  # both have been refused before either of them steps down
            raise

    ladder = Ladder(ReadMode.DIRECT)
    file = ladder.open(path)
    with ThreadPoolExecutor(2) as pool:
        halves = [(0, memory[:PIECE_NBYTES]), (PIECE_NBYTES, memory[PIECE_NBYTES : 2 * PIECE_NBYTES])]
        moves = [pool.submit(file.transfer, preadv, at, part, wanted, ByteCounter()) for at, part in halves]
        assert [move.result(SECONDS) for move in moves] == [PIECE_NBYTES, PIECE_NBYTES]
    assert file.mode is ladder.mode is ReadMode.DONTCACHE
    assert bytes(memory[: 2 * PIECE_NBYTES]) == path.read_bytes()[: 2 * PIECE_NBYTES]
    file.close()


def test_a_file_can_be_closed_twice(path: Path) -> None:
    file = Ladder().open(path)
    assert open_below(path.parent) == [str(path.resolve())]
    file.close()
    file.close()
    assert open_below(path.parent) == []
