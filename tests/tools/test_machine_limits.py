"""What the machine allows at most, on so little memory that only the sign of the figures means anything."""

import ctypes
import json

import pytest

from tiered.kernels import Level, load_library
from tools import machine_limits
from tools.machine_limits import Limits, compile_loops


@pytest.fixture(scope="module")
def loops() -> ctypes.CDLL | None:
    return compile_loops()


@pytest.mark.inputs("tools")
def test_limits_are_measured_with_and_without_a_compiler(
    loops: ctypes.CDLL | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = load_library()
    with Limits(2, 1 << 22) as limits:
        assert limits.read_bandwidth(1) > 0
        peak = limits.peak(10)
        if loops is None or isinstance(library, str) or library.best_level() is Level.SCALAR:
            assert peak is None
        else:
            assert peak is not None and peak > 0
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    with Limits(2, 1 << 22) as limits:
        assert limits.read_bandwidth(1) > 0
        assert limits.peak(10) is None


@pytest.mark.parametrize("level", Level)
def test_every_level_reads_every_word_once(loops: ctypes.CDLL | None, level: Level) -> None:
    library = load_library()
    if loops is None:
        pytest.skip("no C++ compiler here")
    if isinstance(library, str) or library.refusal(level) is not None:
        pytest.skip(f"{level.name} cannot run here")
    words = (ctypes.c_uint64 * 1024)(*(number << 33 | 1 for number in range(1024)))
    assert loops.read_words(ctypes.addressof(words), ctypes.sizeof(words), level) == sum(words)
    operations = loops.multiply(5, level)
    assert operations == 0 if level is Level.SCALAR else operations > 0


def test_the_program_prints_both_figures(
    loops: ctypes.CDLL | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine_limits, "compile_loops", lambda: loops)
    monkeypatch.setattr(machine_limits, "Limits", lambda threads: Limits(threads, 1 << 22))
    assert machine_limits.main() == 0
    assert json.loads(capsys.readouterr().out).keys() == {"read_bandwidth", "peak_flops"}
