"""The shapes of models that need a graph to be known: of a store, of a configuration, of what ships with the package.

In: a store's folder, or a model's configuration. Out: `ModelShape`s. This loads torch and transformers and takes
seconds, so what is found is kept as JSON, which `plan/shapes.py` reads at once: a store's beside its blocks, those of
configs/models in one file (`tools/model_shapes.py` writes it).
"""

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from tiered.arch import build_skeleton, load_config, most_positions
from tiered.convert.headers import HubHeaders
from tiered.convert.hollow import DtypeOf, hollow_store
from tiered.convert.open import open_checkpoint, open_gguf, resolve_checkpoint
from tiered.convert.place import HubId
from tiered.convert.quantized import configured_method, quantization_config, refuse_unread
from tiered.convert.recipe import ConvertOptions
from tiered.model import check_layers, check_match, model_shape
from tiered.options import compute_dtype
from tiered.plan import ModelShape
from tiered.plan.shapes import QUANTS, write_store_shape
from tiered.store import Store


def store_shape(folder: Path) -> ModelShape:
    """The shape of the store at `folder`, as it is computed by default; it is kept beside the blocks where that can be
    written. Raises StoreError."""
    store = Store.open(folder)
    config = load_config(store.path)
    dtype = compute_dtype("auto", config)
    check_layers(store, config)
    skeleton = build_skeleton(config, dtype)
    check_match(store, skeleton)
    shape = model_shape(store, skeleton, dtype)
    with contextlib.suppress(OSError):
        write_store_shape(folder, shape)
    return shape


@dataclass(frozen=True)
class Outline:
    """What a checkpoint's configuration and headers say of what converting it would give."""

    shapes: Mapping[str, ModelShape]
    """By quantization."""
    positions: int | None
    """Tokens of a sequence that the model is made for; None where its configuration names no limit."""
    notes: tuple[str, ...]
    """What a conversion would warn of, and what is taken as given."""


def config_shapes(
    config: PretrainedConfig, quants: Sequence[str] = QUANTS, dtype_of: DtypeOf | None = None
) -> dict[str, ModelShape]:
    """For each of `quants` the shape of what 'tiered convert --quant' would make of a checkpoint with `config`, whose
    tensors are in `dtype_of`; None: all are as `config` says."""
    dtype = compute_dtype("auto", config)
    # Building the graph sets the configuration's own.
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    skeleton = build_skeleton(config, dtype)
    found = {}
    for quant in quants:
        with tempfile.TemporaryDirectory(prefix="tiered-shape-") as folder:
            options = ConvertOptions(quant=quant, compress="none")
            store = hollow_store(skeleton, dtype_of or (lambda _: stored), options, Path(folder))
            found[quant] = model_shape(store, skeleton, dtype)
    return found


def outline(source: str, quants: Sequence[str] = QUANTS) -> Outline:
    """The checkpoint called `source`: a Hugging Face folder, a file in GGUF, or a hub id, of which config.json, the
    index and the headers of safetensors files are fetched, by range. Without such files the configuration alone counts.

    Raises ConfigError, CheckpointError, UnsupportedFamilyError, ReadError, as converting it would.
    """
    place = resolve_checkpoint(source)
    with tempfile.TemporaryDirectory(prefix="tiered-headers-") as folder:
        if isinstance(place, HubId):
            place = HubHeaders(place.repo_id, Path(folder))
        files = place.open(ConvertOptions(), _NoDownloads())
        gguf = open_gguf(place, files, with_tokenizer=False)
        config = load_config(files.config_folder()) if gguf is None else gguf[1]
        quantization = quantization_config(config)
        refuse_unread(files.name, quantization)
        method = configured_method(quantization) if gguf is None else "GGUF"
        if method is not None:
            note = (
                f"{files.name}: its weights are quantized already ({method}); without --quant they are taken as they "
                "are, in some 4 to 8 bits: figures are of what --quant says"
            )
            return Outline(config_shapes(config, quants), most_positions(config), (note,))
        if not any(name.endswith(".safetensors") for name in files.names):
            note = f"{files.name}: no safetensors files were found, so weights are taken to be what config.json says"
            return Outline(config_shapes(config, quants), most_positions(config), (note,))
        weights, _ = open_checkpoint(place, ConvertOptions(), _NoDownloads())
        return Outline(config_shapes(config, quants, weights.dtype), most_positions(config), tuple(weights.warnings))


class _NoDownloads:
    """No weights are fetched, so none are entered."""

    downloaded: frozenset[str] = frozenset()

    def enter_download(self, name: str) -> None:
        raise AssertionError(name)
