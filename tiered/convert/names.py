"""From checkpoint names to model names: which tensor of the checkpoint holds each tensor of the model.

In: the skeleton's tensor names and the checkpoint's. Out: a `NameMap`. Pure.
Checkpoints of a bare base model drop its prefix (`decoder.…` for `model.decoder.…`, `h.0…` for `transformer.h.0…`),
tied heads are absent or a copy, old ones carry buffers that transformers recomputes, and most hold one tensor per
expert and matrix where the model has one stack of all.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from tiered.arch import Skeleton
from tiered.convert.quantized import refuse_left_over
from tiered.errors import CheckpointError

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
"""The matrices that lie below one another in each expert of a stack, as published checkpoints may call them."""
_NAMES_SHOWN: Final = 5


@dataclass(frozen=True)
class NameMap:
    """Where each tensor of the model is in the checkpoint."""

    sources: Mapping[str, tuple[str, ...]]
    """Model name -> checkpoint name; several where the model has their rows one below the other in one tensor."""
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
    # Before what is missing, which may be there in another form.
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
    """The checkpoint's names for all matrices of a stack, if it has any of them, in the order of the stack's rows."""
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
