"""Models from checkpoints that are quantized: what is kept, what is not and at which error, what they generate."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.answers import assert_same, reference_answers
from tests.convert.models import read_store
from tests.convert.test_published import FORMATS, KEPT, opened, parts_of, read
from tests.runtimes import open_runtime, run_greedy
from tests.tiny import Tiny, load_stored_weights, prompts_for, randomize
from tiered.cli.convert import summary
from tiered.convert import ConvertOptions, ConvertResult, convert_checkpoint
from tiered.errors import CheckpointError, ConfigError
from tiered.store import Store

PROMPTS: Final = ([5, 60, 7, 33, 21, 9], [40, 3, 12])
STEPS: Final = 4
QUANTIZED: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
"""Those of a layer's modules that have the shape of the libraries' weights, [64, 128]."""


def model(layers: int = 1, family: str = "llama", **fields: Any) -> PreTrainedModel:
    """A model in float32; its head has the shape of the libraries' weights too."""
    config = AutoConfig.for_model(
        family,
        **fields,
        vocab_size=64,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=32,
        eos_token_id=None,
    )
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(made)
    made.generation_config.eos_token_id = None
    return made


def checkpoint(folder: Path, made: PreTrainedModel, formats: Mapping[str, str], config: Mapping[str, Any]) -> Path:
    """A checkpoint of `made`, whose modules that `formats` names are in the libraries' weights; `made` gets what these
    dequantize to."""
    made.save_pretrained(folder)
    state = dict(made.state_dict())
    numbers: dict[str, torch.Tensor] = {}
    for module, name in formats.items():
        del state[f"{module}.weight"]
        state |= {f"{module}.{part}": tensor for part, tensor in parts_of(name).items()}
        if name not in numbers:
            given = {f"x.{part}": tensor for part, tensor in parts_of(name).items()}
            index, path = opened(folder / name, given, FORMATS[name]["config"])
            numbers[name] = read(index, path)
            index.reader.close()
            path.unlink()
            path.parent.rmdir()
        with torch.no_grad():
            made.get_parameter(f"{module}.weight").copy_(numbers[name])
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": config}))
    return folder


def taken(result: ConvertResult) -> dict[tuple[str, str], int]:
    """How many weights of which method are in which form."""
    return {(each.method, each.form): each.weights for each in result.taken}


@pytest.mark.parametrize(
    "name", ["gptq", "awq", "ct-int4", "ct-mxfp4", "bnb-nf4-nested", "ct-fp8", "ct-nvfp4", "gptq-act-order"]
)
def test_a_quantized_model_generates_what_its_dequantized_weights_do(name: str, tmp_path: Path) -> None:
    made = model()
    formats = {f"model.layers.0.{module}": name for module in QUANTIZED}
    source = checkpoint(tmp_path / "source", made, formats, FORMATS[name]["config"])
    result = convert_checkpoint(source, tmp_path / "out", ConvertOptions(compress="none"))
    ((method, form),) = taken(result)
    (one,) = result.taken
    assert form == (KEPT[name] or "int8-g64") and one.weights == len(QUANTIZED)
    said = summary(result)
    store = Store.open(result.store)
    if KEPT[name] is None:
        # FP8 has steps of 3 %, its 8 bits for a group of 64 of some 0.6 %.
        assert 0.001 < one.added < 0.01 and f"{method}: 5 weights in int8-g64, which adds an error of 0." in said
        load_stored_weights(made, store)
    else:
        assert one.added == 0.0 and f"{method}: 5 weights in {form}, as they were" in said
    plain = "not quantized: 2 weights that the checkpoint has not quantized either; --quant int4 or int8 does (model.la"
    assert plain in said
    assert store.manifest.quantization["layers"] == form and store.manifest.quantization["source"] == [method]
    with open_runtime(store) as runtime:
        assert_same(run_greedy(runtime, PROMPTS, steps=STEPS), reference_answers(made, PROMPTS, STEPS))


