"""Installing with and without a compiler: it always succeeds, and says what was built.

From a copy of what a source distribution holds, with the setuptools of this environment: no network is needed.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Final

import pytest

from tests.shared import unoptimized_objects

pytestmark = pytest.mark.inputs("tiered/kernels/native", "setup.py", "pyproject.toml", "MANIFEST.in")

ROOT: Final = Path(__file__).parent.parent
PIP: Final = (sys.executable, "-m", "pip", "--disable-pip-version-check")
OFFLINE: Final = ("--no-build-isolation", "--no-deps", "--no-index")
LIBRARY: Final = "libtiered_kernels.so"
COMPILER: Final = """#!/bin/sh
case " $* " in *" -c "*) ;; *) exec g++ "$@" ;; esac
for word; do case "$word" in *.cpp) source="$word" ;; *.o) made="$word" ;; esac; done
cmp "$source" "{root}/$source" && cp "{objects}/$(basename "$source" .cpp).o" "$made"
"""
"""Links; of sources as they are here it gives the objects that there are already."""
SHOW_KERNELS: Final = """
import torch
from tiered.kernels import Kernels, load_library
with Kernels(1) as kernels:
    print(type(load_library()).__name__, kernels.refusal)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, unpacked."""
    pytest.importorskip("setuptools", minversion="77")
    checkout, packed = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("packed")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.refusal")
    for name in ("tiered", "configs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(packed)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True)
    (archive,) = packed.iterdir()
    shutil.unpack_archive(archive, packed, filter="data")
    return next(path for path in packed.iterdir() if path.is_dir())


def pip(*words: str | Path, **variables: str) -> str:
    """What pip printed; it must have succeeded. `variables` are added to the environment."""
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | variables
    command = [*PIP, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def kernels_of(installed: Path) -> str:
    """What a program finds that runs the package in `installed`."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-P", "-c", SHOW_KERNELS]
    done = subprocess.run(command, env=environment, cwd=installed, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_source_distribution_has_every_native_file(sources: Path) -> None:
    packed = {path.name for path in (sources / "tiered/kernels/native").iterdir()}
    assert packed == {path.name for path in (ROOT / "tiered/kernels/native").iterdir()}
    assert list((sources / "configs").rglob("*.toml"))


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"CXX": "/bin/false"}, "exit status 1"),
        ({"CXX": "no-such-compiler -m64"}, "no-such-compiler: No such file or directory"),
        ({"PATH": "/nonexistent"}, "neither g++ nor clang++ is in PATH"),
    ],
)
def test_without_a_compiler_it_installs_and_says_so(
    sources: Path, variables: dict[str, str], why: str, tmp_path: Path
) -> None:
    printed = pip("install", "-v", *OFFLINE, "--target", tmp_path, sources, **variables)
    assert "native kernels were not built" in printed and why in printed
    refusal = (tmp_path / f"tiered/kernels/{LIBRARY}.refusal").read_text(encoding="utf-8")
    assert why in refusal
    assert not (tmp_path / "tiered/kernels" / LIBRARY).exists()
    if "PATH" in variables:  # of the others only the file's text differs
        assert kernels_of(tmp_path) == f"str {LIBRARY} was not built: {refusal.strip()}"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_with_a_compiler_the_wheel_holds_the_library_and_no_sources(build: Any, sources: Path, tmp_path: Path) -> None:
    # tools/setup has compiled every source, and in .ci/run warnings were errors.
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(root=ROOT, objects=unoptimized_objects(build)[0].parent), encoding="utf-8")
    compiler.chmod(0o755)
    pip("wheel", *OFFLINE, "-w", tmp_path, sources, CXX=str(compiler))
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.split("-")[2:] == ["py3", "none", f"linux_{os.uname().machine}.whl"]
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert f"tiered/kernels/{LIBRARY}" in names and "tiered/configs/models/opt-13b.toml" in names
    assert not [name for name in names if name.endswith((".cpp", ".h", ".refusal"))]
    assert kernels_of(installed) == "Library None"


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no compiler here")
def test_this_checkout_has_its_library() -> None:
    refusal = ROOT / "tiered/kernels" / f"{LIBRARY}.refusal"
    assert not refusal.exists(), refusal.read_text(encoding="utf-8")
    assert (ROOT / "tiered/kernels" / LIBRARY).exists(), "run tools/setup"


def test_an_editable_build_replaces_what_was_there(sources: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(sources, checkout)
    place = checkout / "tiered/kernels" / LIBRARY
    place.write_bytes(b"an old library")
    environment = {**os.environ, "CXX": "/bin/false"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True)
    assert not place.exists()
    assert "exit status 1" in place.with_name(f"{LIBRARY}.refusal").read_text(encoding="utf-8")
