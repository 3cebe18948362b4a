"""Shapes without weights are those of real stores, and those that ship with the package are today's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import CHECKPOINT, make_mixture
from tests.convert.models import save_bin, save_model, tiny_model
from tiered.arch import load_config
from tiered.configs_path import config_dir
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.convert.synthetic import ShapeFile, shape_config
from tiered.errors import CheckpointError
from tiered.options import Options
from tiered.plan.shapes import QUANTS, known_shapes, read_store_shape
from tiered.prepare import measure_inputs
from tiered.shapes import config_shapes, outline, store_shape
from tiered.store import Store
from tiered.units import GIB

MODELS = config_dir() / "models"


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_shapes_that_ship_are_those_that_the_converter_gives_today(name: str) -> None:
    made = config_shapes(shape_config(ShapeFile.read(MODELS / f"{name}.toml")))
    assert made == known_shapes(MODELS, name), "run 'python tools/model_shapes.py'"


@pytest.mark.parametrize("quant", QUANTS)
def test_the_shape_without_weights_is_that_of_the_converted_store(quant: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    convert_checkpoint(CHECKPOINT, store, ConvertOptions(quant=quant, compress="none"))
    assert outline(str(CHECKPOINT), (quant,)).shapes == {quant: store_shape(store)}


def test_headers_tell_what_configuration_does_not(tmp_path: Path) -> None:
    save_model(tmp_path / "wide", tiny_model("llama"))
    claims = json.loads((tmp_path / "wide/config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "wide/config.json").write_text(json.dumps(claims))
    convert_checkpoint(tmp_path / "wide", tmp_path / "store", ConvertOptions(quant="none", compress="none"))
    found = outline(str(tmp_path / "wide"), ("none",))
    assert found.shapes == {"none": store_shape(tmp_path / "store")}
    assert found.shapes != config_shapes(load_config(tmp_path / "wide"), ("none",))


def test_weights_that_are_quantized_already_are_refused_before_they_are_fetched(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model("llama"))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.layers.0.mlp.up_proj.qweight": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="already quantized"):
        outline(str(tmp_path))


def test_without_safetensors_the_configuration_counts_and_that_is_said(tmp_path: Path) -> None:
    (note,) = outline(str(save_bin(tmp_path / "bin", tiny_model("llama"))), ("int4",)).notes
    assert "no safetensors files were found, so weights are taken to be what config.json says" in note


def test_the_shape_of_a_mixture_without_weights_is_that_of_its_store(tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(make_mixture(), store)
    quant = Store.open(store).manifest.quantization["layers"].partition("-")[0]
    found = store_shape(store)
    assert found.experts is not None
    assert config_shapes(load_config(store), (quant,)) == {quant: found}


def test_a_run_takes_what_is_counted_of_a_graph_from_the_shape_that_its_store_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    shutil.copytree(make_mixture(), store)
    kept = store_shape(store)
    assert kept.experts is not None and kept.operations and kept.experts.operations
    monkeypatch.setattr("tiered.model.shape.work_of_layers", lambda _: pytest.fail("counted again"))
    assert measure_inputs(Store.open(store), Options(ram=8 * GIB))[0] == kept


def test_a_store_keeps_the_shape_that_has_been_made(tmp_path: Path) -> None:
    store = tmp_path / "store"
    convert_checkpoint(CHECKPOINT, store)
    assert read_store_shape(store) is None
    assert store_shape(store) == read_store_shape(store)
