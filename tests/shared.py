"""What tests only read is made once: in a whole run, by whichever worker needs it first, and compiled objects for every
run that would make the same ones."""

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

FOLDER_VARIABLE: Final = "TIERED_TESTS_SHARED"
"""Names the folder that all workers of a run share; tests/conftest.py sets it."""
_OBJECTS: Final = Path(__file__).parents[1] / ".pytest_cache/d/objects"
"""pytest's cache, which `pytest --cache-clear` empties."""
_KEPT: Final = 12
"""Sets of objects that stay there: a run uses five."""


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The file or folder that `make` makes at the path it is given; nobody may change it."""
    return _made_once(Path(os.environ[FOLDER_VARIABLE], name), make)


def _made_once(path: Path, make: Callable[[Path], object]) -> Path:
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_name(f"{path.name}.unfinished")
            make(unfinished)
            unfinished.rename(path)
    return path


def compiled_once(build: Any, program: Sequence[str], sources: Sequence[Path], *flags: str) -> list[Path]:
    """The objects of `sources`, compiled by `build` (setup.py) with these flags, or found as an earlier run has
    compiled them from the same files with the same compiler. Sanitizers' take a minute."""
    version = subprocess.run([*program, "--version"], capture_output=True, check=True).stdout
    made_of = (build.FLAGS, build.LEVEL_FLAGS, flags, os.environ.get("CXXFLAGS"), sources, version)
    digest = hashlib.sha256(repr(made_of).encode())
    for folder in sorted({build.NATIVE, *(path.parent for path in sources)}):
        for path in sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    _OBJECTS.mkdir(parents=True, exist_ok=True)
    made = _made_once(_OBJECTS / digest.hexdigest(), lambda made: build.compile_all(program, sources, made, *flags))
    os.utime(made)
    by_age = sorted((path for path in _OBJECTS.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for old in by_age[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return [made / f"{path.stem}.o" for path in sources]


def unoptimized_objects(build: Any) -> list[Path]:
    """The native library's objects, without the optimization that takes most of the time of compiling."""
    return compiled_once(build, build.compiler(), build.sources(), "-O0")
