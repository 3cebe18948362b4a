"""What tests only read is made once in a whole run, by whichever worker needs it first."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

FOLDER_VARIABLE: Final = "TIERED_TESTS_SHARED"
"""Names the folder that all workers of a run share; tests/conftest.py sets it."""


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The file or folder that `make` makes at the path it is given; nobody may change it."""
    path = Path(os.environ[FOLDER_VARIABLE], name)
    with path.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_name(f"{name}.unfinished")
            make(unfinished)
            unfinished.rename(path)
    return path


def unoptimized_objects(build: Any) -> list[Path]:
    """The native library's objects, compiled by `build` (setup.py) without the optimization that takes most of it."""
    sources = build.sources()
    folder = made_once("objects", lambda made: build.compile_all(build.compiler(), sources, made, "-O0"))
    return [folder / f"{path.stem}.o" for path in sources]
