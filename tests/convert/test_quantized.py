"""A checkpoint whose quantization is not read is refused, however it says so, and so is one whose tensors are not what
their format has; what transformers leaves out is harmless."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.convert.models import expected_weights, read_store, rewrite, save_bin, save_model, tiny_model
from tests.quick import ONE_FORM
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.convert.quantized import refuse_left_over
from tiered.errors import CheckpointError

pytestmark = ONE_FORM

Tensors = dict[str, torch.Tensor]
PLAIN = ConvertOptions(quant="none")
PROJ = "model.layers.0.self_attn.q_proj"
STACK = "model.layers.0.mlp.experts.gate_up_proj"


def instead(**parts: torch.Tensor) -> Callable[[Tensors], Tensors]:
    """A weight replaced by `parts`, as which a method keeps it."""

    def change(tensors: Tensors) -> Tensors:
        kept = {name: tensor for name, tensor in tensors.items() if name != f"{PROJ}.weight"}
        return {**kept, **{f"{PROJ}.{part}": tensor for part, tensor in parts.items()}}

    return change


def beside(*names: str) -> Callable[[Tensors], Tensors]:
    """Tensors added to those of the model."""
    return lambda tensors: {**tensors, **{name: torch.ones(64) for name in names}}


CODES = torch.zeros(64, 8, dtype=torch.int32)
BYTES = torch.zeros(64, 32, dtype=torch.uint8)
REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "fp8 without scales": (lambda t: {**t, f"{PROJ}.weight": t[f"{PROJ}.weight"].to(torch.float8_e5m2)}, "fp8"),
    "a scale of activations": (beside(f"{PROJ}.input_scale"), "fp8 or int8"),
    "hqq": (instead(W_q=BYTES, scale=torch.ones(64, 1), zero=torch.ones(64, 1)), "hqq"),
    "aqlm": (instead(codes=BYTES, codebooks=torch.ones(1, 16, 8), scales=torch.ones(64)), "codebooks"),
    "quanto": (instead(**{"weight._data": BYTES, "weight._scale": torch.ones(64)}), "quanto"),
    "eetq": (instead(weight=BYTES.repeat(1, 2).view(torch.int8), weight_scales=torch.ones(64)), "mxfp4|fp8"),
    "int8 in the weight's place": (lambda t: {**t, f"{PROJ}.weight": t[f"{PROJ}.weight"].to(torch.int8)}, "int8"),
    "packed bytes in the weight's place": (lambda t: {**t, f"{PROJ}.weight": BYTES}, "packed in uint8"),
    "gptq without scales": (instead(qweight=CODES, qzeros=CODES), "gptq or awq"),
}
MISFITS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a scale in the model's type": (beside(f"{PROJ}.weight_scale"), r"expected 8 bits, found torch.float32"),
    "nvfp4 of another group size": (
        instead(weight=BYTES, weight_scale=torch.ones(64, 8).to(torch.float8_e4m3fn), weight_scale_2=torch.ones(1)),
        "expected one scale for all beside groups of 16",
    ),
    "nvfp4 without the scale for all": (
        instead(weight=BYTES, weight_scale=torch.ones(64, 4).to(torch.float8_e4m3fn)),
        "expected one scale for all",
    ),
    "gptq of another shape": (instead(qweight=CODES, qzeros=CODES, scales=torch.ones(1, 60)), "that fit"),
    "gptq in 3 bits": (
        instead(
            qweight=torch.zeros(6, 64, dtype=torch.int32),
            qzeros=torch.zeros(1, 6, dtype=torch.int32),
            scales=torch.ones(1, 64),
        ),
        "expected 2, 4 or 8 bits, found 3",
    ),
    "words without their shape": (instead(weight_packed=CODES, weight_scale=torch.ones(64, 1)), "weight_shape"),
    "fp8 in other blocks": (
        instead(weight=torch.zeros(64, 64).to(torch.float8_e4m3fn), weight_scale_inv=torch.ones(3, 3)),
        r"one for each 128 x 128 values of \[64, 64\], found \[3, 3\]",
    ),
    "bitsandbytes without its state": (
        instead(
            weight=BYTES.view(-1, 1),
            **{"weight.absmax": torch.ones(64), "weight.quant_map": torch.ones(16)},
            **{"weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)},
        ),
        "not what their format has",
    ),
}


@pytest.mark.parametrize(("change", "method"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_what_is_not_read_is_refused_without_a_word_in_its_configuration(
    change: Callable[[Tensors], Tensors], method: str, form: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    if form == "safetensors":
        rewrite(save_model(source, tiny_model("llama")), change)
    else:
        path = save_bin(source, tiny_model("llama")) / "pytorch_model.bin"
        torch.save(change(torch.load(path)), path)
    with pytest.raises(CheckpointError, match=rf"already quantized \(({method})\b.*not read; pass one that is"):
        convert_checkpoint(source, tmp_path / "out", PLAIN)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "reason"), MISFITS.values(), ids=MISFITS.keys())
def test_tensors_that_are_not_what_their_format_has_are_named(
    change: Callable[[Tensors], Tensors], reason: str, tmp_path: Path
) -> None:
    source = save_model(tmp_path / "source", tiny_model("llama"))
    rewrite(source, change)
    with pytest.raises(CheckpointError, match=rf"{PROJ}.weight: its tensors .*q_proj.*{reason}"):
        convert_checkpoint(source, tmp_path / "out", PLAIN)
    assert not (tmp_path / "out").exists()


def test_four_bit_types_that_torch_has_no_size_for_are_refused(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("llama"))
    path = source / "model.safetensors"
    content = path.read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    table = json.loads(header)
    del table["__metadata__"]
    for entry in table.values():
        entry["dtype"], entry["shape"] = "F4", [8 * n if i == 0 else n for i, n in enumerate(entry["shape"])]
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + len(header) :])
    with pytest.raises(CheckpointError, match=r"has dtype 'F4'; .*already quantized"):
        convert_checkpoint(source, tmp_path / "out", PLAIN)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_what_the_configuration_says_is_named(key: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("llama"))
    config = json.loads((source / "config.json").read_text())
    for method, error in (("hqq", r"already quantized \(hqq\)"), ("gptq", r"\(gptq, by config.json, but none")):
        (source / "config.json").write_text(json.dumps({**config, key: {"quant_method": method}}))
        with pytest.raises(CheckpointError, match=error):
            convert_checkpoint(source, tmp_path / "out", PLAIN)


def test_parts_of_weights_are_not_left_out_whatever_they_are_called(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tiny_model("llama"))
    rewrite(source, beside(f"{PROJ}.lora_A.weight", f"{PROJ}.lora_B.weight"))
    with pytest.raises(CheckpointError, match=r"2 parts of weights that the model has no place for .*lora_A"):
        convert_checkpoint(source, tmp_path / "out", PLAIN)


def test_stacks_of_experts_have_parts_too() -> None:
    with pytest.raises(CheckpointError, match=r"already quantized \(mxfp4: it has .*_blocks"):
        refuse_left_over([f"{STACK}_blocks", f"{STACK}_scales"], [STACK])
    with pytest.raises(CheckpointError, match=r"1 parts of weights"):
        refuse_left_over([f"{STACK}_novel"], [STACK])


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.0.self_attn.rotary_emb.inv_freq"],
        ["model.layers.0.self_attn.bias", "model.layers.0.self_attn.masked_bias"],
        [f"{PROJ}.bias"],
        [f"{PROJ}.k_scale", f"{PROJ}.v_scale", "model.layers.0.self_attn.kv_scale"],
        ["model.layers.9.self_attn.q_proj.weight", "score.weight", "v_head.summary.weight"],
        ["model.embed_positions.position_ids"],
    ],
    ids=lambda names: names[0],
)
def test_what_transformers_leaves_out_without_harm_is_left_out(names: list[str], tmp_path: Path) -> None:
    """Frequencies, masks, biases and layers that config.json does without, heads of other tasks, scales of a cache."""
    model = tiny_model("llama")
    rewrite(save_model(tmp_path / "source", model), beside(*names))
    convert_checkpoint(tmp_path / "source", tmp_path / "out", PLAIN)
    found, expected = read_store(tmp_path / "out"), expected_weights(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_notes_of_quantization_beside_plain_weights_are_no_obstacle(tmp_path: Path) -> None:
    """They are left where somebody has dequantized a checkpoint; the tensors tell."""
    source = save_model(tmp_path / "source", tiny_model("llama"))
    for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json"):
        (source / name).write_text('{"bits": 4}')
    convert_checkpoint(source, tmp_path / "out", PLAIN)
