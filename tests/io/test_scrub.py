"""Scrubbing: failed reads, refusals, short reads and memory, with the system call replaced."""

import errno
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.io import PIECE_NBYTES
from tiered.io.scrub import scrub
from tiered.store import PAGE, FileInfo, Manifest, Store, read_manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("scrub") / "tiny.tiered"
    convert_checkpoint("tiny-opt", store, ConvertOptions(synthetic=True))
    return store


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return read_manifest(folder)


def path_of(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


def test_every_byte_is_read_once(folder: Path, manifest: Manifest) -> None:
    report = scrub(folder, manifest, threads=3)
    assert report.findings == ()
    assert report.bytes_read == sum(file.nbytes for file in manifest.files)


def test_a_failed_read_is_named_and_the_rest_is_still_tested(folder: Path, manifest: Manifest) -> None:
    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        if "layer-001" in path_of(fd):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(fd, buffers, offset, flags)

    report = scrub(folder, manifest, threads=2, preadv=preadv)
    (damaged,) = (file for file in manifest.files if "layer-001" in file.path)
    assert [finding.chunk for finding in report.findings] == list(range(len(damaged.chunks)))
    assert str(report.findings[0]).startswith("blocks/layer-001.safetensors: chunk 0 (bytes 0 to ")
    assert all("Input/output error (EIO)" in str(finding) for finding in report.findings)
    assert not any(finding.is_corrupt for finding in report.findings) and report.corrupt == ()
    left = [file.nbytes for file in manifest.files if "layer-001" not in file.path]
    assert report.bytes_read == sum(left)


def test_a_refusal_while_reading_steps_down_the_ladder(folder: Path, manifest: Manifest) -> None:
    refused = threading.Event()

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        if not refused.is_set():
            refused.set()
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.preadv(fd, buffers, offset, 0)

    report = scrub(folder, manifest, threads=1, preadv=preadv)
    assert report.findings == ()
    assert report.read_mode != "O_DIRECT"
    assert "O_DIRECT: Invalid argument" in report.refused


def test_short_reads_go_on_from_a_page(folder: Path, manifest: Manifest) -> None:
    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        assert offset % PAGE == 0
        return min(os.preadv(fd, buffers, offset, flags), PAGE + 100)

    assert scrub(folder, manifest, threads=2, preadv=preadv).findings == ()


def test_memory_is_one_piece_per_thread(folder: Path, manifest: Manifest) -> None:
    addresses: set[int] = set()

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        (buffer,) = buffers
        assert buffer.nbytes <= PIECE_NBYTES
        addresses.add(np.frombuffer(buffer, np.uint8).ctypes.data // PIECE_NBYTES)
        return os.preadv(fd, buffers, offset, flags)

    scrub(folder, manifest, threads=2, preadv=preadv)
    assert 1 <= len(addresses) <= 3  # two pieces side by side, wherever they begin


def test_an_error_in_a_thread_reaches_the_caller(folder: Path, manifest: Manifest) -> None:
    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        scrub(folder, manifest, threads=2, preadv=preadv)


def test_no_thread_reads_any_more_when_an_interruption_is_raised(folder: Path, manifest: Manifest) -> None:
    reading, main = set[int](), threading.main_thread().ident
    assert main is not None

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        reading.add(threading.get_ident())
        for _ in range(3):
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.05)
        reading.discard(threading.get_ident())
        return os.preadv(fd, buffers, offset, flags)

    # The first interruption ends the wait; those that follow come while the threads are ended.
    with pytest.raises(KeyboardInterrupt):
        scrub(folder, manifest, threads=1, preadv=preadv)
    assert not reading


def test_a_file_that_shrinks_while_it_is_read_is_corrupt(folder: Path, manifest: Manifest) -> None:
    report = scrub(folder, manifest, threads=1, preadv=lambda fd, buffers, offset, flags: 0)
    assert len(report.corrupt) == sum(len(file.chunks) for file in manifest.files)
    assert "truncated" in str(report.corrupt[0])


def test_a_directory_in_place_of_a_block_is_named(folder: Path, manifest: Manifest) -> None:
    files = (*manifest.files, FileInfo("blocks", PAGE, ("0" * 16,)))
    odd = Manifest(
        manifest.source, manifest.architecture, manifest.quantization, files, manifest.blocks, manifest.tape, True
    )
    report = scrub(folder, odd, threads=1)
    assert {finding.file for finding in report.findings} == {"blocks"}


def test_a_config_that_cannot_be_read_is_one_finding_among_others(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = Path.stat

    def failing(self: Path, **options: bool) -> os.stat_result:
        if self.name == "config.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", failing)
    report = scrub(folder, manifest, threads=1)
    (finding,) = report.findings
    assert finding.file == "config.json" and not finding.is_corrupt and "Input/output error" in str(finding)
    assert report.bytes_read == sum(file.nbytes for file in manifest.files)


def test_progress_ends_at_the_total(folder: Path, manifest: Manifest) -> None:
    seen: list[int] = []
    report = scrub(folder, manifest, 2, seen.append)
    assert seen[-1] == report.bytes_read
    assert seen == sorted(seen)


def test_the_manifest_is_the_stores(folder: Path, manifest: Manifest) -> None:
    assert manifest == Store.open(folder).manifest
