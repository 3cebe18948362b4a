"""What the machine allows at most, on so little memory that only the sign of the figures means anything."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiered.kernels import Level, load_library
from tools import machine_limits


def test_limits_are_measured_with_and_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    library, compiled = load_library(), machine_limits.compile_loops()
    with machine_limits.Limits(2, 1 << 22) as limits:
        assert limits.read_bandwidth(1) > 0
        peak = limits.peak(10)
        if compiled is None or isinstance(library, str) or library.best_level() is Level.SCALAR:
            assert peak is None
        else:
            assert peak is not None and peak > 0
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    with machine_limits.Limits(2, 1 << 22) as limits:
        assert limits.read_bandwidth(1) > 0
        assert limits.peak(10) is None


@pytest.mark.parametrize("level", Level)
def test_every_level_reads_every_word_once(level: Level) -> None:
    loops, library = machine_limits.compile_loops(), load_library()
    if loops is None:
        pytest.skip("no C++ compiler here")
    if isinstance(library, str) or library.refusal(level) is not None:
        pytest.skip(f"{level.name} cannot run here")
    words = (ctypes.c_uint64 * 1024)(*(number << 33 | 1 for number in range(1024)))
    assert loops.read_words(ctypes.addressof(words), ctypes.sizeof(words), level) == sum(words)
    operations = loops.multiply(5, level)
    assert operations == 0 if level is Level.SCALAR else operations > 0


@pytest.mark.slow
def test_the_program_prints_both_figures() -> None:
    tool = Path(machine_limits.__file__)
    done = subprocess.run([sys.executable, str(tool)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout).keys() == {"read_bandwidth", "peak_flops"}
