"""Positional reads, whole or with an error that names the file."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tiered.convert.safetensors_reader import SafetensorsReader
from tiered.errors import CheckpointError, ReadError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(40, 3, 5), "scalar": torch.tensor(3.0), "empty": torch.ones(0, 4)}, path)
    return path


def test_panels_put_together_are_the_tensor(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr("tiered.convert.source.PANEL_NBYTES", 200)
    expected, reader = load_file(file), SafetensorsReader()
    panels = [panel.clone() for panel in reader.panels(file, "a")]
    assert len(panels) > 5 and torch.equal(torch.cat(panels), expected["a"].flatten(end_dim=-2))
    (scalar,) = reader.panels(file, "scalar")
    assert scalar.shape == () and float(scalar) == 3.0
    assert list(reader.panels(file, "empty")) == []
    reader.close()


def test_short_reads_are_continued(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    reader = SafetensorsReader()
    (panel,) = reader.panels(file, "a")
    assert torch.equal(panel, load_file(file)["a"].flatten(end_dim=-2))
    reader.close()


def test_an_input_output_error_names_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    reader = SafetensorsReader()
    with pytest.raises(ReadError, match=r"model\.safetensors: reading .* failed: Input/output error"):
        list(reader.panels(file, "a"))
    reader.close()


def test_a_file_cut_while_it_is_read_is_named(file: Path) -> None:
    reader = SafetensorsReader()
    reader.tensors(file)
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends at byte"):
        for name in ("a", "scalar"):
            list(reader.panels(file, name))
    reader.close()
