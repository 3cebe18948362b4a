"""Every shipped model shape builds the model it is named for, and every shipped machine is a plausible one."""

import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tiered.arch import layer_configs
from tiered.configs_path import config_dir
from tiered.plan.machines import hardware_files, load_hardware

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
    "gpt-oss-20b": 20.915e9,
    "gpt-oss-120b": 116.829e9,
    "deepseek-v3": 671.026e9,  # without that layer, as well
    "llama-4-scout": 107.770e9,  # the text half
    "qwen3-next-80b-a3b": 79.674e9,  # without its further layer, too
    "qwen3.5-9b": 8.954e9,  # the text half, and of the next
    "qwen3.5-35b-a3b": 34.661e9,
    "lfm2-1.2b": 1.170e9,
    "gemma-4-e2b": 4.629e9,  # the text half
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
    # Gemma 4 gives its layers of the other kind this one.
    wide = expected.pop("global_head_dim", None)
    assert wide is None or wide in {layer.head_dim for layer in layer_configs(config)}
    for key, value in expected.items():
        assert known[key] == value, key
    # A misspelt key would be kept as an attribute that no class knows.
    assert set(expected) <= set(type(config)().to_dict()) | {"head_dim"}


@pytest.mark.inputs("configs/models")
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


MACHINES: Final = list(hardware_files())


def test_the_machines_are_these() -> None:
    known = ["cloud-96vcpu", "desktop-2025", "epyc-7742", "h100-server", "laptop-16gb", "t4-208gb", "vm-small"]
    assert [*known, "xeon-6426y-2s-256gb"] == MACHINES


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_is_in_bytes_and_seconds(name: str) -> None:
    machine = load_hardware(name)
    cpu, disk, gpu = machine.cpu, machine.disk, machine.gpu
    assert not machine.is_measured and machine.source
    assert 8e9 <= machine.ram < 4e12
    assert 5e7 < disk.write <= disk.read < min(5e10, cpu.memory)
    assert 1e10 < cpu.memory < 1e12 and cpu.attention <= cpu.memory
    # Of a core: more than a scalar one, less than the best matrix unit.
    assert 1e10 < cpu.prefill_attention / cpu.cores < 2e12
    for scheme in ("int4-g64", "int8-g64", "none"):
        assert 1e-13 < cpu.linear_rate(scheme, "invariant").seconds(1, 1) < 1e-9
    if gpu is not None:
        assert 4e9 < gpu.vram < 2e11
        assert 5e9 < min(gpu.host_to_device, gpu.device_to_host) <= gpu.host_to_device < gpu.memory < 1e13
        assert 1e13 < gpu.flops < 3e15
    assert machine.usd_per_hour is None or 0.01 < machine.usd_per_hour < 200


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_says_where_each_figure_is_from(name: str) -> None:
    text = hardware_files()[name].read_text(encoding="utf-8")
    assert "data sheet" in text and "assumption" in text
    table = ""
    for number, line in enumerate(text.splitlines()):
        table = line if line.startswith("[") else table
        if line.startswith(("memory =", "flops =", "read =", "write =")):
            section = text.splitlines()[:number]
            # A comment of its own, or one at the head of the table for all that follows.
            assert "#" in line or any(above.startswith("#") for above in section[section.index(table) :]), line
