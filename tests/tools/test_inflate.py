"""An inflated checkpoint has the size asked for and computes what the small one computes."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tiered.configs_path import config_dir
from tiered.errors import CheckpointError, ConfigError
from tools import inflate

TOKENS = torch.tensor([[2, 5, 250, 17, 99, 3, 3, 40]])


def save_tiny(name: str, folder: Path) -> Path:
    shape = tomllib.loads((config_dir() / "models" / f"{name}.toml").read_text(encoding="utf-8"))["config"]
    torch.manual_seed(1)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("tiny-opt", tmp_path_factory.mktemp("tiny-opt"))


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS).logits
    return found


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["tiny-opt", "tiny-llama"])
def test_logits_stay_the_same(name: str, tmp_path: Path) -> None:
    small = save_tiny(name, tmp_path / "small")
    inflate.inflate(small, tmp_path / "large", 4_000_000)
    torch.testing.assert_close(logits(tmp_path / "large"), logits(small), rtol=0, atol=1e-5)


def test_size_is_near_the_request_and_shards_are_bounded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inflate, "SHARD_BYTES", 5_000_000)
    monkeypatch.setattr(inflate, "PIECE_NBYTES", 100_000)
    nbytes = inflate.inflate(tiny, tmp_path, 20_000_000)
    assert 20_000_000 <= nbytes < 20_500_000
    assert nbytes < weight_bytes(tmp_path) < nbytes + 50_000
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert all(path.stat().st_size < 5_100_000 for path in shards)
    torch.testing.assert_close(logits(tmp_path), logits(tiny), rtol=0, atol=1e-5)


def test_new_rows_are_random_and_new_columns_zero(tiny: Path, tmp_path: Path) -> None:
    inflate.inflate(tiny, tmp_path, 4_000_000)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["ffn_dim"] % 128 == 0
    rows = tensors["model.decoder.layers.0.fc1.weight"]
    assert rows.shape == (config["ffn_dim"], 64)
    assert rows[128:].std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(rows[128:], tensors["model.decoder.layers.1.fc1.weight"][128:])
    assert not tensors["model.decoder.layers.0.fc2.weight"][:, 128:].any()


def test_precision_and_other_files_are_kept(tiny: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for path in tiny.iterdir():
        (half / path.name).write_bytes(path.read_bytes())
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors")
    inflate.inflate(half, tmp_path / "large", 2_000_000)
    (file,) = (tmp_path / "large").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    assert (tmp_path / "large" / "tokenizer.json").read_text(encoding="utf-8") == "{}"


def test_the_same_seed_gives_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        inflate.inflate(tiny, tmp_path / name, 2_000_000, seed=seed)
    a, b, c = (next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_size_below_the_source_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="already; ask for more"):
        inflate.inflate(tiny, tmp_path, 1000)


def test_a_target_in_use_needs_force(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00099.safetensors").touch()
    with pytest.raises(ConfigError, match="is not empty; pass --force"):
        inflate.inflate(tiny, tmp_path, 2_000_000)
    inflate.inflate(tiny, tmp_path, 2_000_000, force=True)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_the_source_is_never_its_own_target(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="is the source itself"):
        inflate.inflate(tiny, tiny, 2_000_000, force=True)


def test_a_folder_without_config_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inflate.main([str(tmp_path), str(tmp_path / "large"), "--size", "1GB"]) == 4
    assert "config.json: no such file; expected a Hugging Face checkpoint" in capsys.readouterr().err


def test_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="model_type is 'bloom', expected one of opt"):
        inflate.read_checkpoint(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "opt"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        inflate.read_checkpoint(tmp_path)


def test_weights_that_contradict_the_config_are_named(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"ffn_dim": 256}), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"has shape \[128.*expected \[256.* by ffn_dim = 256"):
        inflate.read_checkpoint(tmp_path)
