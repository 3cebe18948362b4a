"""Every shipped model shape builds the model it is named for."""

import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tiered.configs_path import config_dir

SHAPES: Final = sorted((config_dir() / "models").glob("*.toml"))
PARAMETERS: Final = {
    "opt-125m": 0.125e9,
    "opt-350m": 0.331e9,  # what its tensors hold, whatever the name says
    "opt-1.3b": 1.316e9,
    "opt-2.7b": 2.652e9,
    "opt-6.7b": 6.658e9,
    "opt-13b": 12.853e9,
    "opt-30b": 29.975e9,
    "opt-66b": 65.720e9,
    "opt-175b": 174.604e9,
    "llama-3.2-1b": 1.236e9,
    "llama-3.1-8b": 8.030e9,
    "llama-3.1-70b": 70.554e9,
    "mistral-7b": 7.242e9,
    "qwen3-8b": 8.191e9,
    "qwen3-32b": 32.762e9,
    "mixtral-8x7b": 46.703e9,
    "qwen3-30b-a3b": 30.532e9,
    "qwen3-235b-a22b": 235.094e9,
    "glm-4.5-air": 106.852e9,  # without the layer that predicts further tokens
}


def load(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def build_config(shape: dict[str, Any]) -> PreTrainedConfig:
    arguments = dict(shape["config"])
    config: PreTrainedConfig = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    return config


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_shape_builds_its_config(path: Path) -> None:
    shape = load(path)
    assert shape["name"] == path.stem
    assert set(shape) <= {"name", "hub_id", "config"}
    config = build_config(shape)
    known = config.to_dict()
    expected = dict(shape["config"])
    assert config.dtype == getattr(torch, expected.pop("dtype"))
    for key, value in expected.items():
        assert known[key] == value, key
    # A misspelt key would be kept as an attribute that no class knows.
    assert set(expected) <= set(type(config)().to_dict()) | {"head_dim"}


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_shape_has_the_parameters_of_its_name(path: Path) -> None:
    config = build_config(load(path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = sum(parameter.numel() for parameter in model.parameters())
    if path.stem.startswith("tiny-"):
        assert found < 1e6
    else:
        assert found == pytest.approx(PARAMETERS[path.stem], rel=0.005)


def test_every_published_shape_names_its_checkpoint() -> None:
    unpublished = {path.stem for path in SHAPES if "hub_id" not in load(path)}
    assert unpublished == {"opt-175b", "tiny-llama", "tiny-opt"}
