"""What docs/folders.md says of weights and tokenizers: each row against transformers itself, on the same folder.

A folder gives the same weights there and here, or is refused here. Where transformers loads something that is not the
model (scales left out, random numbers for what is missing), refusing is right.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from tests.convert.models import TRAINED, read_store, save_bin, save_model, tiny_model
from tests.quick import ONE_FORM
from tiered.arch.families import FAMILIES
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.errors import CheckpointError
from tiered.generate.tokenizer import load_tokenizer
from tiered.store import Store
from tiered.store.beside import COPIED

pytestmark = ONE_FORM

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


def huge_index(folder: Path) -> None:
    put(folder, 1, shard="60KB")
    os.truncate(folder / INDEX, 65 << 20)  # sparse


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
    "an index too large to be one": (huge_index, r"expected at most 67,108,864; download it again"),
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


def trained(folder: Path) -> Any:
    """The trained tokenizer's model: vocabulary and merges."""
    shutil.copy(TRAINED / "tokenizer_config.json", folder)
    return json.loads((TRAINED / "tokenizer.json").read_text())["model"]


def tokenizer_json(folder: Path) -> None:
    trained(folder)
    shutil.copy(TRAINED / "tokenizer.json", folder)


def vocab_and_merges(folder: Path) -> None:
    model = trained(folder)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("".join(f"{' '.join(merge)}\n" for merge in model["merges"]))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')


def vocab_txt(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "list", "of", "value", "##s"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')


def sentencepiece(name: str, tokenizer_class: str | None = None) -> Build:
    """A vocabulary of SentencePiece's, called `name`, and nothing else that makes a tokenizer."""

    def build(folder: Path) -> None:
        import sentencepiece

        texts = [line for line in Path(__file__).read_text(encoding="utf-8").splitlines() if line.strip()]
        with (folder / name).open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=file, vocab_size=400, model_type="bpe", byte_fallback=True,
                num_threads=1, minloglevel=2,
            )  # fmt: skip
        if tokenizer_class is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))

    return build


def json_beside_sentencepiece(folder: Path) -> None:
    sentencepiece("tokenizer.model")(folder)
    tokenizer_json(folder)


TOKENIZERS: dict[str, Build] = {
    "tokenizer.json": tokenizer_json,
    "tokenizer.json beside tokenizer.model": json_beside_sentencepiece,
    "vocab.json and merges.txt": vocab_and_merges,
    "vocab.txt": vocab_txt,
    "tokenizer.model alone": sentencepiece("tokenizer.model"),
    "tokenizer.model and its class": sentencepiece("tokenizer.model", "LlamaTokenizer"),
    "spiece.model": sentencepiece("spiece.model", "T5Tokenizer"),
}
TEXT = "The list of values, in  two\nlines: naïve €."


@pytest.mark.parametrize("build", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_the_tokenizer_is_the_one_that_transformers_makes_of_the_folder(build: Build, tmp_path: Path) -> None:
    source = tmp_path / "source"
    put(source, 1)
    build(source)
    expected = AutoTokenizer.from_pretrained(source, local_files_only=True)
    assert convert_checkpoint(source, tmp_path / "out", PLAIN).has_tokenizer
    found = load_tokenizer(Store.open(tmp_path / "out"))
    ids = found(TEXT).input_ids
    assert type(found) is type(expected) and len(found) == len(expected) > 1
    assert len(ids) > 1 and ids == expected(TEXT).input_ids
    assert found.decode(ids) == expected.decode(ids)


def vocabularies_of(tokenizer_class: str) -> set[str]:
    names: dict[str, str] | None = getattr(tokenizer_class_from_name(tokenizer_class), "vocab_files_names", None)
    return set((names or {}).values())


def test_every_file_that_transformers_reads_a_vocabulary_from_is_copied() -> None:
    names = {"tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"}
    for family in FAMILIES:
        made = TOKENIZER_MAPPING_NAMES.get(family)
        names |= vocabularies_of(made) if made is not None else set()
    for made in ("LlamaTokenizer", "T5Tokenizer", "AlbertTokenizer", "CamembertTokenizer", "DebertaV2Tokenizer"):
        names |= vocabularies_of(made)
    assert "merges.txt" in names and "tokenizer.model" in names
    assert names <= set(COPIED)