def test_every_module_may_have_a_format_of_its_own_and_the_head_too(tmp_path: Path) -> None:
    """What is plain, as ignore lists leave it, stays plain; scales that float16 does not hold are rounded, and said."""
    made = model(layers=2)
    formats = {
        "model.layers.0.self_attn.q_proj": "gptq-8bit",
        "model.layers.0.self_attn.k_proj": "awq",
        "model.layers.0.self_attn.v_proj": "ct-int4-channel",
        "model.layers.1.self_attn.q_proj": "bnb-nf4",
        "model.layers.1.self_attn.v_proj": "bnb-fp4",
        "model.layers.1.mlp.up_proj": "ct-int8",
        "lm_head": "gptq-symmetric",
    }
    source = checkpoint(tmp_path / "source", made, formats, {"quant_method": "compressed-tensors"})
    results = {
        quant: convert_checkpoint(source, tmp_path / str(quant), ConvertOptions(quant=quant, compress="none"))
        for quant in (None, "keep", "int4", "none")
    }
    expected = {
        ("gptq int8", "int8-g64"): 1,
        ("awq int4", "int4-g64"): 1,
        ("compressed-tensors int4", "int4-g128"): 1,
        ("bitsandbytes nf4", "nf4-g64"): 1,
        ("bitsandbytes fp4", "int8-g64"): 1,
        ("int8", "int8-g128, scales rounded"): 1,
        ("gptq int4", "int4-g128"): 1,
    }
    assert taken(results[None]) == expected == taken(results["keep"])
    rounded = next(each for each in results["keep"].taken if "rounded" in each.form)
    assert 0 < rounded.added < 2**-11
    stored = read_store(results["keep"].store)
    for name, parameter in made.named_parameters():
        if name.removesuffix(".weight") in formats and "1.self_attn.v_proj" not in name and "up_proj" not in name:
            assert torch.equal(stored[name], parameter), name
    assert torch.equal(stored["model.layers.0.mlp.gate_proj.weight"], made.model.layers[0].mlp.gate_proj.weight)
    in_four = taken(results["int4"])  # what has more bits is quantized anew, and so is what is plain
    assert in_four["gptq int8", "int4-g64"] == 1 and in_four["awq int4", "int4-g64"] == 1
    assert in_four["bitsandbytes nf4", "nf4-g64"] == 1
    assert {form for _, form in taken(results["none"])} == {"float32"}
    load_stored_weights(made, Store.open(results["keep"].store))
    with open_runtime(Store.open(results["keep"].store)) as runtime:
        assert_same(run_greedy(runtime, PROMPTS, steps=STEPS), reference_answers(made, PROMPTS, STEPS))


def test_a_stack_is_put_together_from_the_codes_of_its_experts(tmp_path: Path) -> None:
    """As mixtures are published, each expert's matrices by themselves; of one stack no gates are quantized."""
    made = model(family="qwen3_moe", layers=2, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=64)
    made.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    state, parts = load_file(path), parts_of("ct-int4")
    given = {f"x.{part}": tensor for part, tensor in parts.items()}
    index, file = opened(tmp_path / "parts", given, {})
    values = read(index, file)
    index.reader.close()
    for layer, expert, matrix in ((0, n, m) for n in range(3) for m in ("gate_proj", "up_proj")):
        del state[f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"]
        name = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}"
        state |= {f"{name}.{part}": tensor.clone() for part, tensor in parts.items()}
    del state["model.layers.1.mlp.experts.0.up_proj.weight"]
    state |= {f"model.layers.1.mlp.experts.0.up_proj.{part}": tensor for part, tensor in parts.items()}
    save_file(state, path)
    with torch.no_grad():
        made.get_parameter("model.layers.0.mlp.experts.gate_up_proj").copy_(values.repeat(6, 1).view(3, 128, 128))
    result = convert_checkpoint(tmp_path / "source", tmp_path / "out", ConvertOptions(compress="none"))
    assert taken(result) == {("compressed-tensors int4", "int4-g32"): 1, ("compressed-tensors int4", "int8-g64"): 1}
    store = Store.open(result.store)
    stored = read_store(store.path)
    assert torch.equal(stored["model.layers.0.mlp.experts.gate_up_proj"], values.repeat(6, 1).view(3, 128, 128))
    load_stored_weights(made, store)
    with open_runtime(store) as runtime:
        assert_same(run_greedy(runtime, PROMPTS, steps=STEPS), reference_answers(made, PROMPTS, STEPS))


