"""Which files of a checkpoint hold its weights, and which tensor is in which of them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tiered.convert.safetensors_reader import SafetensorsReader
from tiered.convert.source import WeightFiles, WeightReader
from tiered.convert.torch_reader import TorchReader
from tiered.errors import CheckpointError

_FORMATS: Final = (
    ("model.safetensors", re.compile(r".*\.safetensors"), SafetensorsReader),
    ("pytorch_model.bin", re.compile(r"pytorch_model.*\.bin"), TorchReader),
)
_SHARD: Final = re.compile(r"(.*)-(\d+)-of-(\d+)(\.\w+)")


@dataclass(frozen=True)
class WeightIndex:
    """The weight files, in the order of their names, and the tensors each holds."""

    reader: WeightReader
    files: tuple[str, ...]
    file_of: Mapping[str, str]
    """Checkpoint name -> file."""


def find_weights(files: WeightFiles) -> WeightIndex:
    """Find the weights among `files`; safetensors are preferred to pickles.

    Without an index every weight file is fetched and its header read. Raises CheckpointError where there are none,
    shards are missing, or it is unclear which of several files are meant.
    """
    for single, pattern, make_reader in _FORMATS:
        index = f"{single}.index.json"
        if index in files.names:
            file_of = _read_index(files, index)
            return WeightIndex(make_reader(), tuple(sorted(set(file_of.values()))), file_of)
        found = sorted(name for name in files.names if pattern.fullmatch(name))
        if found:
            reader = make_reader()
            chosen = (single,) if single in found else _shards(found, files)
            return WeightIndex(reader, chosen, _read_headers(files, reader, chosen))
    other = sorted(name for name in files.names if name.endswith((".gguf", ".pt", ".pth", ".h5", ".msgpack", ".bin")))
    hint = f"it has {', '.join(other[:5])}, which tiered does not read; " if other else ""
    raise CheckpointError(
        f"{files.name}: no weights; expected model*.safetensors or pytorch_model*.bin, {hint}"
        "pass a Hugging Face checkpoint in one of these formats"
    )


def _read_index(files: WeightFiles, name: str) -> dict[str, str]:
    path = files.path(name)
    try:
        raw: Any = json.loads(path.read_text())["weight_map"]
        file_of = {str(tensor): str(file) for tensor, file in raw.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: expected a JSON object with 'weight_map' ({error!r}); download it again"
        ) from None
    missing = sorted(set(file_of.values()) - files.names)
    if missing or not file_of:
        raise CheckpointError(
            f"{path}: lists {', '.join(missing[:5]) or 'no tensors'}, which the checkpoint lacks; "
            "download the missing files"
        )
    return file_of


def _shards(found: list[str], files: WeightFiles) -> tuple[str, ...]:
    """The files of one sharded checkpoint without an index, or its only file."""
    if len(found) == 1 and not _SHARD.fullmatch(found[0]):
        return tuple(found)
    matches = [match for name in found if (match := _SHARD.fullmatch(name))]
    series = {(match[1], match[3], match[4]) for match in matches}
    if len(series) != 1:
        raise CheckpointError(
            f"{files.name}: {', '.join(found[:5])}: unclear which of these hold the model; "
            "leave only its files in the folder, or add the index (model.safetensors.index.json)"
        )
    ((_, total, _),) = series
    if len(matches) != int(total):
        raise CheckpointError(
            f"{files.name}: {len(matches)} of {int(total)} shards are there ({found[0]}, …); download the others"
        )
    return tuple(match[0] for match in matches)


def _read_headers(files: WeightFiles, reader: WeightReader, names: tuple[str, ...]) -> dict[str, str]:
    file_of: dict[str, str] = {}
    for name in names:
        for tensor in reader.tensors(files.path(name)):
            if tensor in file_of:
                raise CheckpointError(f"{files.name}: {tensor} is in both {file_of[tensor]} and {name}")
            file_of[tensor] = name
    return file_of
