"""The index of a checkpoint: which files hold its weights, and which tensors each has.

In: a checkpoint's files. Out: a `WeightIndex`, with which `checkpoint.py` reads. The files are those that transformers
would choose (docs/folders.md). Where transformers would find nothing, shards without an index and files of other names
are taken too, as long as it is clear which are meant.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tiered.convert.place import WeightFiles
from tiered.convert.safetensors_reader import SafetensorsReader
from tiered.convert.source import StoredTensor, WeightReader
from tiered.convert.torch_reader import TorchReader
from tiered.errors import CheckpointError
from tiered.files import read_json

_FORMATS: Final = (
    ("model.safetensors", re.compile(r".*\.safetensors"), SafetensorsReader),
    ("pytorch_model.bin", re.compile(r"pytorch_model.*\.bin"), TorchReader),
)
_SHARD: Final = re.compile(r"(.*)-(\d+)-of-(\d+)(\.\w+)")
Require = Callable[[int], None]
"""Called with the bytes of memory that reading takes; raises BudgetError where the budget is too small for them."""


@dataclass(frozen=True)
class WeightIndex:
    """The weight files, in the order of their names, and the tensors each holds."""

    reader: WeightReader
    files: tuple[str, ...]
    file_of: Mapping[str, str]
    """Checkpoint name -> file."""
    others: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Checkpoint name -> further files that have parts of it; only of quantized tensors that lie in several."""

    declared: Mapping[str, StoredTensor] = field(default_factory=dict)
    """Checkpoint name -> what config.json says of a quantized tensor; its shape is left out. It counts until its files
    are here."""
    is_exact: bool = False
    """A tensor that the model has no place for is an error: there are none that others leave beside a model."""

    def files_of(self, name: str) -> frozenset[str]:
        """The files that the tensor `name` is read from."""
        return self.others.get(name, frozenset()) | {self.file_of[name]}


def has_weights(files: WeightFiles) -> bool:
    """Whether some of `files` are in one of the formats that are read here."""
    return any(pattern.fullmatch(name) for _, pattern, _ in _FORMATS for name in files.names)


def find_weights(files: WeightFiles, named: object, require: Require) -> WeightIndex:
    """Find the weights among `files`: what config.json names (`named`; None where it names nothing), else the first
    that exists of model.safetensors, its index, pytorch_model.bin, its index.

    Without an index every weight file is fetched and its header read. Before that, `require` is called with the
    memory that reading them one by one takes. Raises CheckpointError where there are no weights, shards are missing,
    or it is unclear which of several files are meant.
    """
    if named is not None:
        return _named(files, named, require)
    for single, _, make_reader in _FORMATS:
        if single in files.names:
            return _of_headers(files, make_reader(), (single,), require)
        if f"{single}.index.json" in files.names:
            return _of_index(files, make_reader(), f"{single}.index.json", require)
    for _, pattern, make_reader in _FORMATS:
        found = sorted(name for name in files.names if pattern.fullmatch(name))
        if found:
            return _of_headers(files, make_reader(), _shards(found, files), require)
    other = sorted(name for name in files.names if name.endswith((".gguf", ".pt", ".pth", ".h5", ".msgpack", ".bin")))
    hint = f"it has {', '.join(other[:5])}, which tiered does not read; " if other else ""
    if other and other[0].endswith(".gguf"):
        hint = f"it has {', '.join(other[:5])}; download the GGUF file of a model and pass that, or "
    raise CheckpointError(
        f"{files.name}: no weights; expected model*.safetensors or pytorch_model*.bin, {hint}"
        "pass a Hugging Face checkpoint in one of these formats"
    )


def _named(files: WeightFiles, named: object, require: Require) -> WeightIndex:
    """The weights that config.json names as `transformers_weights`."""
    if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            f"{files.name}: config.json names {named!r} as transformers_weights, expected a safetensors file or an "
            "index of such; correct it, or remove it to have the weights found by their usual names"
        )
    if named not in files.names:
        raise CheckpointError(
            f"{files.name}: lacks {named}, which config.json names as transformers_weights; download it, "
            "or remove the name to have the weights found by their usual names"
        )
    reader = SafetensorsReader()
    if named.endswith(".json"):
        return _of_index(files, reader, named, require)
    return _of_headers(files, reader, (named,), require)


def _of_headers(files: WeightFiles, reader: WeightReader, names: tuple[str, ...], require: Require) -> WeightIndex:
    return WeightIndex(reader, names, _read_headers(files, reader, names, require))


def _of_index(files: WeightFiles, reader: WeightReader, name: str, require: Require) -> WeightIndex:
    """The weights in the files that index `name` lists."""
    file_of = _read_index(files, name)
    names = tuple(sorted(set(file_of.values())))
    # An index may be out of date, and transformers takes all tensors that are in the files: so the headers count.
    # Only for files on the hub, and for files that would have to be read whole, the index is believed at first;
    # they are checked when they are read.
    if files.kind == "folder" and all(reader.known(files.path(file)) is not None for file in names):
        file_of = _read_headers(files, reader, names, require)
    return WeightIndex(reader, names, file_of)


def _read_index(files: WeightFiles, name: str) -> dict[str, str]:
    path = files.path(name)
    value: Any = read_json(path, CheckpointError, "download it again")
    try:
        file_of = {str(tensor): str(file) for tensor, file in value["weight_map"].items()}
    except (KeyError, TypeError, AttributeError) as error:
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


def _read_headers(files: WeightFiles, reader: WeightReader, names: tuple[str, ...], require: Require) -> dict[str, str]:
    # Asked once for all files: a budget that is named for the first one might be too small for the next.
    require(max(reader.working_nbytes(files.path(name)) for name in names))
    file_of: dict[str, str] = {}
    for name in names:
        for tensor in reader.tensors(files.path(name)):
            if tensor in file_of:
                raise CheckpointError(f"{files.name}: {tensor} is in both {file_of[tensor]} and {name}")
            file_of[tensor] = name
    return file_of
