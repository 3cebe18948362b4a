"""A profile measures everything once, reads what it is told to, and leaves nothing behind."""

import itertools
import os
from collections import namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.open_files import open_below
from tiered.bench import passes, profile, rates
from tiered.bench.gpu import measure_gpu
from tiered.bench.memory import measure_memory, measure_touch
from tiered.bench.passes import PassRates, Size, measure_passes
from tiered.bench.raw import RawBandwidth
from tiered.errors import ConfigError, DiskFullError
from tiered.host import Host
from tiered.io.filesystem import mount_of
from tiered.plan import ComputeRate
from tiered.plan.hardware import ROWS, Hardware
from tiered.plan.kv import KVShape
from tiered.units import MIB

Usage = namedtuple("Usage", "free")


class Disk:
    """Stands for the measurements of a disk, and notes what is read."""

    def __init__(self) -> None:
        self.read: list[Path] = []
        self.sizes: list[int] = []
        self.found: list[bytes] = []

    def raw(self, files: Sequence[Path], memory: memoryview, direct: bool, seconds: float) -> RawBandwidth:
        self.read += files
        for path in files:
            with path.open("rb") as file:
                self.found.append(file.read(MIB))
        return RawBandwidth(2e9, 2.1e9, MIB, 4, 1)

    def random(self, files: Sequence[Path], memory: memoryview, nbytes: int, direct: bool) -> float:
        self.sizes.append(nbytes)
        return 1e9


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(profile, "measure_raw", disk.raw)
    monkeypatch.setattr(profile, "measure_random", disk.random)
    # What is written is small, and so is what counts as much.
    monkeypatch.setattr(profile, "_READ_NBYTES", 16 * MIB)
    monkeypatch.setattr(profile, "_WRITE_NBYTES", 8 * MIB)
    monkeypatch.setattr(profile, "_LEAST_NBYTES", 4 * MIB)
    monkeypatch.setattr(profile, "_MEMORY_NBYTES", 32 * MIB)
    # And is written however slow the disk is.
    monkeypatch.setattr(profile, "_WRITE_SECONDS", 1000.0)
    yield disk


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(kernels: Any, scheme: Any, in_: int, dtype: Any, counts: Any = (), nbytes: int = 0) -> ComputeRate:
        return ComputeRate(tuple(counts), tuple(1e-10 * rows for rows in counts))

    monkeypatch.setattr(profile, "measure_compute", compute)
    monkeypatch.setattr(profile, "measure_attention", lambda *how: 1e-6 if how[3] == 16 else 2e-6)
    monkeypatch.setattr(profile, "measure_quantizing", lambda *_: 1e-5)
    monkeypatch.setattr(profile, "measure_prefill_attention", lambda *_: 1e11)
    monkeypatch.setattr(profile, "measure_memory", lambda *_: 2e10)
    touches = itertools.cycle((1e8, 3e9, 1e9))
    monkeypatch.setattr(profile, "measure_touch", lambda: next(touches))
    monkeypatch.setattr(profile, "measure_passes", lambda *_: PassRates(1e-3, None, 1e-10, 0.9, 1e9))


def skip_in_memory(folder: Path) -> None:
    if mount_of(folder).kind in ("tmpfs", "ramfs"):
        pytest.skip(f"{folder}: lies in memory")


def test_a_folder_is_measured_with_a_file_that_nobody_sees(disk: Disk, processor: None, tmp_path: Path) -> None:
    skip_in_memory(tmp_path)
    seen: list[str] = []
    names: list[list[Path]] = []

    def say(text: str) -> None:
        seen.append(text)
        names.append(list(tmp_path.iterdir()))

    found = profile.measure_hardware(tmp_path, [], 2, say)
    assert not any(names) and not list(tmp_path.iterdir())
    assert any("temporary file" in text for text in seen) and any("random" in text for text in seen)
    assert len(disk.read) == 1 and len(disk.found[0]) == MIB and len(set(disk.found[0])) > 200  # nothing to compress
    assert disk.sizes == [size for size in profile.RANDOM_NBYTES if size <= 16 * MIB]
    assert (found.disk.read, found.disk.random[0]) == (2e9, (1_000_000, 1e9)) and found.disk.write > 0
    assert (found.disk.streamed, found.disk.kept, found.cpu.operation_seconds) == (0.9, 1e9, 1e-3)
    assert (found.cpu.element_seconds, found.cpu.reading_seconds, found.cpu.touch) == (None, 1e-10, 1e8)
    assert found.is_measured and "temporary file of 16 MiB" in found.source and found.source.startswith("measured 2")
    token = 2 * 32 * 128 * 2
    assert found.cpu.cores == 2 and found.cpu.attention == pytest.approx(token / 1e-6)
    assert found.cpu.quantize == pytest.approx(token / 1e-5)
    # Whatever the model's heads are, each was measured with as many as share a key.
    made = found.machine("int4-g64", "fast", KVShape(8, 128, 128, "bfloat16"), 0, queries=4)
    assert [made.keeping(bits).attention_seconds for bits in (16, 8, 4)] == pytest.approx([1e-6, 2e-6, 2e-6])
    assert [made.keeping(bits).store_seconds for bits in (16, 8, 4)] == pytest.approx([0, 2.5e-6, 2.5e-6])
    assert {(one.scheme, one.mode) for one in found.cpu.linear} == {
        (scheme, mode) for scheme in ("int4-g64", "int8-g64", "none") for mode in ("invariant", "fast")
    }
    assert all(one.rate.rows == ROWS for one in found.cpu.linear)
    assert found.ram == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    tables = found.to_tables()
    assert tables["format"] == 2 and isinstance(found, Hardware)


