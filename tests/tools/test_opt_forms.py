"""The forms of OPT that are written are those that others write: names, padding, and classes that are not here."""

import pickle
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.convert.models import save_model
from tests.convert.opt import opt_model
from tiered.convert.torch_file import load_torch_file
from tools import opt_forms


def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Path:
    model = save_model(tmp_path / "huggingface", opt_model())
    monkeypatch.setattr("sys.argv", ["opt_forms", str(model), str(tmp_path / "out"), *words])
    opt_forms.main()
    return tmp_path / "out"


@pytest.mark.parametrize("legacy", [(), ("--legacy",)])
def test_shards_have_padded_slices_of_equal_size(
    legacy: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path, monkeypatch, "--form", "raw", "--parts", "2", "--shards", "5", *legacy)
    names = {f"checkpoint_last-model_part-{part}-shard{shard}.pt" for part in range(2) for shard in range(5)}
    assert {path.name for path in out.iterdir()} == names
    keys = ["flat_param_0", *(f"decoder.layers.{layer}.flat_param_0" for layer in range(3))]
    paddings = []
    for path in sorted(out.iterdir()):
        with pytest.raises(pickle.UnpicklingError, match="omegaconf"):
            torch.load(path, weights_only=True)
        loaded = load_torch_file(path)
        assert list(loaded["model"]) == ["decoder.version", *keys]
        layer = loaded["shard_metadata"]["param_metadata"][1]
        params = layer["params"]["flat_param_0"]
        assert layer["fsdp_path"] == "decoder.layers.0" and "self_attn.qkv_proj.weight" in params["names"]
        assert params["numels"] == [prod(shape) for shape in params["shapes"]]
        assert loaded["model"][keys[1]].shape == (-(-sum(params["numels"]) // 5),)
        paddings.append(params["padding"])
    assert paddings[:4] == [0, 0, 0, 0] and paddings[4] > 0


def test_a_numpy_folder_has_a_file_for_each_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write(tmp_path, monkeypatch, "--form", "numpy")
    assert np.load(out / "decoder.layers.2.self_attn.k_proj.weight").shape == (64, 64)
    assert {"decoder.layer_norm.weight", "lm_head.weight"} <= {path.name for path in out.iterdir()}
