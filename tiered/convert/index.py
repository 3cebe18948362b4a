"""The index of a checkpoint: which files hold its weights, and under which names it holds each tensor of the model.

In: a checkpoint's files, and the skeleton. Out: a `WeightIndex` and a `NameMap`, with which `checkpoint.py` reads.
The files are those that transformers would choose (docs/folders.md). Where transformers would find nothing, shards
without an index and files of other names are taken too, as long as it is clear which are meant.
Checkpoints of a bare base model drop its prefix (`decoder.…` for `model.decoder.…`, `h.0…` for `transformer.h.0…`),
tied heads are absent or a copy, old checkpoints hold buffers that transformers recomputes, and most mixtures of experts
hold one tensor per expert and matrix where the model has one stack of all experts.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final

from tiered.arch import Skeleton
from tiered.convert.place import WeightFiles
from tiered.convert.quantized import refuse_left_over
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
_JUNK: Final = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|rope\.freqs|(attention|attn)\.(bias|masked_bias)"
    r"|position_ids|(^|\.)_?version)$"
)
_PUBLISHED_NAMES: Final = {"lm_head.": "embed_out."}
"""Beginnings of names that transformers has changed since checkpoints were published (GPT-NeoX): new -> old."""
_PUBLISHED_PARTS: Final = (
    (".mlp.", ".block_sparse_moe."),  # Mixtral and its like
    (".mlp.router.", ".block_sparse_moe.gate."),  # Phi-MoE
    (".mlp.gate.moe_statics.", ".mlp.moe_statics."),  # ERNIE 4.5
    (".mlp.gate.e_score_correction_bias", ".mlp.e_score_correction_bias"),  # EXAONE-MoE
    (".block_sparse_moe.experts.gate_up_proj", ".block_sparse_moe.input_linear.weight"),  # Granite-MoE
    (".block_sparse_moe.experts.down_proj", ".block_sparse_moe.output_linear.weight"),
    (".block_sparse_moe.router.", ".block_sparse_moe.router.layer."),
)
"""Parts of names that differ in published checkpoints: new, old."""
_EXPERT_PARTS: Final = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""For each stack of experts, the matrices whose rows make up one expert, as published checkpoints may call them."""
_NAMES_SHOWN: Final = 5

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


@dataclass(frozen=True)
class NameMap:
    """Where each tensor of the model is in the checkpoint."""

    sources: Mapping[str, tuple[str, ...]]
    """Model name -> checkpoint names; where there are several, their rows in this order are the model's tensor."""
    duplicate_head: str | None
    """A tied head that the checkpoint holds as well; it must equal the embedding."""
    warnings: tuple[str, ...]


def map_names(skeleton: Skeleton, checkpoint: Collection[str]) -> NameMap:
    """Find every tensor of `skeleton` among the names of `checkpoint`.

    Raises CheckpointError, which names the first few that are missing, or that are parts of quantized weights.
    """
    present = set(checkpoint)
    base = str(skeleton.model.base_model_prefix)
    shapes = {parameter.name: parameter.shape for block in skeleton.blocks() for parameter in block.parameters}
    sources: dict[str, tuple[str, ...]] = {}
    for name, shape in shapes.items():
        found = _find(name, present, base)
        parts = (found,) if found is not None else _find_experts(name, shape, present, base)
        if parts:
            sources[name] = parts
    warnings: list[str] = []
    head = _find(skeleton.head_name, present, base)
    duplicate_head = None
    if skeleton.tied:
        if skeleton.embed_name in sources:
            duplicate_head = head
        elif head is not None:  # tying is symmetric: either of the two names may have been saved
            sources[skeleton.embed_name] = (head,)
    used = {*chain.from_iterable(sources.values()), *([duplicate_head] if duplicate_head else [])}
    unexpected = sorted(name for name in present - used if not _is_junk(name, skeleton))
    # Before missing tensors are reported: they may be there in a quantized form.
    wanted = (name for model_name in shapes for name in _candidates(model_name, base))
    refuse_left_over(unexpected, used.union(wanted), skeleton.config.name_or_path or "checkpoint")
    if not skeleton.tied and skeleton.head_name not in sources and skeleton.embed_name in sources:
        sources[skeleton.head_name] = _embedding_as_head(skeleton, sources[skeleton.embed_name], warnings)
    missing = [name for name in shapes if name not in sources]
    missing += sorted(part for parts in sources.values() for part in parts if part not in present)
    if missing:
        total = len(shapes) + sum(len(parts) - 1 for parts in sources.values())
        where = f"{skeleton.config.name_or_path}: " if skeleton.config.name_or_path else ""
        raise CheckpointError(
            f"{where}checkpoint lacks {len(missing)} of the {total} tensors of this model: {_some(missing)} "
            f"(looked for them with and without the prefix {base + '.'!r}); it has {_some(sorted(present))}. "
            "Does config.json belong to these weights, and are all files there?"
        )
    if unexpected:
        warnings.append(
            f"{len(unexpected)} tensors of the checkpoint have no place in the model and were left out: "
            f"{_some(unexpected)}"
        )
    return NameMap(sources, duplicate_head, tuple(warnings))


def _find(name: str, present: set[str], base: str) -> str | None:
    """The checkpoint's name for the model's `name`: the same, without the base model's prefix, or an old one."""
    return next((candidate for candidate in _candidates(name, base) if candidate in present), None)


def _candidates(name: str, base: str) -> Iterator[str]:
    old = (before + name.removeprefix(now) for now, before in _PUBLISHED_NAMES.items() if name.startswith(now))
    parts = (name.replace(now, before) for now, before in _PUBLISHED_PARTS if now in name)
    for candidate in (name, *old, *parts):
        yield candidate
        yield candidate.removeprefix(base + ".")


def _find_experts(name: str, shape: Sequence[int], present: set[str], base: str) -> tuple[str, ...]:
    """The checkpoint's names for all matrices of a stack, in the order of the stack's rows; empty where it has none."""
    for candidate in _candidates(name, base):
        experts, _, stack = candidate.rpartition(".")
        for matrices in _EXPERT_PARTS.get(stack, ()):
            parts = tuple(f"{experts}.{index}.{matrix}.weight" for index in range(shape[0]) for matrix in matrices)
            if not present.isdisjoint(parts):
                return parts
    return ()


def _embedding_as_head(skeleton: Skeleton, embedding: tuple[str, ...], warnings: list[str]) -> tuple[str, ...]:
    """The tensor to use for an absent head that config.json declares untied; raises where that would be a guess."""
    config = skeleton.config
    if not type(config)().tie_word_embeddings:
        where = f"{skeleton.config.name_or_path}: " if skeleton.config.name_or_path else ""
        raise CheckpointError(
            f"{where}checkpoint lacks the output projection {skeleton.head_name!r}, and config.json says that it is "
            f"not the embedding (tie_word_embeddings is false, the default of {config.model_type!r}); "
            "download the missing file, or set tie_word_embeddings to true if the two are in fact one"
        )
    warnings.append(
        f"checkpoint lacks {skeleton.head_name!r} though config.json says tie_word_embeddings is false; "
        f"{config.model_type!r} models tie them by default, so the embedding serves as head as well"
    )
    return embedding


def _is_junk(name: str, skeleton: Skeleton) -> bool:
    """Whether a name without a place in the model is one that transformers itself leaves out."""
    ignored = getattr(skeleton.model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return bool(_JUNK.search(name)) or any(re.search(pattern, name) for pattern in ignored)


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_NAMES_SHOWN])
    return f"{shown}, …" if len(names) > _NAMES_SHOWN else shown or "none"
