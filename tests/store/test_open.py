"""Opening: a store opens by its headers alone; what is no store says what it is instead and what to do."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.store.make import random_bytes, write_block, write_store
from tiered.arch import load_config
from tiered.errors import CheckpointError, StoreError
from tiered.store import PAGE, Store
from tiered.store.manifest import MANIFEST_NAME
from tiered.store.open import PROGRESS_NAME

SIZES = (5000, 9000, 20000)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_store(tmp_path / "some.tiered", SIZES)


def refused(path: Path | str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        Store.open(path)
    assert caught.value.exit_code == 4
    assert str(path) in str(caught.value)


def test_the_tape_is_every_layer_and_the_head(store: Store) -> None:
    assert [block.name for block in store.tape] == ["layer-000", "layer-001", "head"]
    units = [unit for block in store.tape for unit in store.layout(block).units]
    assert store.tape_nbytes == sum(unit.nbytes for unit in units)
    headers = sum(block.file.header_nbytes for block in store.tape)
    assert store.tape_nbytes == sum(store.file_path(block).stat().st_size for block in store.tape) - headers
    assert [list(units) for units in store.dense_units] == [list(store.layout(block).units) for block in store.tape]


def test_a_chunk_is_found_by_the_bytes_it_holds(store: Store) -> None:
    for block in store.manifest.blocks:
        file = block.file
        for start in range(0, file.nbytes, 500):
            for stop in {start + 1, min(start + 9000, file.nbytes), file.nbytes}:
                expected = [n for n, chunk in enumerate(file.chunks) if chunk.offset < stop and start < chunk.stop]
                assert list(file.chunks_around(start, stop)) == expected


def test_a_store_is_called_like_its_folder(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.name == "some"
    monkeypatch.chdir(store.path)
    assert Store.open(".").name == "some"


def test_rows_of_the_embedding_are_the_vocabulary(store: Store) -> None:
    assert store.vocab_size == 8


def test_no_such_folder_says_how_to_make_one(tmp_path: Path) -> None:
    refused(tmp_path / "gone.tiered", r"no such store; make one with 'tiered convert MODEL -o .*gone\.tiered'")
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "below", "no such store")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    refused(tmp_path / "model.gguf", "a file, expected the folder that 'tiered convert' wrote")


def test_an_unfinished_conversion_says_how_to_resume(tmp_path: Path) -> None:
    (tmp_path / PROGRESS_NAME).write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "the conversion has not finished; run the same 'tiered convert' command again to resume it")


def test_a_model_folder_is_to_be_converted_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, f"a model folder, not a store.*convert it first with 'tiered convert {tmp_path}'")


def test_any_other_folder_is_no_store(tmp_path: Path) -> None:
    refused(tmp_path, r"not a store \(no manifest\.json\)")


def test_a_manifest_that_is_no_text_is_damaged(store: Store) -> None:
    (store.path / MANIFEST_NAME).write_bytes(b"\xff\xfe\x80")
    refused(store.path, "manifest.json: not text .*; the store is damaged")


def make_huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize(
    ("put", "told"),
    [
        (os.mkfifo, "a named pipe, expected a file"),
        (Path.mkdir, "a folder, expected a file"),
        (lambda path: path.symlink_to("/dev/zero"), "a device, expected a file"),
        (lambda path: path.symlink_to(path.name), "a link that leads back to itself"),
        (lambda path: path.write_bytes(b"[" * 100_000), "not valid JSON"),
        (make_huge, "has 1,099,511,627,776 bytes, expected at most 67,108,864"),
    ],
)
@pytest.mark.parametrize("name", [MANIFEST_NAME, "config.json"])
def test_what_is_no_ordinary_file_is_named_and_not_opened(
    store: Store, name: str, put: Callable[[Path], object], told: str
) -> None:
    path = store.path / name
    path.unlink()
    put(path)
    if name == MANIFEST_NAME or "expected a file" in told or "link" in told:
        refused(store.path, rf"{name}: {told}")
    else:
        with pytest.raises(CheckpointError, match=rf"{name}: {told}"):
            load_config(store.path)


def test_an_embedding_that_is_no_table_is_named(store: Store) -> None:
    manifest = json.loads((store.path / MANIFEST_NAME).read_text(encoding="utf-8"))
    tables = {"a.weight": random_bytes(64, 0).view(8, 8), "b.weight": random_bytes(64, 1).view(8, 8)}
    manifest["files"].append(write_block(store.path, "blocks/two.safetensors", tables).to_json())
    manifest["blocks"][0]["file"] = "blocks/two.safetensors"
    (store.path / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")
    refused(store.path, r"two\.safetensors: holds tensors .*, expected the token embedding alone")


def test_a_missing_block_is_named(store: Store) -> None:
    store.file_path(store.tape[1]).unlink()
    refused(store.path, r"layer-001\.safetensors: missing; the store is incomplete")


def test_a_missing_folder_of_blocks_is_a_missing_block(store: Store) -> None:
    shutil.rmtree(store.path / "blocks")
    refused(store.path, r"embed\.safetensors: missing")
    (store.path / "blocks").touch()
    refused(store.path, r"embed\.safetensors: missing")


@pytest.mark.parametrize("change", [-PAGE, PAGE, -1])
def test_a_block_of_another_size_is_named(store: Store, change: int) -> None:
    path = store.file_path(store.tape[0])
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + change)
    refused(store.path, r"layer-000\.safetensors: expected .* bytes, found .*; it is truncated or not this store's")


def test_a_block_without_a_header_is_named(store: Store) -> None:
    with store.file_path(store.tape[0]).open("r+b") as file:
        file.write(bytes(64))
    refused(store.path, r"layer-000\.safetensors: header claims 0 bytes")


def test_a_store_without_a_configuration_is_incomplete(store: Store) -> None:
    (store.path / "config.json").unlink()
    refused(store.path, r"config\.json: missing; convert the model again")
