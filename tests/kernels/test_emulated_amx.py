"""The AMX kernels where there is no AMX: all tests of the levels, on a library whose tile instructions are plain code.

Everything but the instructions themselves is what runs on hardware. Needs AVX-512 BF16, which every processor with AMX
has.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.native_linear import native
from tests.shared import compiled_once, unoptimized_objects
from tiered.kernels import Level
from tiered.kernels.library import LIBRARY_VARIABLE, Library

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def emulated(build: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that takes AMX for granted and emulates its tiles."""
    if native().refusal(Level.AMX) is None:
        pytest.skip("this processor has AMX: the real thing is tested")
    program = build.compiler()
    if not program:
        pytest.skip("no C++ compiler here")
    made = tmp_path_factory.mktemp("emulated") / "libemulated.so"
    # What has tiles, and what says whether there are any.
    emulating = [path for path in build.sources() if build.level_of(path) == "amx" or path.stem == "cpu"]
    # Only the tiles, of which every one takes thousands of operations, gain more by optimization than it costs.
    objects = compiled_once(build, program, emulating, "-DTK_EMULATE_TILES", "-O1")
    names = {path.name for path in objects}
    objects += [path for path in unoptimized_objects(build) if path.name not in names]
    build.run([*program, *map(str, objects), *build.LINK_FLAGS, "-o", str(made)])
    refusal = Library(made).refusal(Level.AMX)
    if refusal is not None:
        pytest.skip(f"AMX cannot even be emulated: {refusal}")
    return made


@pytest.mark.inputs("tiered/kernels", "tests/kernels", "setup.py")
@pytest.mark.timeout(400)
def test_amx_kernels_pass_the_tests_of_every_level_in_emulation(emulated: Path) -> None:
    # Left out: how soon a call ends, which emulated multiplications are too slow for.
    tests = str(Path(__file__).with_name("test_native_linear.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "AMX and not ends_it_soon", tests],
        env={**os.environ, LIBRARY_VARIABLE: str(emulated)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert " passed" in done.stdout and "processor has no AMX" not in done.stdout
