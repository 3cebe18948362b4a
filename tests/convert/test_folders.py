"""What docs/folders.md says of weights: each row against transformers itself, on the same folder.

A folder gives the same weights there and here, or is refused here. Where transformers loads something that is not the
model (scales left out, random numbers for what is missing), refusing is right.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.convert.models import read_store, save_bin, save_model, tiny_model
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import CheckpointError

PLAIN = ConvertOptions(quant="none")
INDEX = "model.safetensors.index.json"
Build = Callable[[Path], None]


def tiny(seed: int = 7) -> PreTrainedModel:
    """A model of its own weights for each seed."""
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(seed - 7)
    return model


def put(folder: Path, seed: int, names: str = "*.safetensors*", shard: str = "5GB") -> None:
    """The files of one more model, over those that are there."""
    other = folder.parent / f"model-{seed}"
    if "bin" in names:
        save_bin(other, tiny(seed), shards=3 if "index" in names else 1)
    else:
        save_model(other, tiny(seed), shard)
    folder.mkdir(exist_ok=True)
    for path in (*other.glob(names), other / "config.json"):
        shutil.copy(path, folder)


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def whole_beside_stale_index(folder: Path) -> None:
    """What save_pretrained leaves where a sharded folder is saved again in one file, and the shards are then gone."""
    put(folder, 1, shard="60KB")
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    put(folder, 2)
    assert (folder / INDEX).exists()


def whole_beside_shards(folder: Path) -> None:
    put(folder, 1, shard="60KB")
    put(folder, 2)


def shards_beside_bin(folder: Path) -> None:
    put(folder, 1, "pytorch_model*.bin")
    put(folder, 2, shard="60KB")


def bin_beside_other_safetensors(folder: Path) -> None:
    put(folder, 1, "pytorch_model*.bin")
    put(folder.parent / "elsewhere", 2)
    shutil.copy(folder.parent / "elsewhere" / "model.safetensors", folder / "model.fp16.safetensors")


def bin_beside_shards_without_index(folder: Path) -> None:
    put(folder, 1, "pytorch_model*.bin")
    put(folder, 2, shard="60KB")
    (folder / INDEX).unlink()


def bin_beside_its_index(folder: Path) -> None:
    put(folder, 1, "pytorch_model*index*")
    put(folder, 2, "pytorch_model*.bin")


def sharded_bin(folder: Path) -> None:
    save_bin(folder, tiny(1), shards=3)


def named_in_config(folder: Path) -> None:
    put(folder, 1)
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    put(folder, 2)
    edit(folder / "config.json", transformers_weights="mine.safetensors")


def index_named_in_config(folder: Path) -> None:
    put(folder, 1, shard="60KB")
    (folder / INDEX).rename(folder / "mine.safetensors.index.json")
    put(folder, 2)
    edit(folder / "config.json", transformers_weights="mine.safetensors.index.json")


def index_that_places_tensors_elsewhere(folder: Path) -> None:
    put(folder, 1, shard="60KB")
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    turned = dict(zip(files, reversed(files.values()), strict=True))
    del turned["model.layers.1.mlp.up_proj.weight"]
    assert set(turned.values()) == set(files.values())
    edit(folder / INDEX, weight_map=turned)


def through_a_linked_folder(folder: Path) -> None:
    put(folder.parent / "real", 1)
    folder.symlink_to("real")


FOUND: dict[str, Build] = {
    "model.safetensors beside a stale index": whole_beside_stale_index,
    "model.safetensors beside shards and their index": whole_beside_shards,
    "safetensors shards beside pytorch_model.bin": shards_beside_bin,
    "pytorch_model.bin beside safetensors of another name": bin_beside_other_safetensors,
    "pytorch_model.bin beside shards without an index": bin_beside_shards_without_index,
    "pytorch_model.bin beside its index": bin_beside_its_index,
    "pytorch_model.bin in shards": sharded_bin,
    "transformers_weights in config.json": named_in_config,
    "an index as transformers_weights": index_named_in_config,
    "an index that knows tensors elsewhere, or not": index_that_places_tensors_elsewhere,
    "a folder that is a link": through_a_linked_folder,
}


@pytest.mark.parametrize("build", FOUND.values(), ids=FOUND.keys())
def test_the_weights_are_those_that_transformers_loads(build: Build, tmp_path: Path) -> None:
    build(tmp_path / "source")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", local_files_only=True, output_loading_info=True
    )
    model, told = loaded
    assert not told["missing_keys"]
    result = convert_checkpoint(tmp_path / "source", tmp_path / "out", PLAIN)
    assert result.warnings == ()
    found, expected = read_store(tmp_path / "out"), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def incomplete_whole(folder: Path) -> None:
    put(folder, 1)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def missing_shard(folder: Path) -> None:
    put(folder, 1, shard="60KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def named_but_missing(folder: Path) -> None:
    put(folder, 1)
    edit(folder / "config.json", transformers_weights="mine.safetensors")


def named_outside(folder: Path) -> None:
    put(folder, 1)
    put(folder.parent / "real", 2)
    edit(folder / "config.json", transformers_weights="../real/model.safetensors")


def adapter(folder: Path) -> None:
    put(folder, 1)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


REFUSED: dict[str, tuple[Build, str]] = {
    "a tensor is missing": (incomplete_whole, r"lacks 1 of the .* model\.layers\.1\.mlp\.up_proj\.weight"),
    "a shard is missing": (missing_shard, r"lists model-00002-of-\d+\.safetensors, which the checkpoint lacks"),
    "what config.json names is missing": (named_but_missing, r"lacks mine\.safetensors, which config\.json names"),
    "what config.json names is elsewhere": (named_outside, r"lacks \.\./real/model\.safetensors"),
    "an adapter": (adapter, r"holds an adapter \(adapter_config\.json\)"),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_be_another_model_is_refused(build: Build, message: str, tmp_path: Path) -> None:
    build(tmp_path / "source")
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", PLAIN)
    assert not (tmp_path / "out").exists()
