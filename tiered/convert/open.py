"""Opens what `tiered convert` is given: a source of weights, and the recipe of the store that they make.

In: a folder, a hub id, a known name, or a shape to fill with noise. Called by `tiered.convert.convert_checkpoint`.
"""

import re
from pathlib import Path
from typing import Final

import torch

from tiered.arch import build_skeleton, load_config
from tiered.configs_path import config_dir
from tiered.convert.checkpoint import Checkpoint
from tiered.convert.index import WeightIndex, find_weights, map_names
from tiered.convert.place import Folder, HubId, Ledger, WeightFiles
from tiered.convert.quantized import configured_method, method_of_float, refuse_quantized
from tiered.convert.recipe import ConvertOptions, StoreRecipe, make_recipe
from tiered.convert.room import RamCheck
from tiered.convert.source import WeightSource
from tiered.convert.synthetic import ShapeFile, Synthetic, shape_config
from tiered.convert.tokenizer import GivenTokenizer
from tiered.errors import CheckpointError, ConfigError
from tiered.files import read_whole
from tiered.store.beside import check_packages

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_OPT_175B: Final = (
    "opt-175b: its weights are on no hub. Meta gives them out on request (facebookresearch/metaseq, projects/OPT), as "
    "992 metaseq shards; reshard them and convert them to a Hugging Face folder (config.json, tokenizer files, "
    "model*.safetensors or pytorch_model*.bin) with metaseq's and transformers' own scripts, then pass that folder: "
    "'tiered convert PATH/TO/FOLDER'. For benchmarks at this size without the weights: "
    "'tiered convert opt-175b --synthetic'"
)


def resolve_checkpoint(source: str | Path) -> Folder | HubId:
    """Where the checkpoint called `source` is. A folder comes first, then a known name, then a hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        return Folder(path)
    if path.exists():
        raise ConfigError(f"{source}: a file; expected a Hugging Face model folder, a hub id or a known name")
    text = str(source)
    known = _known(text)
    if known is not None:
        shape = ShapeFile.read(known)
        if text == "opt-175b":
            raise ConfigError(_OPT_175B)
        if shape.hub_id is None:
            raise ConfigError(f"{text}: a shape without published weights; pass --synthetic for random ones")
        return HubId(shape.hub_id)
    if isinstance(source, str) and _HUB_ID.fullmatch(text):
        return HubId(text)
    raise ConfigError(f"{text}: no such folder, no hub id (owner/name) and no known name; known are {_known_names()}")


def resolve_shape(source: str | Path) -> ShapeFile:
    """The shape called `source`, or in the toml file `source`."""
    path = Path(source).expanduser()
    if path.suffix == ".toml" and path.is_file():
        return ShapeFile.read(path)
    known = _known(str(source))
    if known is not None:
        return ShapeFile.read(known)
    raise ConfigError(f"{source}: --synthetic expects a known shape or a toml file of one; known are {_known_names()}")


def open_checkpoint(
    place: Folder | HubId, options: ConvertOptions, ledger: Ledger, tokenizer: GivenTokenizer | None = None
) -> tuple[WeightSource, StoreRecipe]:
    """The checkpoint at `place`; downloads of weights are entered in `ledger` before they begin.

    Raises ConfigError where `tokenizer`, which the store is to have instead of the checkpoint's, does not fit the
    model.

    Raises BudgetError, before anything large is read, where reading takes more than `options.ram_bytes`. That includes
    weight files that have to be read whole to know which tensors they hold.
    """
    files = place.open(options, ledger)
    config = load_config(files.config_folder())
    if tokenizer is None:
        check_packages(files.name, files.names, lambda name: read_whole(files.path(name), CheckpointError))
    _refuse_adapter(files)
    refuse_quantized(files.name, configured_method(config))
    claimed = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    skeleton = build_skeleton(config)
    if tokenizer is not None:
        tokenizer.check(read_whole(files.path("config.json"), CheckpointError), skeleton.embedding.num_embeddings)
    recipe = make_recipe(skeleton, options)
    ram = RamCheck(options, recipe.files)
    index = find_weights(files, getattr(config, "transformers_weights", None), ram.require)
    refuse_quantized(files.name, _method_of_types(files, index))
    names = map_names(skeleton, index.file_of)
    return Checkpoint(files, index, names, recipe.files, claimed, options.clip, ram.require), recipe


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


def _method_of_types(files: WeightFiles, index: WeightIndex) -> str | None:
    """The quantization method that dtypes in the files that are here tell of, or None; no file is read whole for it."""
    here = [files.path(name) for name in index.files if files.is_here(name)]
    types = {stored.dtype for path in here for stored in (index.reader.known(path) or {}).values()}
    return next((method for dtype in types if (method := method_of_float(dtype)) is not None), None)


def _refuse_adapter(files: WeightFiles) -> None:
    """Raise CheckpointError for an adapter beside the model: transformers with peft applies it, tiered does not."""
    if "adapter_config.json" in files.names:
        raise CheckpointError(
            f"{files.name}: holds an adapter (adapter_config.json), which is not applied here; merge it into the model "
            "and save that, or remove the adapter's files"
        )
