"""Mixtures of experts: published checkpoints hold every expert's matrices apart, a store one stack of all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.convert.models import expected_weights, read_store, rewrite, save_bin, save_model, tiny_model
from tests.tiny_configs import tiny_config
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import CheckpointError
from tiered.store import Store

PLAIN = ConvertOptions(quant="none")
EXPERT = "model.layers.1.block_sparse_moe.experts.2"
STACK = "model.layers.1.mlp.experts"

Tensors = dict[str, torch.Tensor]


def test_a_stack_is_gate_above_up_of_one_expert_after_the_other(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("mixtral"))
    published = load_file(source / "model.safetensors")
    assert "model.layers.1.block_sparse_moe.gate.weight" in published
    convert_checkpoint(source, tmp_path / "out", PLAIN)
    found = read_store(tmp_path / "out")
    parts = [published[f"{EXPERT}.{matrix}.weight"] for matrix in ("w1", "w3")]
    assert torch.equal(found[f"{STACK}.gate_up_proj"][2], torch.cat(parts))
    assert torch.equal(found[f"{STACK}.down_proj"][2], published[f"{EXPERT}.w2.weight"])


def test_a_checkpoint_may_hold_whole_stacks(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    source = save_model(tmp_path / "source", model)
    rewrite(source, lambda _: expected_weights(model))
    convert_checkpoint(source, tmp_path / "out", PLAIN)
    found = read_store(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected_weights(model).items())


@pytest.mark.parametrize(
    ("quant", "fused"), [("int4", False), ("int4", True), ("int8", False), ("int8", True), ("nf4-g64", False)]
)
def test_a_stack_is_quantized_expert_by_expert(quant: str, fused: bool, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    (save_bin if fused else save_model)(tmp_path / "source", model)
    result = convert_checkpoint(tmp_path / "source", tmp_path / "out", ConvertOptions(quant=quant))
    # Rows of 96 are no whole groups.
    assert set(result.unquantized) == {f"model.layers.{i}.mlp.experts.down_proj" for i in range(3)}
    store = Store.open(tmp_path / "out")
    weights = store.layout(store.blocks["layer-001"]).weights
    stack, router = weights[f"{STACK}.gate_up_proj"], weights["model.layers.1.mlp.gate.weight"]
    assert stack.shape == (3, 192, 64) and [stack.parts[f"scale#{k}"].shape for k in range(3)] == 3 * [(192, 1)]
    assert router.scheme is None
    found, expected = read_store(tmp_path / "out")[f"{STACK}.gate_up_proj"], expected_weights(model)
    error = (found - expected[f"{STACK}.gate_up_proj"]).norm() / found.norm()
    assert error < (0.01 if quant == "int8" else 0.12)


def test_experts_in_several_files_make_one_stack(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    source = save_model(tmp_path / "source", model)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    for number in range(2):
        part = dict(list(tensors.items())[number::2])
        save_file(part, source / f"model-0000{number + 1}-of-00002.safetensors", metadata={"format": "pt"})
    convert_checkpoint(source, tmp_path / "out", PLAIN)
    found = read_store(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected_weights(model).items())


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def replaced(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{EXPERT}.w3.weight"), rf"lacks 1 of the .* tensors .*{EXPERT}\.w3\.weight"),
        (replaced(f"{EXPERT}.w2.weight", torch.zeros(96, 64)), r"w2.weight is \[96, 64\], expected \[64, 96\]"),
        (replaced(f"{EXPERT}.w2.weight", torch.zeros(64, 96).half()), r"w2.weight holds torch.float16, others of"),
    ],
    ids=["missing", "shape", "dtype"],
)
def test_an_expert_that_does_not_fit_its_stack_is_named(
    change: Callable[[Tensors], Tensors], message: str, tmp_path: Path
) -> None:
    source = save_model(tmp_path / "source", tiny_model("mixtral"))
    rewrite(source, change)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(source, tmp_path / "out", PLAIN)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "published"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.2.gate_proj.weight"),
        ("glm4_moe", "model.layers.1.mlp.experts.2.gate_proj.weight"),
    ],
)
def test_published_names_of_experts_are_found(family: str, published: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    source = save_model(tmp_path / "source", model)
    tensors = load_file(source / "model.safetensors")
    assert published in tensors and not any(name.endswith("gate_up_proj") for name in tensors)
    # GLM-4.5 comes with one more layer, which predicts the token after the next.
    more = {f"model.layers.{model.config.num_hidden_layers}.eh_proj.weight": torch.zeros(64, 128)}
    rewrite(source, lambda tensors: {**tensors, **more})
    result = convert_checkpoint(source, tmp_path / "out", PLAIN)
    assert all("left out" in warning and next(iter(more)) in warning for warning in result.warnings)
    found = read_store(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected_weights(model).items())
    units = Store.open(tmp_path / "out").expert_units
    assert [unit.name for unit in units[1]] == [f"mlp.experts#{n}" for n in range(len(units[1]))] != []
