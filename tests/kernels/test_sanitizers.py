"""The native library under sanitizers, and on other processors: built with setup.py's own flags, beside a self-test.

The self-test (native/) calls every entry of the C interface over levels, formats, tails and threads, with buffers that
end exactly where the interface says, and compares with plain sums in double.
"""

import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from tests.kernels.native_linear import native
from tests.shared import compiled_once, unoptimized_objects
from tiered.kernels import Level

pytestmark = pytest.mark.inputs("tiered/kernels/native", "tests/kernels/native", "setup.py")

SELF_TEST: Final = Path(__file__).with_name("native")
# Checks at every load and store cost more than optimization gains, and compile many times faster without.
SANITIZERS: Final = {
    "address": (
        *("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        # These cost a third of the compiling, and what they find, the other sanitizer finds where it is used.
        "-fno-sanitize=null,object-size,vptr,nonnull-attribute,returns-nonnull-attribute,pointer-overflow",
    ),
    "thread": ("-Og", "-g1", "-fsanitize=thread"),
}
OUT_OF_LINE: Final = ("--param", "asan-instrumentation-with-call-threshold=0")
"""GCC's: checks of addresses are calls, not code in each place, which takes a third longer to compile."""


@pytest.mark.timeout(700)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_no_sanitizer_finds_anything(build: Any, sanitizer: str, tmp_path: Path) -> None:
    program = build.compiler()
    if not program or shutil.which(program[0]) is None:
        pytest.skip("no C++ compiler here")
    flags = SANITIZERS[sanitizer]
    if sanitizer == "address" and "clang" not in program[0]:
        flags = (*flags, *OUT_OF_LINE)
    skip_without(program, flags, tmp_path)
    # A sanitizer sees only what runs: levels that this processor does not have are linked as they are.
    absent = {level.name.lower() for level in Level if native().refusal(level) is not None}
    sources = [path for path in build.sources() if build.level_of(path) not in absent]
    objects = compiled_once(build, program, sources, *flags)
    objects += [path for path in unoptimized_objects(build) if build.level_of(path) in absent]
    made = linked(build, program, objects, tmp_path, flags)
    assert_passes([str(made), "20" if sanitizer == "thread" else "40"])


def test_the_portable_kernels_are_right_on_arm(build: Any, tmp_path: Path) -> None:
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
    for name in (compiler, emulator):
        if shutil.which(name) is None:
            pytest.skip(f"no {name} here; Debian and Ubuntu: g++-aarch64-linux-gnu, qemu-user-static")
    flags = ("-O2", "-Werror")
    objects = compiled_once(build, [compiler], build.sources("aarch64"), *flags)
    made = linked(build, [compiler], objects, tmp_path, flags, "-static")
    assert_passes([emulator, str(made), "20"])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels are of x86-64 only")
def test_an_older_processor_meets_no_instruction_that_it_does_not_have(build: Any, tmp_path: Path) -> None:
    program, emulator = build.compiler(), "qemu-x86_64-static"
    if not program or shutil.which(program[0]) is None:
        pytest.skip("no C++ compiler here")
    objects = unoptimized_objects(build)
    for path in objects:
        if build.level_of(path) in build.LEVEL_FLAGS:
            # Of functions with such symbols the linker keeps one copy, which may be a level's, for all files.
            assert not shared_symbols(path)
    if shutil.which(emulator) is None:
        pytest.skip(f"no {emulator} here; Debian and Ubuntu: qemu-user-static")
    made = linked(build, program, objects, tmp_path, ("-O0",))
    assert "levels: 0\n" in assert_passes([emulator, "-cpu", "Nehalem", str(made), "6"])


def test_clang_has_nothing_to_warn_of(build: Any, tmp_path: Path) -> None:
    # Nor has the compiler of .ci/run, for which warnings are errors, with the whole optimization that some need.
    if shutil.which("clang++") is None:
        pytest.skip("no clang++ here")
    build.compile_all(["clang++"], build.sources(), tmp_path, "-fsyntax-only", "-Werror")


def linked(
    build: Any, program: Sequence[str], library: Sequence[Path], folder: Path, flags: Sequence[str], *link: str
) -> Path:
    """The program, of the library's objects and the self-test's sources."""
    include = f"-I{build.NATIVE}"
    tests = compiled_once(build, program, sorted(SELF_TEST.glob("*.cpp")), *flags, include)
    made = folder / "selftest"
    build.run([*program, *flags, *map(str, [*library, *tests]), "-pthread", *link, "-o", str(made)])
    return made


def skip_without(program: Sequence[str], flags: Sequence[str], folder: Path) -> None:
    """Skip where an empty program cannot be built or run with `flags`: not every system has what they need."""
    source, made = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() { return 0; }\n", encoding="utf-8")
    for command in ([*program, *flags, str(source), "-o", str(made)], [str(made)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}")


def shared_symbols(made: Path) -> list[str]:
    """The weak and unique symbols of an object file."""
    done = subprocess.run(["nm", "-C", "--defined-only", str(made)], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if line.split()[1] in ("W", "V", "u")]


def assert_passes(command: Sequence[str]) -> str:
    """Run the self-test; returns what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "levels: 0" in done.stdout and "\n0 failures" in done.stdout
    return done.stdout
