"""What pyproject.toml cannot say: the packages, configs/ as the data package `tiered.configs`, and the native kernels.

The kernels are a plain C library that Python opens with ctypes: one file per instruction set, each compiled with its
own flags (never -march=native: the library asks the processor at run time), so a wheel made on one x86-64 machine runs
on any other. Only g++ or clang++ is needed; CXX names another. Without one the package installs all the same, says
so, and computes with torch.
"""

import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NATIVE = Path("tiered/kernels/native")
LIBRARY = "libtiered_kernels.so"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-fno-math-errno", "-ffp-contract=off"]
# Kernels throw nothing, and exceptions would need functions that the linker shares between levels, see pool.h.
AVX2 = ["-fno-exceptions", "-mavx2", "-mbmi2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512"]
# GCC 12 warns of registers that its own AVX-512 header leaves undefined on purpose (its bug 105593); clang does not
# know the second of these warnings.
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
LEVEL_FLAGS = {"avx2": AVX2, "avx512": AVX512, "amx": AMX}
LINK_FLAGS = ["-shared", "-pthread"]
# The compiler's own libraries go into ours, so that it runs where other versions of them are. Their symbols stay
# hidden, because the process has others of the same name. Not every system has static libraries to link with.
STATIC_FLAGS = ["-static-libstdc++", "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections"]


def sources(machine: str = platform.machine()) -> list[Path]:
    """Every file to compile for `machine`; NAME_LEVEL.cpp only where that level can exist."""
    found = sorted(NATIVE.glob("*.cpp"))
    if machine.lower() in ("x86_64", "amd64"):
        return found
    return [path for path in found if level_of(path) not in LEVEL_FLAGS]


def level_of(path: Path) -> str:
    return path.stem.rpartition("_")[2]


def compiler() -> list[str]:
    """The C++ compiler to use, as words of a command; empty where there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    return named or [name for name in ("g++", "clang++", "c++") if shutil.which(name)][:1]


def compile_all(program: Sequence[str], paths: Sequence[Path], folder: Path, *more: str) -> list[Path]:
    """Compile into `folder`; returns the objects.

    Later flags may change earlier ones: the environment's CXXFLAGS follow the library's own, `more` (of tests) is last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{path.stem}.o" for path in paths]
    named = shlex.split(os.environ.get("CXXFLAGS", ""))
    commands = [
        [*program, *FLAGS, *LEVEL_FLAGS.get(level_of(path), []), *named, *more, "-c", str(path), "-o", str(made)]
        for path, made in zip(paths, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))
    return objects


def link(program: Sequence[str], objects: Sequence[Path], made: Path) -> None:
    """Link the library `made`, free of the compiler's own libraries where that can be."""
    command = [*program, *map(str, objects), *LINK_FLAGS, "-o", str(made)]
    try:
        run([*command, *STATIC_FLAGS])
    except CompileError:
        run(command)


class BuildKernels(build_ext):
    """Compiles the library; a failure is reported and does not end the installation."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1]) / LIBRARY)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        refusal = refusal_of(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in (target, refusal):
            stale.unlink(missing_ok=True)
        try:
            self._compile(target)
        except CompileError as error:
            # Beside the library's place, where `tiered doctor` finds it.
            refusal.write_text(f"{error}\n")
            self.warn(
                f"native kernels were not built: {error}\ntiered works without them, with torch's slower operators. "
                "To have them, install g++ or clang++ (or set CXX) and install tiered again."
            )

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the library, or the reason why there is none, replaces the old one."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            made = Path(self.build_lib) / self.get_ext_filename(ext.name)
            place = Path(build_py.get_package_dir(ext.name.rpartition(".")[0])) / LIBRARY
            for source, target in ((made, place), (refusal_of(made), refusal_of(place))):
                # Removed first: a process that has the old library open keeps it whole.
                target.unlink(missing_ok=True)
                if source.exists():
                    shutil.copy2(source, target)

    def _compile(self, target: Path) -> None:
        program = compiler()
        if not program:
            raise CompileError("no C++ compiler: neither g++ nor clang++ is in PATH, and CXX is not set")
        link(program, compile_all(program, sources(), Path(self.build_temp)), target)


class PlainWheel(bdist_wheel):
    """A wheel for this platform and any Python 3: the library knows nothing of the interpreter."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def refusal_of(library: Path) -> Path:
    """Where the build says why there is no `library`."""
    return library.with_name(library.name + ".refusal")


def run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompileError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        lines = [line for line in lines if "error" in line] or lines
        said = f": {' | '.join(lines[:3])}" if lines else ""
        raise CompileError(f"{' '.join(command)}: exit status {done.returncode}{said}")


# Tests import this file, to compile with the same flags.
if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["tiered", "tiered.*"]), "tiered.configs"],
        package_dir={"tiered.configs": "configs"},
        ext_modules=[Extension("tiered.kernels.native", [str(path) for path in sources()])],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlainWheel},
    )