@pytest.mark.parametrize("busy", [0.5, 0.0])
def test_other_programs_at_work_are_told_of(
    busy: float,
    disk: Disk,
    processor: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    skip_in_memory(tmp_path)
    cores = os.cpu_count() or 1
    # Wall clock, processor time of this process, and of all.
    times = iter([(100.0, 10.0, 1000.0), (140.0, 40.0, 1030.0 + busy * 40 * cores)])
    monkeypatch.setattr(profile._Others, "_now", lambda *_: next(times))
    found = profile.measure_hardware(tmp_path, [], 1)
    assert ("other programs took 50% of the processors meanwhile" in found.source) is bool(busy)
    assert profile.is_disturbed(found) is bool(busy)
    assert ("measure again when nothing else runs" in caplog.text) is bool(busy)


def test_a_stores_files_are_read_where_they_are_large_enough(disk: Disk, processor: None, tmp_path: Path) -> None:
    skip_in_memory(tmp_path)
    block = tmp_path / "layer"
    for nbytes, is_read in ((8 * MIB, True), (MIB, False)):
        disk.read.clear()
        block.write_bytes(bytes(nbytes))
        found = profile.measure_hardware(tmp_path, [block], 1)
        assert (disk.read == [block]) is is_read
        assert ("of a store" in found.source) is is_read
    assert list(tmp_path.iterdir()) == [block]


def test_too_little_room_is_told_with_what_is_free(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_in_memory(tmp_path)
    monkeypatch.setattr(profile, "free_nbytes", lambda _: 7 * MIB)
    with pytest.raises(ConfigError, match=r"7 MiB are free, expected at least 8 MiB for a .*, or name .* with --dir"):
        profile.measure_hardware(tmp_path, [], 1)
    assert disk.read == []


def test_half_of_what_is_free_is_taken(
    disk: Disk, processor: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_in_memory(tmp_path)
    monkeypatch.setattr(profile, "free_nbytes", lambda _: 18 * MIB)
    assert "temporary file of 8 MiB" in profile.measure_hardware(tmp_path, [], 1).source


def test_a_folder_that_is_none_or_lies_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gone: expected a store or a folder, found none; name one with --dir"):
        profile.measure_hardware(tmp_path / "gone", [], 1)
    shm = Path("/dev/shm")
    if not shm.is_dir() or mount_of(shm).kind != "tmpfs":
        pytest.skip("/dev/shm: no tmpfs here")
    with pytest.raises(ConfigError, match=r"/dev/shm: lies in memory \(tmpfs\), expected a disk; name a folder"):
        profile.measure_hardware(shm, [], 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_whatever_ends_it_nothing_is_left(
    error: BaseException, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_in_memory(tmp_path)

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(profile, "measure_write", fail)
    with pytest.raises((KeyboardInterrupt, DiskFullError)):
        profile.measure_hardware(tmp_path, [], 1)
    assert list(tmp_path.iterdir()) == []
    assert open_below(tmp_path) == []


def test_memory_is_read_and_touched_at_a_speed() -> None:
    assert 0 < measure_memory(2, 16 * MIB) < 1e13
    assert 0 < measure_touch(16 * MIB) < 1e12


@pytest.mark.inputs("tiered/bench", "tiered/plan")
def test_passes_over_a_small_model_are_measured_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_in_memory(tmp_path)
    monkeypatch.setattr(passes, "_ROUNDS", 1)
    monkeypatch.setattr(passes, "measure_disk", lambda *_: 1e12)
    monkeypatch.setattr(rates, "_SECONDS", 0.01)
    monkeypatch.setattr(rates, "_LOOKS", 1)
    # What a process takes varies by more than so small a model: more memory than asked for, so nothing streams.
    monkeypatch.setattr(passes, "_STREAMED", -100.0)
    found = measure_passes(tmp_path, 1, Size(64, 3), Size(256, 6))
    assert found is not None and found.kept is not None
    # Other programs may take the processor from a measurement, never from all.
    assert 1e-6 < max((found.operation_seconds or 0.0) * 30, (found.element_seconds or 0.0) * 64 * 20) < 1
    assert 0 < found.kept < 1e12
    assert list(tmp_path.iterdir()) == []


@pytest.mark.inputs("tiered/bench", "tiered/plan", "tiered/kernels")
def test_no_measured_pass_is_larger_than_memory_is_planned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_in_memory(tmp_path)
    monkeypatch.setattr(passes, "measure_disk", lambda *_: 1.0)  # so slow that many rows are wanted
    monkeypatch.setattr(passes, "_STREAMED", -100.0)
    monkeypatch.setattr(rates, "_LOOKS", 1)
    with Host(1) as host:
        wide = passes._Wide(passes._made(tmp_path, Size(256, 6)), host)
        wide.measure_resident()
        assert wide._tokens * passes._BATCH == 1024
        # In little memory a plan has room for a few tokens only.
        monkeypatch.setattr(passes, "MAX_BATCHED_TOKENS", 256)
        wide.measure_streamed()
        assert wide._tokens * passes._BATCH == 256


def test_without_a_gpu_there_are_no_figures_of_one() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert measure_gpu() is None
