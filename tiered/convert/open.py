"""Opens what `tiered convert` is given: a source of weights, and the recipe of the store that they make.

In: a folder, a hub id, a known name, or a shape to fill with noise. Called by `tiered.convert.convert_checkpoint`.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from transformers import PretrainedConfig

from tiered.arch import build_skeleton, is_text_half, load_config, text_config
from tiered.configs_path import config_dir
from tiered.convert.checkpoint import Checkpoint
from tiered.convert.checksums import check_md5
from tiered.convert.gguf import SUFFIX, find_gguf, parts_of, read_gguf
from tiered.convert.gguf_tokenizer import tokenizer_of
from tiered.convert.index import WeightIndex, find_weights, has_weights
from tiered.convert.names import NameMap, has_head, map_names
from tiered.convert.opt import check_shape, opt_config, opt_files, read_opt
from tiered.convert.place import Folder, HubId, Ledger, LocalFiles, WeightFiles
from tiered.convert.quantized import configured_method, quantization_config, refuse_quantized, refuse_unread
from tiered.convert.quantized_reader import quantized_index
from tiered.convert.recipe import ConvertOptions, StoreRecipe, make_recipe
from tiered.convert.room import RamCheck
from tiered.convert.source import StoredTensor, WeightSource
from tiered.convert.synthetic import ShapeFile, Synthetic, shape_config
from tiered.convert.tokenizer import GivenTokenizer
from tiered.errors import CheckpointError, ConfigError, TieredError, shortened
from tiered.store.beside import check_packages

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_OPT_175B: Final = (
    "opt-175b: its weights are on no hub. Meta gives them out on request (facebookresearch/metaseq, projects/OPT), as "
    "992 metaseq shards. Pass the folder that has them, in whatever form: 'tiered convert opt-175b --from PATH', with "
    "checkpoint_last-model_part-*-shard*.pt, reshard-model_part-*.pt, a single reshard.pt or restored.pt, the files of "
    "FlexGen's opt-175b-np, or a Hugging Face checkpoint. For benchmarks at this size without the weights: "
    "'tiered convert opt-175b --synthetic'"
)


def resolve_checkpoint(source: str | Path) -> Folder | HubId:
    """Where the checkpoint called `source` is. A folder comes first, then a known name, then a hub id."""
    path = Path(source).expanduser()
    if path.exists():
        return resolve_folder(path)
    text = str(source)
    known = _known(text)
    if known is not None:
        shape = ShapeFile.read(known)
        if text == "opt-175b":
            raise ConfigError(_OPT_175B)
        if shape.hub_id is None:
            raise ConfigError(f"{text}: a shape without published weights; pass --synthetic for random ones")
        return HubId(shape.hub_id)
    if isinstance(source, str) and _HUB_ID.fullmatch(text) and path.suffix != SUFFIX:
        return HubId(text)
    raise ConfigError(f"{text}: no such folder, no hub id (owner/name) and no known name; known are {_known_names()}")


def resolve_folder(path: Path) -> Folder:
    """The checkpoint in the folder `path`, or the one that the file `path`, of metaseq's or in GGUF, belongs to."""
    path = path.expanduser()
    if path.is_dir():
        return Folder(path)
    if path.suffix in (".pt", SUFFIX) and path.exists():
        return Folder(path.parent, path.name)
    if path.exists():
        raise ConfigError(
            f"{path}: a file; expected a model folder, a .gguf file, a .pt file of metaseq's, a hub id or a known name"
        )
    raise ConfigError(f"{path}: no such folder; pass the one that holds the weights")


def resolve_shape(source: str | Path) -> ShapeFile:
    """The shape called `source`, or in the toml file `source`."""
    path = Path(source).expanduser()
    if path.suffix == ".toml" and path.is_file():
        return ShapeFile.read(path)
    known = _known(str(source))
    if known is not None:
        return ShapeFile.read(known)
    raise ConfigError(
        f"{source}: --synthetic and --from expect a known shape or a toml file of one; known are {_known_names()}"
    )


