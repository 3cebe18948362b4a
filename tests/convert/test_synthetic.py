"""Stores of random weights: any shape, no checkpoint."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.convert.models import read_store, store_digest
from tests.quick import represented
from tiered.arch import build_skeleton, load_config
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.convert.synthetic import EOS_ID
from tiered.errors import ConfigError
from tiered.model import check_match
from tiered.store import Store

DEEP = """
name = "deep"
[config]
model_type = "{family}"
vocab_size = 300
hidden_size = 64
num_hidden_layers = 24
num_attention_heads = 4
max_position_embeddings = 64
"""
SIZES = {"mixtral": "num_key_value_heads = 4\nintermediate_size = 96\n"}
"""Of families whose defaults are large."""


def options(**fields: object) -> ConvertOptions:
    return ConvertOptions(synthetic=True, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tiny-opt", "tiny-llama"])
@pytest.mark.parametrize("quant", ["int4", "int8", "none"])
def test_a_known_shape_becomes_a_store(name: str, quant: str, tmp_path: Path) -> None:
    result = convert_checkpoint(name, tmp_path / "out", options(quant=quant))
    store = Store.open(tmp_path / "out")
    assert result.synthetic and store.manifest.synthetic and store.manifest.distinct_blocks is None
    assert store.manifest.source["kind"] == "synthetic" and store.manifest.source["name"] == name
    weights = read_store(tmp_path / "out")
    assert all(bool(tensor.float().isfinite().all()) for tensor in weights.values())
    config = load_config(tmp_path / "out")
    assert config.dtype == torch.bfloat16 and config.eos_token_id == EOS_ID


@pytest.mark.parametrize(
    ("family", "quant"),
    represented(
        [("llama", "none"), *((name, "int4") for name in ("llama", "opt", "gpt_neox", "bloom", "falcon", "mixtral"))],
        [("mixtral", "int4")],
    ),
)
def test_logits_stay_finite_and_of_size_one_at_depth(family: str, quant: str, tmp_path: Path) -> None:
    shape = tmp_path / "deep.toml"
    shape.write_text(DEEP.format(family=family) + SIZES.get(family, ""))
    convert_checkpoint(shape, tmp_path / "out", options(quant=quant))
    model = AutoModelForCausalLM.from_config(load_config(tmp_path / "out"), dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(read_store(tmp_path / "out", torch.float32), strict=False)
    assert not unexpected and all("lm_head" in name for name in missing)
    model.tie_weights()
    with torch.no_grad():
        logits = model(torch.arange(32).view(1, 32)).logits
    assert bool(logits.isfinite().all()) and 0.2 < float(logits.std()) < 5


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert_checkpoint("tiny-llama", tmp_path / out, options(seed=seed))
    a, b, c = (store_digest(tmp_path / out) for out in "abc")
    assert a == b
    assert a["blocks/layer-000.safetensors"] != c["blocks/layer-000.safetensors"]


def test_distinct_blocks_are_repeated_by_the_manifest(tmp_path: Path) -> None:
    result = convert_checkpoint("tiny-opt", tmp_path / "out", options(distinct_blocks=2))
    store = Store.open(tmp_path / "out")
    assert store.manifest.distinct_blocks == 2 and result.blocks == len(store.manifest.blocks) == 6
    layers = [store.blocks[f"layer-{i:03d}"] for i in range(3)]
    assert [layer.file.path for layer in layers] == [f"blocks/layer-{i:03d}.safetensors" for i in (0, 1, 0)]
    # The prefix is that of the file's tensors.
    assert layers[2].prefix == layers[0].prefix == "model.decoder.layers.0."
    blocks = [store.layout(block).units for block in (*layers, store.blocks["embed"])]
    assert store.tape_nbytes == sum(unit.nbytes for units in blocks for unit in units if unit.kind == "dense")
    assert not (tmp_path / "out/blocks/layer-002.safetensors").exists()
    check_match(store, build_skeleton(load_config(store.path)))


def test_the_stand_in_tokenizer_passes_any_bytes(tmp_path: Path) -> None:
    convert_checkpoint("tiny-opt", tmp_path / "out", options())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("plain words", "  Ünïcödé\n\t", "日本", "a\x00b</s", ""):
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([EOS_ID, 104, 270], skip_special_tokens=True) == "h"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)


@pytest.mark.parametrize("source", ["no-such-shape", "facebook/opt-125m"])
def test_unknown_shapes_are_answered_with_the_known_ones(source: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"known are .*opt-175b"):
        convert_checkpoint(source, tmp_path / "out", options())


@pytest.mark.parametrize(("text", "message"), [("not toml [", "expected a toml file"), ("a = 1", "config")])
def test_a_bad_shape_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    shape = tmp_path / "shape.toml"
    shape.write_text(text)
    with pytest.raises(ConfigError, match=rf"shape\.toml.*{message}"):
        convert_checkpoint(shape, tmp_path / "out", options())


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path: Path) -> None:
    shape = tmp_path / "shape.toml"
    shape.write_text(DEEP.format(family="llama").replace("300", "200"))
    with pytest.raises(ConfigError, match="vocab_size 200"):
        convert_checkpoint(shape, tmp_path / "out", options())
