"""Positional reads, whole or with an error that names the file."""

import errno
import os
import queue
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.waiting import SECONDS
from tiered.convert.gather import Extent, Gatherer
from tiered.convert.panels import Makers
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


def test_panels_of_two_tensors_keep_out_of_each_others_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiered.convert.source.PANEL_NBYTES", 400)
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    tensors = [torch.randn(50, 10) for _ in paths]
    for path, tensor in zip(paths, tensors, strict=True):
        save_file({"a": tensor}, path)
    reader = SafetensorsReader()
    pairs = list(zip(*(reader.panels(path, "a") for path in paths), strict=True))
    assert len(pairs) == 5
    for number, panels in enumerate(pairs):
        for panel, tensor in zip(panels, tensors, strict=True):
            assert torch.equal(panel, tensor[10 * number :][:10])
    reader.close()


def test_the_next_panels_are_read_while_one_is_used(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiered.convert.source.PANEL_NBYTES", 200)
    preadv, offsets = os.preadv, queue.SimpleQueue[int]()

    def traced(fd: int, buffers: list[memoryview], offset: int) -> int:
        offsets.put(offset)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", traced)
    monkeypatch.setattr("tiered.convert.workers.worker_count", lambda: 1)
    reader, makers = SafetensorsReader(), Makers()
    (panels,) = makers.line([reader.panels(file, "a")])
    next(panels)
    seen = {offsets.get(timeout=SECONDS) for _ in range(3)}
    assert len(seen) == 3
    with pytest.raises(queue.Empty):
        offsets.get(timeout=0.05)  # there is no memory for another
    makers.close()
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


def test_whole_rows_are_asked_for_in_small_steps_before_columns_of_them_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux cuts what is asked for at once to the disk's read-ahead: of one piece only the beginning would come."""
    path, count, row_nbytes = tmp_path / "matrix", 300, 50_000
    path.write_bytes(bytes(1000) + os.urandom(count * row_nbytes))
    asked: list[tuple[int, int]] = []

    def advise(fd: int, offset: int, nbytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            asked.append((offset, nbytes))

    monkeypatch.setattr("os.posix_fadvise", advise)
    gatherer, extent = Gatherer(), Extent(path, 1000, count * row_nbytes)
    matrix = torch.frombuffer(bytearray(path.read_bytes()[1000:]), dtype=torch.uint8).view(count, row_nbytes)
    for columns in (range(0, 700), range(700, 1400)):
        found = gatherer.rectangle(extent, row_nbytes, range(10, count), columns)
        assert torch.equal(found, matrix[10:, columns.start : columns.stop])
    gatherer.close()
    assert max(nbytes for _, nbytes in asked) <= 128 << 10
    place = 1000 + 10 * row_nbytes
    for offset, nbytes in asked:
        assert offset == place
        place += nbytes
    assert place == 1000 + count * row_nbytes
