"""Checkpoints of models that also see: their text half is converted, and computes what the whole one does with text."""

import json
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tests.answers import TOLERANCE, Answers, relative_error
from tests.convert.models import rewrite
from tests.quick import represented
from tests.runtimes import open_runtime, run_greedy
from tests.tiny import randomize
from tests.tiny_configs import tiny_config
from tiered.arch import FAMILIES
from tiered.arch.families import TEXT_HALVES
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import CheckpointError, UnsupportedFamilyError
from tiered.store import Store

PLAIN: Final = ConvertOptions(quant="none")
PROMPT: Final = [5, 17, 90, 33, 8, 140, 61, 12, 99, 4, 77]
_SEES: Final = {
    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
WHOLE: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "gemma3": ("gemma3_text", {"mm_tokens_per_image": 1, "tie_word_embeddings": True}),
    "gemma4": ("gemma4_text", {"tie_word_embeddings": True}),
    # The whole says that they are tied, its text half that they are not; the file has no head.
    "mistral3": ("mistral", {"tie_word_embeddings": True}),
    "llava": ("llama", {"tie_word_embeddings": False}),
    "llava_next": ("llama", {"tie_word_embeddings": False}),
    "vipllava": ("llama", {"tie_word_embeddings": False, "vision_feature_layers": [0]}),
    "internvl": ("qwen2", {"tie_word_embeddings": False}),
    "idefics3": ("llama", {"tie_word_embeddings": False}),
    "smolvlm": ("llama", {"tie_word_embeddings": False}),
    "llama4": ("llama4_text", {"tie_word_embeddings": False}),
    "qwen3_5": ("qwen3_5_text", {"tie_word_embeddings": False}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {"tie_word_embeddings": False}),
}
"""Text family and what else the whole configuration has, by the model's type."""


def whole_model(name: str, folder: Path) -> PreTrainedModel:
    """A tiny random model that sees too, saved in `folder`."""
    text, more = WHOLE[name]
    fields = {key: value for key, value in tiny_config(text).to_diff_dict().items() if key != "transformers_version"}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, text_config=fields, vision_config=_SEES, image_token_index=150, **more)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    randomize(model)
    model.save_pretrained(folder)
    model.eval()
    return model


def test_every_text_half_is_tested() -> None:
    assert set(WHOLE) == set(TEXT_HALVES)
    assert {text for texts in TEXT_HALVES.values() for text in texts} <= set(FAMILIES)
    assert all(text in TEXT_HALVES[name] for name, (text, _) in WHOLE.items())


@pytest.mark.parametrize("name", represented(WHOLE, ["gemma3", "llava", "qwen3_5"]))
def test_text_alone_gives_what_the_whole_model_gives(name: str, tmp_path: Path) -> None:
    whole = whole_model(name, tmp_path / "whole")
    # Of transformers 5.24, Llama 4's whole forward looks for pictures in what it returns, and fails without.
    forward = whole.get_submodule("language_model") if name == "llama4" else whole
    with torch.inference_mode():
        expected = forward(torch.tensor([PROMPT]), use_cache=False).logits[0]
    result = convert_checkpoint(tmp_path / "whole", tmp_path / "text", PLAIN)
    (said,) = result.warnings
    assert said.startswith("left out") and ("vision" in said or "visual" in said)
    store = Store.open(tmp_path / "text")
    assert store.manifest.architecture["model_type"] == WHOLE[name][0]
    assert store.manifest.tied == (whole.get_output_embeddings().weight is whole.get_input_embeddings().weight)
    assert json.loads((tmp_path / "text" / "config.json").read_text())["dtype"] == "float32"
    with open_runtime(store) as runtime:
        found = run_greedy(runtime, [PROMPT], steps=1)
    assert relative_error(found, Answers(((int(expected[-1].argmax()),),), (expected,))) <= TOLERANCE


def test_what_is_of_neither_half_and_what_is_twice_is_told(tmp_path: Path) -> None:
    whole_model("llava", tmp_path)
    (half,) = (prefix for prefix in ("language_model.model.", "model.language_model.") if has_prefix(tmp_path, prefix))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["mtp.layers.0.proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (said,) = convert_checkpoint(tmp_path, tmp_path / "store", PLAIN).warnings
    assert "mtp (1 tensors)" in said
    rewrite(tmp_path, lambda tensors: {**tensors, "model.norm.weight": tensors[f"{half}norm.weight"]})
    with pytest.raises(CheckpointError, match=r"both .*norm\.weight and .*norm\.weight, which are one tensor"):
        convert_checkpoint(tmp_path, tmp_path / "twice", PLAIN)


def has_prefix(folder: Path, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("bert", "model family 'bert'"), ("cohere2", "'llava' with a text half of family 'cohere2'.* may be llama")],
)
def test_a_text_half_that_is_not_known_to_compute_the_same_is_refused(text: str, message: str, tmp_path: Path) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": text}, "vision_config": _SEES}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedFamilyError, match=message):
        convert_checkpoint(tmp_path, tmp_path / "store", PLAIN)
