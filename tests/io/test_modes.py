"""The ladder of read modes: the best one whose read works, and why the better ones did not."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.open_files import open_below
from tiered.io import ReadMode, probe_mode
from tiered.io.modes import RWF_DONTCACHE, is_refusal
from tiered.store import PAGE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * PAGE))
    return path


def refuse(monkeypatch: pytest.MonkeyPatch, *modes: ReadMode, number: int = errno.EINVAL) -> None:
    """Make reads fail in these modes."""
    direct: set[int] = set()
    real_open, real_preadv, real_close = os.open, os.preadv, os.close

    def open_(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        fd = real_open(path, flags, *rest, **named)
        if flags & os.O_DIRECT:
            direct.add(fd)
        return fd

    def preadv(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if fd in direct:
            mode = ReadMode.DIRECT
        else:
            mode = ReadMode.DONTCACHE if flags & RWF_DONTCACHE else ReadMode.BUFFERED
        if mode in modes:
            raise OSError(number, os.strerror(number))
        return real_preadv(fd, buffers, offset, 0)

    def close(fd: int) -> None:
        direct.discard(fd)
        real_close(fd)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "close", close)


def test_the_best_mode_that_works_is_chosen(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch)
    assert probe_mode(file).mode is ReadMode.DIRECT
    assert probe_mode(file).refused == ()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_refused_modes_are_told_with_the_reason(file: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, ReadMode.DIRECT, number=number)
    found = probe_mode(file)
    assert found.mode is ReadMode.DONTCACHE
    assert found.refused == (f"O_DIRECT: {os.strerror(number)}",)


def test_the_last_rung_always_holds(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, ReadMode.DIRECT, ReadMode.DONTCACHE)
    found = probe_mode(file)
    assert found.mode is ReadMode.BUFFERED
    assert [reason.split(":")[0] for reason in found.refused] == ["O_DIRECT", "RWF_DONTCACHE"]


def test_a_probe_may_start_below_the_top(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch)
    assert probe_mode(file, ReadMode.BUFFERED).mode is ReadMode.BUFFERED
    assert probe_mode(file, ReadMode.DONTCACHE).mode is ReadMode.DONTCACHE


def test_a_failure_that_is_no_refusal_is_raised(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, *ReadMode, number=errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        probe_mode(file)


def test_a_missing_file_is_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        probe_mode(tmp_path / "gone")


def test_memory_file_systems_can_be_read(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        pytest.skip("/dev/shm cannot be written")
    path = shm / f"tiered-test-{os.getpid()}"
    try:
        path.write_bytes(bytes(PAGE))
        found = probe_mode(path)
    finally:
        path.unlink(missing_ok=True)
    assert len(found.refused) == list(ReadMode).index(found.mode)


def test_descriptors_of_refused_modes_are_closed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, ReadMode.DIRECT, ReadMode.DONTCACHE)
    probe_mode(file)
    assert open_below(file.parent) == []


def test_the_ladder_ends_at_buffered_reads() -> None:
    assert [mode.next for mode in ReadMode] == [ReadMode.DONTCACHE, ReadMode.BUFFERED, ReadMode.BUFFERED]
    assert ReadMode.DIRECT.open_flags & os.O_DIRECT
    assert all(mode.open_flags & os.O_CLOEXEC for mode in ReadMode)
    assert ReadMode.DONTCACHE.read_flags == RWF_DONTCACHE


@pytest.mark.parametrize(("number", "expected"), [(errno.EINVAL, True), (errno.EOPNOTSUPP, True), (errno.EIO, False)])
def test_a_refusal_is_not_a_broken_disk(number: int, expected: bool) -> None:
    assert is_refusal(OSError(number, os.strerror(number))) is expected
