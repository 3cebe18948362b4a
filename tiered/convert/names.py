"""Under which names a checkpoint holds each tensor of the model.

In: the skeleton, and the names of a checkpoint. Out: a `NameMap`, by which `checkpoint.py` reads. Names are read as
transformers reads them, by its table of renamings and of tensors that are put together: most published mixtures hold
one tensor per expert and matrix where the model has one stack of all experts. Checkpoints of a bare base model drop its
prefix (`decoder.…` for `model.decoder.…`, `h.0…` for `transformer.h.0…`), those of a model that also sees or hears have
a prefix of their own before names of the half that reads, tied heads are absent or a copy, and old checkpoints hold
buffers that transformers recomputes.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from tiered.arch import Skeleton
from tiered.convert.quantized import refuse_left_over
from tiered.errors import CheckpointError

_JUNK: Final = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|rope\.freqs|(attention|attn)\.(bias|masked_bias)"
    r"|position_ids|(^|\.)_?version)$"
)
_TEXT_PREFIXES: Final = {
    "model.language_model.model.": "model.",
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "model.text_model.": "model.",
    "language_model.": "",
}
"""Before names of the half that reads, in a checkpoint of a model that sees or hears too: theirs, the text model's. The
first that fits counts."""
_PUT_TOGETHER: Final = (
    ("MergeModulelist", 0),
    ("Concatenate", 1),
)
"""What transformers does to the matrices of experts: one stack of each kind, and the kinds one above the other."""
_NUMBER: Final = re.compile(r"(.*\.)(\d+)(\..*)")
"""A name with the last of its numbers, which in those of experts' matrices is the expert's."""
_NAMES_SHOWN: Final = 5


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
    own = text_names(checkpoint)
    shapes = {parameter.name: parameter.shape for block in skeleton.blocks() for parameter in block.parameters}
    found = _find_all(skeleton, own, shapes)
    sources = {name: parts for name, parts in found.items() if name in shapes}
    warnings: list[str] = []
    duplicate_head = None
    head = found.get(skeleton.head_name)
    if skeleton.tied and head is not None:
        if skeleton.embed_name in sources:
            (duplicate_head,) = head
        else:  # tying is symmetric: either of the two names may have been saved
            sources[skeleton.embed_name] = head
    used = {*chain.from_iterable(sources.values()), *([duplicate_head] if duplicate_head else [])}
    unexpected = _sort_out(skeleton, sorted(own.keys() - used), own, warnings)
    # Before missing tensors are reported: they may be there in a quantized form.
    base = f"{skeleton.model.base_model_prefix}."
    wanted = {*used, *shapes, *(name.removeprefix(base) for name in shapes)}
    refuse_left_over(unexpected, wanted, skeleton.config.name_or_path or "checkpoint")
    if not skeleton.tied and skeleton.head_name not in sources and skeleton.embed_name in sources:
        sources[skeleton.head_name] = _embedding_as_head(skeleton, sources[skeleton.embed_name], warnings)
    _check_complete(skeleton, shapes, sources, own)
    if unexpected:
        warnings.append(
            f"{len(unexpected)} tensors of the checkpoint have no place in the model and were left out: "
            f"{_some(unexpected)}"
        )
    return NameMap(
        {name: tuple(own[part] for part in parts) for name, parts in sources.items()},
        None if duplicate_head is None else own[duplicate_head],
        tuple(warnings),
    )


def has_head(skeleton: Skeleton, checkpoint: Collection[str]) -> bool:
    """Whether `checkpoint` has an output projection of its own, be it a copy of the embedding."""
    return skeleton.head_name in _find_all(skeleton, text_names(checkpoint), {})


def text_names(checkpoint: Collection[str]) -> dict[str, str]:
    """The names of `checkpoint` as a model that only reads has them -> as they are. Names of the other half stay as
    they are.

    Raises CheckpointError where two names become one.
    """
    names: dict[str, str] = {}
    for name in checkpoint:
        prefix = next((prefix for prefix in _TEXT_PREFIXES if name.startswith(prefix)), "")
        text = _TEXT_PREFIXES.get(prefix, "") + name.removeprefix(prefix)
        if names.setdefault(text, name) != name:
            raise CheckpointError(
                f"checkpoint holds both {names[text]} and {name}, which are one tensor of its text model; "
                "remove the one that does not belong to it"
            )
    return names


def _find_all(
    skeleton: Skeleton, own: Collection[str], shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[str, ...]]:
    """For each tensor of the model, and for a tied head: which of the names `own` make it, read as transformers does.

    Tensors that transformers puts together in a way that is no order of rows are left out. So are those of which one
    kind of part is not there at all; where only some are missing, their names are in the result.
    """
    mapping = get_model_conversion_mapping(skeleton.model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    # The values are never looked at, but None would be no tensor.
    wanted = {**dict.fromkeys(shapes, True), skeleton.head_name: True}
    base = str(skeleton.model.base_model_prefix)
    parts: dict[str, dict[str | None, list[str]]] = {}
    for key in sorted(own, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, base, wanted)
        if name in wanted:
            parts.setdefault(name, {}).setdefault(pattern, []).append(key)
    found: dict[str, tuple[str, ...]] = {}
    for name, of_pattern in parts.items():
        whole = of_pattern.pop(None, [])
        if whole:
            # The model's own name before others that mean the same.
            found[name] = (min(whole, key=lambda key: key != name),)
            continue
        converter = next(each for each in converters if not of_pattern.keys().isdisjoint(each.source_patterns))
        rows = _in_order(converter, of_pattern, shapes.get(name, ()))
        if rows:
            found[name] = rows
    return found


def _in_order(
    converter: WeightConverter, of_pattern: Mapping[str | None, list[str]], shape: Sequence[int]
) -> tuple[str, ...]:
    """The parts that `converter` makes one tensor of `shape` of, in the order of its rows; empty where it does not
    merely put them one below the other."""
    if not of_pattern.keys() >= set(converter.source_patterns):
        return ()
    kinds = [of_pattern[pattern] for pattern in converter.source_patterns]
    done = tuple((type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations)
    if done == (("Concatenate", 0),):
        return tuple(chain.from_iterable(kinds))
    if done in (_PUT_TOGETHER, _PUT_TOGETHER[:1]):
        names = [_NUMBER.sub(r"\1{}\3", keys[0].replace("{", "{{")) for keys in kinds]
        return tuple(name.format(expert) for expert in range(shape[0]) for name in names)
    return ()


def _sort_out(skeleton: Skeleton, left: Iterable[str], own: Mapping[str, str], warnings: list[str]) -> list[str]:
    """Those of the names `left` for which there is no reason that they have no place in the model.

    What is of the other half of a model that sees or hears, and what transformers leaves out by name, such as layers
    that predict several tokens at once, goes into one of the `warnings`.
    """
    is_half = any(name != given for name, given in own.items())
    ignored = getattr(skeleton.model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unexpected: list[str] = []
    others: Counter[str] = Counter()
    for name in left:
        if _JUNK.search(name):
            continue
        is_other = is_half and name == own[name]
        if is_other or any(re.search(pattern, name) for pattern in ignored):
            others[_part_of(name)] += 1
        else:
            unexpected.append(name)
    if others:
        shown = ", ".join(f"{part} ({count} tensors)" for part, count in others.items())
        warnings.append(f"left out what text is generated without: {shown}")
    return unexpected


def _part_of(name: str) -> str:
    """What the tensor `name` is said to be a part of: "mtp", "model.visual", "model.layers.61"."""
    words = name.split(".")
    count = 2 if words[0] == "model" else 1
    return ".".join(words[: count + (words[count - 1] == "layers")])


def _check_complete(
    skeleton: Skeleton,
    shapes: Collection[str],
    sources: Mapping[str, tuple[str, ...]],
    own: Mapping[str, str],
) -> None:
    """Raise CheckpointError where a tensor of the model, or a part of one, is not among the names `own`."""
    missing = [name for name in shapes if name not in sources]
    missing += sorted(part for parts in sources.values() for part in parts if part not in own)
    if missing:
        total = len(shapes) + sum(len(parts) - 1 for parts in sources.values())
        where = f"{skeleton.config.name_or_path}: " if skeleton.config.name_or_path else ""
        raise CheckpointError(
            f"{where}checkpoint lacks {len(missing)} of the {total} tensors of this model: {_some(missing)} "
            f"(looked for them with and without the prefix {skeleton.model.base_model_prefix + '.'!r}); "
            f"it has {_some(sorted(own.values()))}. Does config.json belong to these weights, and are all files there?"
        )


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


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_NAMES_SHOWN])
    return f"{shown}, …" if len(names) > _NAMES_SHOWN else shown or "none"
