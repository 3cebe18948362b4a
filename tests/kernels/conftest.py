"""What tests that compile the native library share."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def build() -> Iterator[Any]:
    """setup.py as a module: the sources, the flags, and how they are compiled."""
    pytest.importorskip("setuptools")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # its paths are relative
        spec = importlib.util.spec_from_file_location("tiered_setup", ROOT / "setup.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