def open_checkpoint(
    place: Folder | HubId,
    options: ConvertOptions,
    ledger: Ledger,
    tokenizer: GivenTokenizer | None = None,
    shape: ShapeFile | None = None,
) -> tuple[WeightSource, StoreRecipe]:
    """The checkpoint at `place`; downloads of weights are entered in `ledger` before they begin. With a `shape`, its
    model must be of that shape.

    Raises ConfigError where `tokenizer`, which the store is to have instead of the checkpoint's, does not fit the
    model.

    Raises BudgetError, before anything large is read, where reading takes more than `options.ram_bytes`. That includes
    weight files that have to be read whole to know which tensors they hold.
    """
    files = place.open(options, ledger)
    found = open_gguf(place, files, tokenizer is None) or _find_opt(place, files, shape)
    index, config = found or (None, load_config(files.config_folder()))
    if shape is not None:
        check_shape(files.name, shape, config.to_dict())
    if tokenizer is None:
        check_packages(files.name, files.names, files.read)
    _refuse_adapter(files)
    quantization = quantization_config(config)
    method = configured_method(quantization)
    refuse_unread(files.name, quantization)
    claimed = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    skeleton = build_skeleton(config)
    if tokenizer is not None:
        tokenizer.check(files.read("config.json"), skeleton.embedding.num_embeddings)
    ram = RamCheck(options, make_recipe(skeleton, options).files)
    index = index or find_weights(files, getattr(config, "transformers_weights", None), ram.require)
    if options.md5 is not None:
        check_md5(options.md5, {name: files.path(name) for name in index.files})
    index = quantized_index(index, files, quantization)
    made: dict[str, bytes] = {}
    if found is None and is_text_half(files.config_folder()):
        # What its two configurations say of it may differ, and neither is sure to be right.
        if skeleton.tied == has_head(skeleton, index.file_of):
            config.tie_word_embeddings = not skeleton.tied
            skeleton = build_skeleton(config)
        made["config.json"] = json.dumps(
            {**config.to_diff_dict(), "dtype": str(claimed).removeprefix("torch.")}, indent=2
        ).encode()
    names = map_names(skeleton, index.file_of)
    if index.is_exact and names.warnings:
        raise CheckpointError(f"{files.name}: {names.warnings[0]}; convert the original Hugging Face checkpoint")
    stored = _quantized(files, index, names)
    if method is not None and not stored:
        refuse_quantized(files.name, f"{method}, by config.json, but none of its tensors is")
    options = options.of_source(bool(stored))
    recipe = make_recipe(skeleton, options, stored)
    ram.writes(recipe.files)
    keeps = options.quant == "keep"
    return Checkpoint(files, index, names, recipe.files, claimed, options.clip, keeps, ram.require, made), recipe


def open_gguf(
    place: Folder | HubId, files: WeightFiles, with_tokenizer: bool
) -> tuple[WeightIndex, PretrainedConfig] | None:
    """The weights and the configuration of a model in GGUF; None where there is none, or weights in another format.

    Whatever lies beside it is left out: the model is what its file says. The files that Hugging Face's checkpoint has
    besides its weights are made, those of the tokenizer if `with_tokenizer`.
    """
    if not isinstance(files, LocalFiles) or not isinstance(place, Folder):
        return None
    file = place.only if place.only is not None or has_weights(files) else find_gguf(files.names, place.path)
    if file is None or not file.endswith(SUFFIX):
        return None
    parts = parts_of(file, files.names)
    files.leave_out_all_but(parts)
    model = read_gguf(files, parts)
    try:
        config = text_config(dict(model.config))
    except (TieredError, MemoryError):
        raise
    except Exception as error:
        # Each family has code of its own that checks and converts fields; it may raise anything.
        raise CheckpointError(
            f"{model.first}: transformers cannot use its metadata: {shortened(error)}; convert the original Hugging "
            "Face checkpoint"
        ) from error
    made = dict(model.files)
    if with_tokenizer:
        made |= tokenizer_of(model.first, model.metadata, config.vocab_size)
    for name, content in made.items():
        files.make(name, content)
    config.name_or_path = str(model.first)
    return model.index, config


