"""Torch checkpoints are read without running what is in them."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from tests.convert.models import save_bin, tiny_model
from tests.quick import ONE_FORM
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.convert.torch_reader import TorchReader, is_zip
from tiered.errors import BudgetError, CheckpointError

pytestmark = ONE_FORM


class Harmful:
    """Makes a folder where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._proof),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(zipped: bool, tmp_path: Path) -> None:
    path, proof = tmp_path / "pytorch_model.bin", tmp_path / "proof"
    torch.save({"a": torch.ones(2), "b": Harmful(proof)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="pickled code is never run"):
        TorchReader().tensors(path)
    assert not proof.exists()


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    path, proof = tmp_path / "pytorch_model.bin", tmp_path / "proof"
    path.write_bytes(pickle.dumps({"a": Harmful(proof)}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        TorchReader().tensors(path)
    assert not proof.exists()


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", b"\x80\x02", b"\x00" * 100, os.urandom(5000)])
def test_rubbish_is_a_checkpoint_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        TorchReader().tensors(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_a_checkpoint_error(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.randn(100, 100)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for cut in (10, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            TorchReader().tensors(path)


def test_a_zip_without_a_pickle_is_a_checkpoint_error(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "nothing here")
    with pytest.raises(CheckpointError):
        TorchReader().tensors(path)


@pytest.mark.parametrize("value", [[], {}, torch.ones(2), "text"])
def test_anything_but_a_dict_of_tensors_is_refused(value: object, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(value, path)
    with pytest.raises(CheckpointError, match="expected a dict of tensors"):
        TorchReader().tensors(path)


def test_strided_and_shared_tensors_come_out_right(tmp_path: Path) -> None:
    base = torch.randn(64, 48)
    state = {"whole": base, "transposed": base.t(), "part": base[3:9, ::2], "scalar": torch.tensor(2.5)}
    path = tmp_path / "pytorch_model.bin"
    torch.save({"state_dict": state, "epoch": 3}, path)
    reader = TorchReader()
    for name, expected in state.items():
        panels = [panel.clone() for panel in reader.panels(path, name)]
        assert torch.equal(panels[0] if expected.dim() == 0 else torch.cat(panels), expected), name


def test_the_mapping_is_renewed_while_a_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiered.convert.torch_reader._REMAP_NBYTES", 4096)
    monkeypatch.setattr("tiered.convert.source.PANEL_NBYTES", 1024)
    tensor = torch.randn(300, 17)
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": tensor}, path)
    assert torch.equal(torch.cat(list(TorchReader().panels(path, "a"))), tensor)


def test_a_legacy_file_must_fit_the_budget(tmp_path: Path) -> None:
    source = save_bin(tmp_path / "source", tiny_model("llama"), zipped=False)
    path = source / "pytorch_model.bin"
    assert not is_zip(path)
    os.truncate(path, 1 << 40)  # sparse: only its claimed size matters here
    assert TorchReader().working_nbytes(path) > 1 << 40
    # Refused by its size: read, it would not even be whole.
    with pytest.raises(BudgetError, match="to read the source") as caught:
        convert_checkpoint(source, tmp_path / "out", ConvertOptions(ram_bytes=64 << 30))
    assert caught.value.smallest_bytes is not None and caught.value.smallest_bytes > 1 << 40


@pytest.mark.parametrize("indexed", [True, False])
def test_the_largest_of_several_legacy_files_is_named_at_once(indexed: bool, tmp_path: Path) -> None:
    source = save_bin(tmp_path / "source", tiny_model("llama"), zipped=False, shards=2)
    if not indexed:
        (source / "pytorch_model.bin.index.json").unlink()
    os.truncate(source / "pytorch_model-00002-of-00002.bin", 1 << 40)
    with pytest.raises(BudgetError, match="to read the source") as caught:
        convert_checkpoint(source, tmp_path / "out", ConvertOptions(ram_bytes=10 << 20))
    assert caught.value.smallest_bytes is not None and caught.value.smallest_bytes > 1 << 40


def test_a_budget_below_the_interpreter_is_refused(tmp_path: Path) -> None:
    source = save_bin(tmp_path / "source", tiny_model("llama"))
    with pytest.raises(BudgetError, match=r"pass at least --ram \d+MiB") as caught:
        convert_checkpoint(source, tmp_path / "out", ConvertOptions(ram_bytes=10 << 20))
    assert caught.value.smallest_bytes is not None and not (tmp_path / "out").exists()
    convert_checkpoint(source, tmp_path / "out", ConvertOptions(ram_bytes=caught.value.smallest_bytes))
