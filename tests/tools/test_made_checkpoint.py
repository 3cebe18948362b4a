"""Checkpoints that lie nowhere are those that would lie on a disk: the same files, the same stores."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tests.convert.models import store_digest
from tests.convert.opt import SHAPE
from tiered.configs_path import config_dir
from tiered.convert import convert_checkpoint
from tiered.convert.synthetic import ShapeFile
from tiered.convert.torch_file import load_torch_file
from tiered.errors import ConfigError
from tools.made_checkpoint import MadeFile, MadeModel, Span, main
from tools.opt_forms import write_form


def write(folder: Path, files: dict[str, MadeFile]) -> Path:
    folder.mkdir()
    for name, file in files.items():
        (folder / name).write_bytes(file.read(0, file.nbytes))
    return folder


def blocks(store: Path) -> dict[str, str]:
    return {name: digest for name, digest in store_digest(store).items() if name.startswith("blocks/")}


def test_both_forms_hold_the_same_model(tmp_path: Path) -> None:
    model = MadeModel.of_shape(SHAPE)
    for name, files in (("raw", model.raw(4, 13)), ("huggingface", model.huggingface(60_000))):
        convert_checkpoint(write(tmp_path / name, files), tmp_path / f"{name}.tiered")
    assert len(list((tmp_path / "huggingface").glob("*.safetensors"))) > 2
    assert blocks(tmp_path / "raw.tiered") == blocks(tmp_path / "huggingface.tiered")


def test_shards_are_those_that_are_written_of_such_a_model(tmp_path: Path) -> None:
    model = MadeModel.of_shape(SHAPE)
    files = {name: bytes(file.read(0, file.nbytes)) for name, file in model.huggingface(1 << 30).items()}
    loaded = load(files["model-00001-of-00001.safetensors"])
    order = json.loads(files["model.safetensors.index.json"])["weight_map"]
    state = {name: loaded[name] for name in order}
    written = write_form("raw", tmp_path / "written", state, parts=2, shards=11)
    made = write(tmp_path / "made", model.raw(2, 11))
    assert {path.name for path in written.iterdir()} == {path.name for path in made.iterdir()}
    for path in written.iterdir():
        same, other = load_torch_file(path), load_torch_file(made / path.name)
        assert other.keys() == same.keys() and other["shard_metadata"] == same["shard_metadata"]
        assert list(values(path, same)) == list(values(made / path.name, other))


def values(path: Path, loaded: Any) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], bytes]]:
    for name, tensor in loaded["model"].items():
        region = tensor.region(path, name)
        ((_, offset, nbytes),) = region.extents
        yield name, region.dtype, region.shape, path.read_bytes()[offset : offset + nbytes]


def test_a_read_may_begin_and_end_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.made_checkpoint.MOST_READ_NBYTES", 4)
    repeated = Span(17, memoryview(b"abcdefgabcdefg"), 7, 3)
    file = MadeFile([Span.of(b"head"), Span.of(b""), repeated, Span.of(b"tail")])
    whole = b"head" + b"defgabcdefgabcdef" + b"tail"
    assert file.nbytes == len(whole)
    for offset in range(len(whole) + 2):
        for nbytes in range(len(whole) + 2):
            assert bytes(file.read(offset, nbytes)) == whole[offset : offset + nbytes]


def test_other_families_are_refused() -> None:
    with pytest.raises(ConfigError, match="model_type 'llama', expected 'opt'"):
        MadeModel.of_shape(ShapeFile("x", {"model_type": "llama"}, None))


def test_a_checkpoint_goes_into_an_empty_folder_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(config_dir() / "models" / "tiny-opt.toml"), str(tmp_path / "made")]
    (tmp_path / "made").mkdir()
    assert main(words) == 0 and (tmp_path / "made" / "config.json").exists()
    assert main(words) == 2
    assert f"{tmp_path / 'made'}: expected an empty folder" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([words[0], str(tmp_path / "file")]) == 1
    assert f"{tmp_path / 'file'}: FileExistsError" in capsys.readouterr().err
