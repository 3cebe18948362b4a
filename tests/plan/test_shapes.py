"""Shapes as JSON: what is written is read back, and a store's is believed only while the store is the same."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.plan.plans import mixture_of, model_of
from tiered.configs_path import config_dir
from tiered.plan import KVShape, ModelShape, layer_groups
from tiered.plan.shapes import (
    QUANTS,
    SHAPES_NAME,
    STORE_SHAPE_NAME,
    digest,
    known_shapes,
    positions_of,
    read_store_shape,
    shape_from_json,
    shape_to_json,
    write_store_shape,
)

MODELS = config_dir() / "models"
SMALL = KVShape(1, 8, 8, "bfloat16")
MIXTURE = mixture_of([5, 5, 7, 9], count=4, chosen=2, nbytes=3)


def test_a_shape_is_read_back_as_it_was() -> None:
    shapes = (SMALL, None, SMALL, replace(SMALL, value_dim=64))
    windows = replace(model_of([3, 3, 3, 4], layers=4), groups=layer_groups((0, 8, 0, 8), shapes))
    for shape in (model_of(), windows, MIXTURE):
        assert shape_from_json(json.loads(json.dumps(shape_to_json(shape)))) == shape


def test_equal_layers_are_written_once() -> None:
    assert len(json.dumps(shape_to_json(model_of([3] * 400)))) < 1000


def test_all_known_models_have_shapes_made_of_what_their_files_say_today() -> None:
    table = json.loads((MODELS / SHAPES_NAME).read_text())
    found = {name: value["of"] for name, value in table.items()}
    expected = {path.stem: digest(path) for path in MODELS.glob("*.toml")}
    assert found == expected, "run 'python tools/model_shapes.py'"


def test_known_shapes_are_found_by_name_and_differ_in_their_bytes() -> None:
    shapes = known_shapes(MODELS, "opt-175b")
    assert shapes is not None and tuple(shapes) == QUANTS
    small, middle, large = (shape.tape.total for shape in shapes.values())
    assert small < middle < large
    assert shapes["int4"].weights == shapes["none"].weights > 174e9
    assert known_shapes(MODELS, "opt-176b") is None


def kept(folder: Path, shape: ModelShape) -> ModelShape | None:
    for name in ("manifest.json", "config.json"):
        (folder / name).write_text("{}")
    write_store_shape(folder, shape)
    return read_store_shape(folder)


def test_a_store_keeps_its_shape(tmp_path: Path) -> None:
    assert read_store_shape(tmp_path) is None
    assert kept(tmp_path, MIXTURE) == MIXTURE


def test_a_shape_that_cannot_be_kept_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        kept(tmp_path, MIXTURE)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", "config.json"}


def test_a_store_that_has_changed_has_no_shape(tmp_path: Path) -> None:
    assert kept(tmp_path, MIXTURE) is not None
    (tmp_path / "config.json").write_text('{"changed": true}')
    assert read_store_shape(tmp_path) is None


def test_a_damaged_shape_is_none(tmp_path: Path) -> None:
    assert kept(tmp_path, MIXTURE) is not None
    for text in ("", "[]", '{"of": 1}', '{"shape": {}, "of": []}'):
        (tmp_path / STORE_SHAPE_NAME).write_text(text)
        assert read_store_shape(tmp_path) is None


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 2048, "n_positions": 5}, 2048),
        ({"n_positions": 1024}, 1024),
        ({"max_seq_len": 4096}, 4096),
        ({"seq_length": 2048}, None),
        ({"max_position_embeddings": "many"}, None),
        ({"max_position_embeddings": 0}, None),
    ],
)
def test_positions_are_found_by_any_of_their_names(config: dict[str, Any], positions: int | None) -> None:
    assert positions_of(config) == positions
