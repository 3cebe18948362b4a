"""A config.json that says anything at all is read, or refused in one line that names it, before it costs anything."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_configs import tiny_config
from tiered.arch import build_skeleton, load_config, text_config
from tiered.errors import CheckpointError, ConfigError, TieredError, UnsupportedFamilyError
from tiered.plan import process_rss_bytes
from tiered.units import MIB


def write(folder: Path, name: str = "opt", **changes: Any) -> Path:
    value = {**json.loads(tiny_config(name).to_json_string()), **changes}
    (folder / "config.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def build(folder: Path) -> None:
    build_skeleton(load_config(folder))


@pytest.mark.parametrize("moment", ["config.AutoConfig.from_pretrained", "skeleton.AutoModelForCausalLM.from_config"])
def test_a_lack_of_memory_is_not_the_files(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(f"tiered.arch.{moment}", failing)
    with pytest.raises(MemoryError):
        build(write(tmp_path))


def test_a_good_one_is_read(tmp_path: Path) -> None:
    build(write(tmp_path))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"init_std": None}, "init_std"),
        ({"hidden_size": "128"}, "hidden_size"),
        ({"hidden_size": 64.5}, "hidden_size"),
        ({"hidden_size": -64}, ""),
        ({"num_attention_heads": 0}, ""),
        ({"num_attention_heads": 7}, ""),
        ({"activation_function": "swoosh"}, "swoosh"),
        ({"pad_token_id": 5000}, ""),
        ({"vocab_size": 10**30}, ""),
        ({"num_hidden_layers": 2_000_000_000}, "num_hidden_layers is 2000000000, expected at most 500"),
        ({"num_labels": 2_000_000_000}, "num_labels is 2000000000"),
        ({"dtype": "float7"}, ""),
        ({"attention_dropout": 7.0}, "attention_dropout is 7.0, expected a probability"),
        ({"attention_dropout": float("nan")}, "attention_dropout is nan"),
    ],
)
def test_wrong_types_and_values_are_refused_by_name(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        build(write(tmp_path, **changes))
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: transformers cannot ")
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("put the model's own config.json there")


@pytest.mark.parametrize("name", ["bloom", "gpt_neo", "llama"])
@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": "x"},
        {"max_position_embeddings": True},
        {"num_key_value_heads": [4]},
        {"head_dim": 2.5},
        {"sliding_window": "all"},
        {"sliding_window": -1},
        {"layer_types": "sliding_attention"},
        {"layer_types": ["sliding_attention"]},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"num_attention_heads": -4},
        {"hidden_size": -64},
        {"vocab_size": 0},
    ],
)
def test_fields_that_tiered_computes_with_are_sizes_in_every_family(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    # GPT-Neo's own code compares the number of its layers with a list of them first.
    with pytest.raises(CheckpointError, match=rf"{next(iter(changes))}|attention_layers"):
        load_config(write(tmp_path, name, **changes))


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("deepseek_v3", {"qk_rope_head_dim": 0}, "qk_rope_head_dim is 0, expected a whole number above 0"),
        ("deepseek_v3", {"qk_nope_head_dim": 0}, "qk_nope_head_dim is 0, expected a whole number above 0"),
        ("deepseek_v3", {"kv_lora_rank": 0}, "would have no elements: one of its sizes is 0"),
        ("llama4_text", {"attention_chunk_size": 0}, "expected an attention_chunk_size above 0"),
        ("llama4_text", {"attention_chunk_size": -8}, "attention_chunk_size is -8, expected a whole number"),
        ("llama4_text", {"attention_chunk_size": None}, "expected an attention_chunk_size above 0"),
        ("mamba2", {"conv_kernel": 0}, "would have no elements: one of its sizes is 0"),
        ("gpt_oss", {"num_local_experts": 0}, "would have no elements: one of its sizes is 0"),
    ],
)
def test_sizes_of_latents_chunks_states_and_experts_are_looked_at_too(
    name: str, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        build(write(tmp_path, name, **changes))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not text (invalid start byte at byte 0, expected UTF-8)"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"model_type": ' + b"[" * 100_000, "not valid JSON"),
        (b'{"hidden_size": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"null", "has no 'model_type'"),
        (b'{"model_type": ["opt"]}', "has no 'model_type'"),
    ],
)
def test_what_is_no_configuration_is_refused(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json: ") as caught:
        load_config(tmp_path)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_deep_nesting_inside_a_known_field_is_no_traceback(tmp_path: Path) -> None:
    write(tmp_path)
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text.replace("{", '{"nested": ' + "[" * 900 + "]" * 900 + ",", 1))
    try:
        build(tmp_path)
    except TieredError as error:
        assert "config.json" in str(error)


def test_layers_by_a_familys_own_name_are_counted_too(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="attention_types is 2000000000"):
        load_config(write(tmp_path, "gpt_neo", attention_types=[[["global"], 2_000_000_000]]))


@pytest.mark.parametrize("name", ["gptj", "codegen", "gpt_neo", "gpt_bigcode", "xglm"])
def test_tables_that_would_take_all_memory_are_refused_before_they_are_made(name: str, tmp_path: Path) -> None:
    before = process_rss_bytes()
    with pytest.raises(CheckpointError, match=r"its tables would take .* \(.* alone .*\), expected at most 1 GiB"):
        build(write(tmp_path, name, max_position_embeddings=200_000_000, n_positions=200_000_000))
    assert process_rss_bytes() - before < 200 * MIB


def test_a_tensor_that_no_model_has_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.decoder\.embed_positions\.weight would take .* at most 1 TiB"):
        build(write(tmp_path, max_position_embeddings=2_048_000_000_000))


def test_a_shape_is_bounded_like_a_file() -> None:
    fields = {"model_type": "opt", "num_hidden_layers": 2_000_000_000}
    with pytest.raises(ValueError, match="num_hidden_layers is 2000000000"):
        text_config(fields)
    with pytest.raises(ConfigError, match="model shape: transformers cannot build the opt model"):
        build_skeleton(text_config({"model_type": "opt", "hidden_size": 64, "num_attention_heads": 7}))
    with pytest.raises(UnsupportedFamilyError):
        text_config({"model_type": "bert"})


def test_refusing_takes_no_time(tmp_path: Path) -> None:
    began = time.thread_time()
    for name in ("num_hidden_layers", "num_labels"):
        changes: dict[str, Any] = {name: 1 << 62}
        with pytest.raises(CheckpointError):
            load_config(write(tmp_path, **changes))
    assert time.thread_time() - began < 20, "reading it would not have ended today"


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_more_experts_for_a_token_than_there_are_are_refused_by_name(name: str, tmp_path: Path) -> None:
    fields = {**tiny_config(name).to_dict(), "num_experts_per_tok": 99}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(CheckpointError, match="99 experts compute for a token, expected at most the"):
        load_config(tmp_path)
