"""Shapes without weights are those of real stores, and those that ship with the package are today's."""

import shutil
from pathlib import Path

import pytest

from tests.commands import CHECKPOINT, make_mixture
from tiered.arch import load_config
from tiered.configs_path import config_dir
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.convert.synthetic import ShapeFile, shape_config
from tiered.plan.shapes import QUANTS, known_shapes, read_store_shape
from tiered.shapes import checkpoint_shapes, config_shapes, store_shape
from tiered.store import Store

MODELS = config_dir() / "models"


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_shapes_that_ship_are_those_that_the_converter_gives_today(name: str) -> None:
    made = config_shapes(shape_config(ShapeFile.read(MODELS / f"{name}.toml")))
    assert made == known_shapes(MODELS, name), "run 'python tools/model_shapes.py'"


@pytest.mark.parametrize("quant", QUANTS)
def test_the_shape_without_weights_is_that_of_the_converted_store(quant: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    convert_checkpoint(CHECKPOINT, store, ConvertOptions(quant=quant, compress="none"))
    made = checkpoint_shapes(str(CHECKPOINT), (quant,))
    assert made == {quant: store_shape(store)}


def test_the_shape_of_a_mixture_without_weights_is_that_of_its_store(tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(make_mixture(), store)
    quant = Store.open(store).manifest.quantization["layers"].partition("-")[0]
    found = store_shape(store)
    assert found.experts is not None
    assert config_shapes(load_config(store), (quant,)) == {quant: found}


def test_a_store_keeps_the_shape_that_has_been_made(tmp_path: Path) -> None:
    store = tmp_path / "store"
    convert_checkpoint(CHECKPOINT, store)
    assert read_store_shape(store) is None
    assert store_shape(store) == read_store_shape(store)
