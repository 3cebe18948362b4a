"""The shapes of models that need a graph to be known: of a store, of a configuration, of what ships with the package.

In: a store's folder, or a model's configuration. Out: `ModelShape`s. This loads torch and transformers and takes
seconds, so what is found is kept as JSON, which `plan/shapes.py` reads at once: a store's beside its blocks, those of
configs/models in one file (`tools/model_shapes.py` writes it).
"""

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PretrainedConfig

from tiered.arch import build_skeleton, load_config
from tiered.convert.hollow import hollow_store
from tiered.convert.open import resolve_checkpoint
from tiered.convert.quantized import configured_method, refuse_quantized
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


def config_shapes(config: PretrainedConfig, quants: Sequence[str] = QUANTS) -> dict[str, ModelShape]:
    """For each of `quants` the shape of what 'tiered convert --quant' would make of a checkpoint with `config`."""
    dtype = compute_dtype("auto", config)
    # Building the graph sets the configuration's own.
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    skeleton = build_skeleton(config, dtype)
    found = {}
    for quant in quants:
        with tempfile.TemporaryDirectory(prefix="tiered-shape-") as folder:
            store = hollow_store(skeleton, stored, ConvertOptions(quant=quant, compress="none"), Path(folder))
            found[quant] = model_shape(store, skeleton, dtype)
    return found


def checkpoint_shapes(source: str, quants: Sequence[str] = QUANTS) -> dict[str, ModelShape]:
    """The shapes of the checkpoint called `source`: a Hugging Face folder, or a hub id, of which only config.json is
    fetched. Raises ConfigError, CheckpointError, UnsupportedFamilyError, ReadError."""
    files = resolve_checkpoint(source).open(ConvertOptions(), _NoDownloads())
    config = load_config(files.config_folder())
    refuse_quantized(files.name, configured_method(config))
    return config_shapes(config, quants)


class _NoDownloads:
    """No weights are fetched, so none are entered."""

    downloaded: frozenset[str] = frozenset()

    def enter_download(self, name: str) -> None:
        raise AssertionError(name)
