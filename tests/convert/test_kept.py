"""Models from checkpoints that are quantized: what is kept, what is not and at which error, what they generate."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.convert.models import read_store
from tests.convert.test_published import FORMATS, KEPT, opened, parts_of, read
from tests.helpers import assert_same, load_stored_weights, open_runtime, randomize, reference_answers, run_greedy
from tiered.cli.convert import summary
from tiered.convert import ConvertOptions, ConvertResult, convert_checkpoint
from tiered.errors import CheckpointError, ConfigError
from tiered.store import Store

PROMPTS: Final = ([5, 60, 7, 33, 21, 9], [40, 3, 12])
STEPS: Final = 4
QUANTIZED: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
"""Those of a layer's modules that have the shape of the libraries' weights, [64, 128]."""


def model(layers: int = 1) -> PreTrainedModel:
    """A Llama model in float32; its head has the shape of the libraries' weights too."""
    config = AutoConfig.for_model(
        "llama",
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


def test_an_unknown_companion_of_a_quantized_weight_is_refused(tmp_path: Path) -> None:
    """ModelOpt's AWQ divides what comes into a layer by it."""
    made = model()
    source = checkpoint(tmp_path / "source", made, {"model.layers.0.mlp.up_proj": "ct-fp8"}, {"quant_method": "fp8"})
    path = source / "model.safetensors"
    from safetensors.torch import load_file

    save_file({**load_file(path), "model.layers.0.mlp.up_proj.pre_quant_scale": torch.ones(128)}, path)
    with pytest.raises(CheckpointError, match=r"1 parts of weights that the model has no place for .*pre_quant_scale"):
        convert_checkpoint(source, tmp_path / "out")


def test_there_is_nothing_to_keep_in_a_plain_checkpoint(tmp_path: Path) -> None:
    made = model()
    made.save_pretrained(tmp_path / "source")
    with pytest.raises(ConfigError, match=r"--quant keep: no weights of this checkpoint are quantized; pass --quant"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", ConvertOptions(quant="keep"))
