"""Quick rates: a folder that cannot be measured is refused, and the way around it is named."""

from pathlib import Path
from typing import Any

import pytest

from tiered.bench import profile, quick
from tiered.configs_path import config_dir
from tiered.errors import ConfigError
from tiered.kernels import Kernels
from tiered.plan.shapes import known_shapes


def measure(folder: Path) -> None:
    shapes = known_shapes(config_dir() / "models", "opt-125m")
    assert shapes is not None
    with Kernels(1) as kernels:
        quick.quick_hardware(folder, [shapes["int4"]], False, kernels)


def test_a_folder_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "kind_of", lambda folder: "tmpfs")
    with pytest.raises(ConfigError, match=r"lies in memory \(tmpfs\), expected a disk; .* --hardware"):
        measure(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(folder / "bandwidth.part"))

    monkeypatch.setattr(profile, "kind_of", lambda folder: "ext4")
    monkeypatch.setattr(quick, "read_bandwidth", refuse)
    with pytest.raises(ConfigError, match=rf"{tmp_path}: .* Permission denied; .* --hardware"):
        measure(tmp_path)
    assert list(tmp_path.iterdir()) == []
