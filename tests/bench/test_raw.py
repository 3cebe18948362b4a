"""Raw bandwidth: plain reads of whole files into the memory that was lent, and nowhere else."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.open_files import open_below
from tests.store.make import bytes_of, random_bytes
from tiered.bench import measure_raw
from tiered.bench.raw import BLOCK_SIZES, measure_random, measure_write
from tiered.errors import ReadError
from tiered.io import Arena, ReadMode, probe_mode
from tiered.store import PAGE
from tiered.units import MIB

SECONDS = 0.01
GUARD = 7


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """One large and one small file."""
    paths = [tmp_path / "large", tmp_path / "small"]
    for path, nbytes in zip(paths, (20 * MIB, 3 * PAGE), strict=True):
        path.write_bytes(bytes_of(random_bytes(nbytes, 1)))
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return paths


@pytest.fixture
def memory() -> Iterator[memoryview]:
    with Arena(34 * MIB) as arena:
        slab = arena.borrow(34 * MIB, "test")
        slab.tensor().fill_(GUARD)
        yield slab.view


def is_direct(path: Path) -> bool:
    return probe_mode(path).mode is ReadMode.DIRECT


class Spy:
    """Notes where reads go, as addresses within `memory`."""

    def __init__(self, memory: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
        self._base = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        self._lock = threading.Lock()
        self.reads: list[tuple[int, int, int]] = []
        real = os.preadv

        def preadv(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
            (buffer,) = buffers
            place = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() - self._base
            with self._lock:
                self.reads.append((place, buffer.nbytes, offset))
            return real(fd, buffers, offset, flags)

        monkeypatch.setattr("tiered.bench.raw.os.preadv", preadv)


def test_the_best_of_the_sweep_is_a_rate(files: list[Path], memory: memoryview) -> None:
    found = measure_raw(files, memory, is_direct(files[0]), SECONDS)
    assert found.bytes_per_second > 0
    assert found.block_nbytes in BLOCK_SIZES and found.threads in (2, 4, 8)
    assert found.bytes_read > found.block_nbytes


def test_the_figure_is_what_the_best_combination_sustains_and_not_its_luckiest_look(
    files: list[Path], memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[tuple[int, int, float]] = []

    def run(look: Any, lent: memoryview) -> tuple[float, int]:
        looks.append((look.nbytes, look.threads, look.seconds))
        lucky = (look.nbytes, look.threads) == (MIB, 4) and look.seconds == SECONDS
        return (2e9 if lucky else 1e9 if look.seconds == SECONDS else 1.5e9), 100

    monkeypatch.setattr("tiered.bench.raw._run", run)
    found = measure_raw(files, memory, is_direct(files[0]), SECONDS)
    assert (found.bytes_per_second, found.best_look) == (1.5e9, 2e9)
    assert (found.block_nbytes, found.threads) == (MIB, 4)
    assert looks[-1][:2] == (MIB, 4) and looks[-1][2] > 5 * SECONDS
    assert found.bytes_read == 100 * len(looks)


def test_reads_stay_within_the_memory_that_was_lent(files: list[Path], memory: memoryview) -> None:
    measure_raw(files, memory[PAGE : 8 * MIB + PAGE], is_direct(files[0]), SECONDS)
    assert bytes(memory[:PAGE]) == bytes([GUARD]) * PAGE
    assert memory[8 * MIB + PAGE :] == bytes([GUARD]) * (26 * MIB - PAGE)


def test_concurrent_reads_go_to_different_places(
    files: list[Path], memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct, spy = is_direct(files[0]), Spy(memory, monkeypatch)
    measure_raw(files, memory, direct, SECONDS)
    assert all(place % PAGE == 0 and place + nbytes <= len(memory) for place, nbytes, _ in spy.reads)
    assert len({place for place, _, _ in spy.reads}) > 8


def test_reads_land_all_over_the_memory(files: list[Path], memory: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
    direct, spy = is_direct(files[0]), Spy(memory, monkeypatch)
    measure_raw(files, memory[: 4 * MIB], direct, 0.1)
    touched = {page for place, nbytes, _ in spy.reads for page in range(place // PAGE, (place + nbytes) // PAGE)}
    assert touched == set(range(4 * MIB // PAGE))


def test_combinations_that_do_not_fit_the_memory_are_left_out(files: list[Path], memory: memoryview) -> None:
    found = measure_raw(files, memory[: 2 * MIB], is_direct(files[0]), SECONDS)
    assert found.bytes_per_second > 0
    assert found.block_nbytes * found.threads <= 2 * MIB


def test_memory_too_small_for_any_combination_measures_nothing(files: list[Path], memory: memoryview) -> None:
    found = measure_raw(files, memory[:PAGE], is_direct(files[0]), SECONDS)
    assert (found.bytes_per_second, found.best_look, found.bytes_read) == (0.0, 0.0, 0)


def test_a_single_tiny_file_is_read_again_and_again(files: list[Path], memory: memoryview) -> None:
    found = measure_raw(files[1:], memory[: 8 * MIB], is_direct(files[1]), SECONDS)
    assert found.bytes_per_second > 0
    assert found.block_nbytes == 3 * PAGE
    assert found.bytes_read % (3 * PAGE) == 0


def test_a_file_named_twice_is_opened_once(
    files: list[Path], memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    real = os.open

    def open_(path: Any, flags: int) -> int:
        opened.append(path)
        return real(path, flags)

    monkeypatch.setattr("tiered.bench.raw.os.open", open_)
    measure_raw([files[0], files[1], files[0]], memory, False, SECONDS)
    assert opened == files


def test_descriptors_are_closed_afterwards(files: list[Path], memory: memoryview) -> None:
    measure_raw(files, memory, False, SECONDS)
    with pytest.raises(ReadError):
        measure_raw([*files, files[0] / "gone"], memory, False, SECONDS)
    assert open_below(files[0].parent) == []


def test_a_missing_file_is_named(tmp_path: Path, memory: memoryview) -> None:
    with pytest.raises(ReadError, match="gone: cannot be read: No such file"):
        measure_raw([tmp_path / "gone"], memory, False, SECONDS)


def test_a_failing_read_names_the_file_it_was_of(
    files: list[Path], memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def preadv(fd: int, buffers: Sequence[Any], offset: int) -> int:
        if Path(f"/proc/self/fd/{fd}").readlink().name == "small":
            raise OSError(5, os.strerror(5))
        return real(fd, buffers, offset)

    monkeypatch.setattr("tiered.bench.raw.os.preadv", preadv)
    with pytest.raises(ReadError, match="small: cannot be read: Input/output error"):
        measure_raw(files, memory, False, 0.1)


def test_random_reads_cover_the_files_and_are_made_in_requests_of_a_mebibyte(
    files: list[Path], memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct, spy = is_direct(files[0]), Spy(memory, monkeypatch)
    # A clock that goes on by being looked at: however slow the machine is, some fifty reads come before the end.
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr("tiered.bench.raw.time", clock)
    assert measure_random(files, memory, 2_500_000, direct, threads=2, seconds=50) > 0
    size = 2_502_656
    offsets = [offset for place, nbytes, offset in spy.reads if place % size == 0]
    assert len(set(offsets)) > 3 and all(offset % PAGE == 0 and offset + size <= 20 * MIB for offset in offsets)
    assert {nbytes for _, nbytes, _ in spy.reads} == {MIB, size - 2 * MIB}


def test_random_reads_larger_than_any_file_are_refused(files: list[Path], memory: memoryview) -> None:
    with pytest.raises(ReadError, match=r"small: no file, or no memory, for reads of 1,003,520 bytes"):
        measure_random(files[1:], memory, 1_000_000, direct=False)


def test_a_file_is_written_once_from_its_beginning(tmp_path: Path, memory: memoryview) -> None:
    path = tmp_path / "written"
    with path.open("wb") as file:
        rate, written = measure_write(file.fileno(), 20 * MIB, memory, 1000.0)
    assert rate > 0 and written == path.stat().st_size == 20 * MIB
    assert set(path.read_bytes()) == {GUARD}


def test_a_slow_disk_is_written_for_so_long_only(tmp_path: Path, memory: memoryview) -> None:
    with (tmp_path / "written").open("wb") as file:
        _, written = measure_write(file.fileno(), 4 << 34, memory, 0.02)
    assert 0 < written == (tmp_path / "written").stat().st_size < 4 << 34


@pytest.mark.slow
def test_an_interruption_ends_the_reads_before_files_and_memory_are_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * MIB))
    before = threading.active_count() + 1

    def interrupt() -> None:
        while threading.active_count() <= before:  # until the first read has begun
            time.sleep(0.001)
        signal.pthread_kill(main, signal.SIGINT)

    main, other = threading.get_ident(), threading.Thread(target=interrupt)
    # A read that went on after its file was closed would fail in its thread, which fails this test.
    with pytest.raises(KeyboardInterrupt):
        other.start()
        measure_raw([path], memoryview(bytearray(16 * MIB)), direct=False, seconds=5.0)
    other.join()
    assert not [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