def test_the_experts_of_gpt_oss_are_taken_in_mxfp4_as_they_lie(tiny: Tiny, tmp_path: Path) -> None:
    """Its model has them as [experts, in, out], its checkpoint as blocks of [experts, out, in]."""
    made = tiny.model("gpt_oss")
    made.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    state = load_file(path)
    generator = torch.Generator().manual_seed(5)
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, in_, out = state.pop(name).shape
        blocks = torch.randint(0, 256, (experts, out, in_ // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(122, 125, (experts, out, in_ // 32), dtype=torch.uint8, generator=generator)
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        with torch.no_grad():
            values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            made.get_parameter(name).copy_(values)
    save_file(state, path)
    config = json.loads((path.parent / "config.json").read_text())
    given = {**config, "quantization_config": {"quant_method": "mxfp4"}}
    (path.parent / "config.json").write_text(json.dumps(given))
    result = convert_checkpoint(path.parent, tmp_path / "out", ConvertOptions(compress="none"))
    assert taken(result) == {("mxfp4", "mxfp4-g32"): 6}
    prompts = prompts_for("gpt_oss")
    with open_runtime(Store.open(result.store)) as runtime:
        assert_same(run_greedy(runtime, prompts, steps=STEPS), reference_answers(made, prompts, STEPS))


def test_an_unknown_companion_of_a_quantized_weight_is_refused(tmp_path: Path) -> None:
    """ModelOpt's AWQ divides what comes into a layer by it."""
    made = model()
    source = checkpoint(tmp_path / "source", made, {"model.layers.0.mlp.up_proj": "ct-fp8"}, {"quant_method": "fp8"})
    path = source / "model.safetensors"
    save_file({**load_file(path), "model.layers.0.mlp.up_proj.pre_quant_scale": torch.ones(128)}, path)
    with pytest.raises(CheckpointError, match=r"1 parts of weights that the model has no place for .*pre_quant_scale"):
        convert_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "part", "scale"),
    [("gptq", "scales", torch.inf), ("ct-int4", "weight_scale", 1e6), ("ct-mxfp4", "weight_scale", 255)],
)
def test_a_scale_that_is_no_number_is_not_kept(name: str, part: str, scale: float, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", model(), {"model.layers.0.mlp.up_proj": name}, FORMATS[name]["config"])
    path = source / "model.safetensors"
    tensors = load_file(path)
    key = f"model.layers.0.mlp.up_proj.{part}"
    tensors[key] = tensors[key].float() if scale == 1e6 else tensors[key]
    tensors[key].view(-1)[3] = scale
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"up_proj.weight: expected finite scales that fit"):
        convert_checkpoint(source, tmp_path / "out")


def test_weights_that_are_rotated_are_refused_as_no_tensor_tells(tmp_path: Path) -> None:
    """Their layers turn what comes in."""
    config = {**FORMATS["ct-int4"]["config"], "transform_config": {"config_groups": {"R4": {"type": "hadamard"}}}}
    source = checkpoint(tmp_path / "source", model(), {"model.layers.0.mlp.up_proj": "ct-int4"}, config)
    with pytest.raises(CheckpointError, match="rotated weights: transform_config"):
        convert_checkpoint(source, tmp_path / "out")


def test_there_is_nothing_to_keep_in_a_plain_checkpoint(tmp_path: Path) -> None:
    made = model()
    made.save_pretrained(tmp_path / "source")
    with pytest.raises(ConfigError, match=r"--quant keep: no weights of this checkpoint are quantized; pass --quant"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", ConvertOptions(quant="keep"))


def test_the_added_error_is_that_of_rows_from_all_over_a_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rows have scales that 16 bits hold: nothing changes in them."""
    source = checkpoint(tmp_path / "source", model(), {"lm_head": "ct-int8"}, FORMATS["ct-int8"]["config"])
    file = source / "model.safetensors"
    tensors = load_file(file)
    scale = tensors["lm_head.weight_scale"]
    scale[:32] = scale[:32].half().float()
    save_file(tensors, file)
    monkeypatch.setattr("tiered.convert.stored_rows._SAMPLE_NUMEL", 256)  # two rows
    (one,) = convert_checkpoint(source, tmp_path / "out", ConvertOptions(compress="none")).taken
    assert "rounded" in one.form and 0 < one.added < 2**-11
