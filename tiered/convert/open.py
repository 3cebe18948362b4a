"""Opens what is to be converted: the source of its weights, and the plan of the store they make."""

import torch

from tiered.arch import build_skeleton, load_config
from tiered.convert.budget import RamCheck
from tiered.convert.checkpoint import Checkpoint
from tiered.convert.folder import state_of
from tiered.convert.hub import HubFiles, Ledger
from tiered.convert.index import WeightIndex, find_weights
from tiered.convert.local import LocalFiles
from tiered.convert.names import map_names
from tiered.convert.options import ConvertOptions
from tiered.convert.plan import StorePlan, plan_store
from tiered.convert.quantized import already_quantized, configured_method, method_of_float
from tiered.convert.resolve import Folder, HubId, Shape
from tiered.convert.source import WeightFiles, WeightSource
from tiered.convert.synthetic import Synthetic, shape_config
from tiered.errors import CheckpointError, ConfigError
from tiered.files import read_whole
from tiered.store.beside import check_packages


def open_checkpoint(
    place: Folder | HubId, options: ConvertOptions, ledger: Ledger, ram: RamCheck
) -> tuple[WeightSource, StorePlan]:
    """The checkpoint at `place`; downloads of weights are entered in `ledger` before they begin.

    A weight file that has to be read whole to know what is in it is only read within `ram`.
    """
    if isinstance(place, Folder):
        if state_of(place.path) in ("finished", "unfinished"):
            raise ConfigError(f"{place.path}: a tiered store; pass the checkpoint to convert")
        if options.revision is not None or options.delete_downloads:
            raise ConfigError(f"{place.path}: a local folder; --revision and --delete-downloads are for hub ids")
        files: WeightFiles = LocalFiles(place.path)
        if "config.json" in files.names:
            files.path("config.json")  # which looks at what it is
        config = load_config(place.path)
    else:
        files = HubFiles(place.repo_id, options.revision, ledger, delete=options.delete_downloads)
        config = load_config(files.path("config.json").parent)
    check_packages(files.name, files.names, lambda name: read_whole(files.path(name), CheckpointError))
    _refuse_adapter(files)
    _refuse_quantized(files.name, configured_method(config))
    claimed = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    skeleton = build_skeleton(config)
    plan = plan_store(skeleton, options)
    ram.begin(plan.files)
    index = find_weights(files, getattr(config, "transformers_weights", None), ram.require)
    _refuse_quantized(files.name, _method_of_types(files, index))
    names = map_names(skeleton, index.file_of)
    checkpoint = Checkpoint(files, index, names, skeleton.embed_name, claimed, options.clip)
    return checkpoint, plan


def open_shape(shape: Shape, options: ConvertOptions, ram: RamCheck) -> tuple[WeightSource, StorePlan]:
    """Random weights of `shape`."""
    skeleton = build_skeleton(shape_config(shape))
    plan = plan_store(skeleton, options)
    ram.begin(plan.files)
    return Synthetic(shape, skeleton, options), plan


def _refuse_quantized(name: str, method: str | None) -> None:
    if method is not None:
        raise already_quantized(name, method)


def _method_of_types(files: WeightFiles, index: WeightIndex) -> str | None:
    """The method whose types are among those of the files at hand, as far as telling costs no reading."""
    here = [files.path(name) for name in index.files if files.is_here(name)]
    types = {stored.dtype for path in here for stored in (index.reader.known(path) or {}).values()}
    return next((method for dtype in types if (method := method_of_float(dtype)) is not None), None)


def _refuse_adapter(files: WeightFiles) -> None:
    """transformers with peft applies an adapter that lies beside a model; without it the model would be another."""
    if "adapter_config.json" in files.names:
        raise CheckpointError(
            f"{files.name}: holds an adapter (adapter_config.json), which is not applied here; merge it into the model "
            "and save that, or remove the adapter's files"
        )
