"""Opens what is to be converted: the source of its weights, and the plan of the store they make."""

import torch
from transformers import PretrainedConfig

from tiered.arch import build_skeleton, load_config
from tiered.convert.checkpoint import Checkpoint
from tiered.convert.folder import state_of
from tiered.convert.hub import HubFiles, Ledger
from tiered.convert.index import find_weights
from tiered.convert.local import LocalFiles
from tiered.convert.names import map_names
from tiered.convert.options import ConvertOptions
from tiered.convert.plan import StorePlan, plan_store
from tiered.convert.resolve import Folder, HubId, Shape
from tiered.convert.source import WeightFiles, WeightSource
from tiered.convert.synthetic import Synthetic, shape_config
from tiered.errors import CheckpointError, ConfigError


def open_checkpoint(place: Folder | HubId, options: ConvertOptions, ledger: Ledger) -> tuple[WeightSource, StorePlan]:
    """The checkpoint at `place`; downloads of weights are entered in `ledger` before they begin."""
    if isinstance(place, Folder):
        if state_of(place.path) in ("finished", "unfinished"):
            raise ConfigError(f"{place.path}: a tiered store; pass the checkpoint to convert")
        if options.revision is not None or options.delete_downloads:
            raise ConfigError(f"{place.path}: a local folder; --revision and --delete-downloads are for hub ids")
        files: WeightFiles = LocalFiles(place.path)
        config = load_config(place.path)
    else:
        files = HubFiles(place.repo_id, options.revision, ledger, delete=options.delete_downloads)
        config = load_config(files.path("config.json").parent)
    _refuse_quantized(files, config)
    claimed = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    skeleton = build_skeleton(config)
    index = find_weights(files)
    names = map_names(skeleton, index.file_of)
    checkpoint = Checkpoint(files, index, names, skeleton.embed_name, claimed, options.clip)
    return checkpoint, plan_store(skeleton, options)


def open_shape(shape: Shape, options: ConvertOptions) -> tuple[WeightSource, StorePlan]:
    """Random weights of `shape`."""
    skeleton = build_skeleton(shape_config(shape))
    return Synthetic(shape, skeleton, options), plan_store(skeleton, options)


def _refuse_quantized(files: WeightFiles, config: PretrainedConfig) -> None:
    found = getattr(config, "quantization_config", None)
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
        raise CheckpointError(
            f"{files.name}: its weights are already quantized ({method or 'quantization_config in config.json'}); "
            "pass the original checkpoint, of 16 or 32 bits"
        )