def _find_opt(
    place: Folder | HubId, files: WeightFiles, shape: ShapeFile | None
) -> tuple[WeightIndex, PretrainedConfig] | None:
    """The weights and the configuration of an OPT model in another form than Hugging Face's; None where it is in that.

    Files that Hugging Face's checkpoint has besides its weights are made, unless they are there.
    """
    if not isinstance(files, LocalFiles) or not isinstance(place, Folder) or not (place.only or not has_weights(files)):
        return None
    opt = read_opt(files, place.only)
    if opt is None and shape is not None and "config.json" not in files.names:
        raise CheckpointError(
            f"{place.path}: holds no weights; expected checkpoint_last-model_part-*-shard*.pt, "
            "reshard-model_part-*.pt, a single .pt file of metaseq's, FlexGen's numpy files "
            "(decoder.embed_tokens.weight, ...), or a Hugging Face checkpoint with its config.json"
        )
    if opt is None:
        return None
    if "config.json" in files.names:
        return opt.index, load_config(files.config_folder())
    values = opt_config(files.name, opt, shape)
    for name, content in opt_files(values).items():
        if name not in files.names:
            files.make(name, content)
    config = text_config(values)
    config.name_or_path = str(place.path)
    return opt.index, config


def open_shape(
    shape: ShapeFile, options: ConvertOptions, tokenizer: GivenTokenizer | None = None
) -> tuple[WeightSource, StoreRecipe]:
    """Random weights of `shape`; raises BudgetError where making them takes more than `options.ram_bytes`, and
    ConfigError where `tokenizer`, which the store is to have, does not fit the model."""
    config = shape_config(shape)
    skeleton = build_skeleton(config)
    if tokenizer is not None:
        tokenizer.check(config.to_json_string().encode(), skeleton.embedding.num_embeddings)
    recipe = make_recipe(skeleton, options)
    ram = RamCheck(options, recipe.files)
    source = Synthetic(shape, skeleton, options)
    ram.require(source.working_nbytes)
    return source, recipe


def _known(name: str) -> Path | None:
    """The file of the shape in configs/models called `name`; None where there is none."""
    path = config_dir() / "models" / f"{name}.toml"
    return path if "/" not in name and path.is_file() else None


def _known_names() -> str:
    return ", ".join(sorted(path.stem for path in (config_dir() / "models").glob("*.toml")))


def _quantized(files: WeightFiles, index: WeightIndex, names: NameMap) -> dict[str, StoredTensor]:
    """What the source has of those of the model's tensors that it holds quantized, by their names in the model.

    Of a tensor that is several in the source, the method of the first; and the scheme that all have, if any.
    """
    found: dict[str, StoredTensor] = {}
    for name, sources in names.sources.items():
        parts = [_stored(files, index, source) for source in sources]
        quantized = [part for part in parts if part is not None and part.method is not None]
        if quantized:
            same = all(part is not None and part.scheme == quantized[0].scheme for part in parts)
            found[name] = quantized[0] if same else replace(quantized[0], scheme=None)
    return found


def _stored(files: WeightFiles, index: WeightIndex, name: str) -> StoredTensor | None:
    """A tensor of the source: by its files, if they are here, else by what config.json says of a quantized one."""
    declared = index.declared.get(name)
    if not all(files.is_here(file) for file in index.files_of(name)):
        return declared
    known = index.reader.known(files.path(index.file_of[name]))
    return declared if known is None else known.get(name)


def _refuse_adapter(files: WeightFiles) -> None:
    """Raise CheckpointError for an adapter beside the model: transformers with peft applies it, tiered does not."""
    if "adapter_config.json" in files.names:
        raise CheckpointError(
            f"{files.name}: holds an adapter (adapter_config.json), which is not applied here; merge it into the model "
            "and save that, or remove the adapter's files"
        )
