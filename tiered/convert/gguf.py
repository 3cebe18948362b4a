"""A model in GGUF: one file, or the parts of one (-00001-of-0000N). Its tensors by Hugging Face's names, and the files
that Hugging Face's checkpoint has beside its weights.

In: the files of a folder. Out: a `WeightIndex`, and config.json. Called by `open.py`. llama.cpp renames, and changes
some tensors: it interleaves the halves of each of Llama's query and key heads, adds 1 to Gemma's norms, and has one
stack of each matrix of all experts. Here they are the model's again. A tensor that has no place is an error.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tiered.convert.gather import Extent
from tiered.convert.gguf_config import ROPE_TENSORS, Entries, generation_config, model_config
from tiered.convert.gguf_file import GgufFile, GgufTensor, Metadata
from tiered.convert.gguf_reader import PLAIN_KINDS, GgufReader, GgufWeight, small_values
from tiered.convert.index import WeightIndex
from tiered.convert.place import GGUF_PART, WeightFiles, gguf_name
from tiered.errors import CheckpointError, UnsupportedFamilyError, some

SUFFIX: Final = ".gguf"
_PROJECTOR: Final = "mmproj"
"""How files begin that hold what a model sees with, beside its own."""
_LAYER: Final = re.compile(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)")
_OUTER: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_PARTS: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROUTED: Final = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_EXPERTS: Final = {f"ffn_{name}_exps": f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")}
_MIXTRAL_EXPERTS: Final = {
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
"""Stacks of experts: the names that published checkpoints have for the matrix of one, by its number."""
_GEMMA: Final = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class _Architecture:
    """How a model type of transformers lies in a file."""

    model_type: str
    parts: Mapping[str, str] = field(default_factory=dict)
    """Names within a layer that are other ones, or not in every architecture: the file's -> the model's."""
    experts: Mapping[str, str] = field(default_factory=dict)
    """The stacks of a mixture: the file's name -> what its matrices are called."""
    interleaved: bool = False
    """The halves of query and key heads are."""
    shifted: bool = False
    """Norms are, by 1."""


_ARCHITECTURES: Final = {
    "llama": _Architecture("llama", interleaved=True),
    "qwen2": _Architecture("qwen2"),
    "qwen2moe": _Architecture("qwen2_moe", _ROUTED, _EXPERTS),
    "qwen3": _Architecture("qwen3"),
    "qwen3moe": _Architecture("qwen3_moe", _ROUTED, _EXPERTS),
    "gemma": _Architecture("gemma", shifted=True),
    "gemma2": _Architecture("gemma2", _GEMMA, shifted=True),
    "gemma3": _Architecture("gemma3_text", _GEMMA, shifted=True),
    "phi3": _Architecture("phi3", {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
}
_MIXTRAL: Final = _Architecture(
    "mixtral", {"ffn_gate_inp": "block_sparse_moe.gate"}, _MIXTRAL_EXPERTS, interleaved=True
)
"""Is called llama in files, with experts."""


@dataclass(frozen=True)
class GgufModel:
    """A model in GGUF."""

    index: WeightIndex
    first: Path
    """The file with the metadata: the first part."""
    files: Mapping[str, bytes]
    """config.json and generation_config.json of Hugging Face's checkpoint of the model."""
    config: Mapping[str, Any]
    metadata: Metadata


def find_gguf(names: frozenset[str], where: Path) -> str | None:
    """The file of the one model in GGUF among the files `names` of the folder `where`, the first part of one in parts;
    None where there is none. Raises CheckpointError where it is unclear which is meant."""
    found = sorted(name for name in names if name.endswith(SUFFIX) and not name.startswith(_PROJECTOR))
    models = {gguf_name(name): name for name in reversed(found)}
    if len(models) > 1:
        raise CheckpointError(f"{where}: has several models in GGUF ({some(found)}); pass the file of the one meant")
    return next(iter(models.values()), None)


def parts_of(file: str, names: frozenset[str]) -> tuple[str, ...]:
    """The parts of the model that `file` belongs to, in order; raises CheckpointError where some are not in `names`."""
    match = GGUF_PART.fullmatch(file)
    if match is None:
        return (file,)
    parts = tuple(f"{match[1]}-{number + 1:05d}-of-{match[3]}{SUFFIX}" for number in range(int(match[3])))
    missing = [part for part in parts if part not in names]
    if missing or not parts:
        raise CheckpointError(f"{file}: lacks {some(missing)} of its {len(parts)} parts; download them beside it")
    return parts


def read_gguf(files: WeightFiles, names: Sequence[str]) -> GgufModel:
    """The model in the parts `names` of `files`.

    Raises CheckpointError where one is damaged, or holds what the model has no place for, and UnsupportedFamilyError
    for an architecture that is not read.
    """
    paths = [files.path(name) for name in names]
    read = [GgufFile.read(path) for path in paths]
    metadata, tensors = read[0].metadata, _joined(paths, read)
    name = metadata.get("general.architecture")
    architecture = _ARCHITECTURES.get(str(name))
    if architecture is None:
        raise UnsupportedFamilyError(
            f"{paths[0]}: a GGUF file of architecture {name!r}; read are {', '.join(_ARCHITECTURES)}: convert the "
            "original Hugging Face checkpoint"
        )
    if metadata.get("general.type", "model") != "model":
        raise CheckpointError(f"{paths[0]}: holds no model (general.type is {metadata['general.type']!r}); pass one")
    entries = Entries(paths[0], metadata, tensors.keys(), lambda name: small_values(GgufWeight(tensors[name])))
    if name == "llama" and entries.take("expert_count", 0) + entries.take("expert_used_count", 0):
        architecture = _MIXTRAL
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{paths[0]}: lacks token_embd.weight; download the file again")
    config = model_config(entries, architecture.model_type, embedding.shape[0], _dtype(tensors))
    weights = dict(_weights(paths[0], architecture, tensors, config["head_dim"]))
    file_of = {name: weight.tensor.extent.path.name for name, weight in weights.items()}
    index = WeightIndex(GgufReader(weights), tuple(names), file_of, is_exact=True)
    made = {"config.json": config, "generation_config.json": generation_config(entries)}
    contents = {name: f"{json.dumps(values, indent=2)}\n".encode() for name, values in made.items()}
    return GgufModel(index, paths[0], contents, config, metadata)


def _joined(paths: Sequence[Path], read: Sequence[GgufFile]) -> dict[str, GgufTensor]:
    """The tensors of all parts; raises CheckpointError where the parts are not those of one model."""
    found: dict[str, GgufTensor] = {}
    for number, (path, file) in enumerate(zip(paths, read, strict=True)):
        count = file.metadata.get("split.count", 0) or 1
        if count != len(paths) or file.metadata.get("split.no", number) != number:
            raise CheckpointError(
                f"{path}: is part {file.metadata.get('split.no', 0)} of {count} by its own header, by its name "
                f"{number} of {len(paths)}; pass the parts of one model by the names that they were made with"
            )
        twice = sorted(found.keys() & file.tensors.keys())
        if twice:
            raise CheckpointError(f"{path}: {twice[0]} is in {found[twice[0]].extent.path.name} too")
        found |= file.tensors
    total = read[0].metadata.get("split.tensors.count", len(found))
    if total != len(found):
        raise CheckpointError(f"{paths[0]}: all parts have {len(found)} tensors, expected {total}; download them again")
    return found


def _dtype(tensors: Mapping[str, GgufTensor]) -> str:
    """The dtype of config.json: of plain matrices, if all are."""
    kinds = {tensor.kind for tensor in tensors.values() if len(tensor.shape) > 1}
    return {frozenset({"F32"}): "float32", frozenset({"F16"}): "float16"}.get(frozenset(kinds), "bfloat16")


def _weights(
    path: Path, architecture: _Architecture, tensors: Mapping[str, GgufTensor], head_dim: int
) -> Iterator[tuple[str, GgufWeight]]:
    """Each tensor of the model by Hugging Face's name."""
    parts = {**_PARTS, **architecture.parts}
    for name, tensor in tensors.items():
        if name in ROPE_TENSORS:
            continue
        if len(tensor.shape) == 1 and tensor.kind not in PLAIN_KINDS:
            raise CheckpointError(f"{path}: {name} is a vector of {tensor.kind}, expected plain numbers")
        layer = _LAYER.fullmatch(name)
        part, _, leaf = (layer[2], "", layer[3]) if layer else name.rpartition(".")
        prefix = f"model.layers.{layer[1]}." if layer else ""
        own = (parts if layer else _OUTER).get(part)
        shift = -1.0 if architecture.shifted and part.endswith("norm") else 0.0
        interleaved = architecture.interleaved and part in ("attn_q", "attn_k") and tensor.shape[0] % head_dim == 0
        if layer and part in architecture.experts:
            yield from _experts(f"{prefix}{architecture.experts[part]}.{leaf}", tensor)
        elif own is None or leaf not in ("weight", "bias"):
            raise CheckpointError(
                f"{path}: holds {name}, for which a {architecture.model_type} model has no place here; convert the "
                "original Hugging Face checkpoint"
            )
        else:
            if own.endswith("shared_expert_gate") and len(tensor.shape) == 1:
                tensor = tensor._replace(shape=(1, *tensor.shape))
            yield f"{prefix}{own}.{leaf}", GgufWeight(tensor, head_dim if interleaved else 0, shift)


def _experts(name: str, stack: GgufTensor) -> Iterator[tuple[str, GgufWeight]]:
    """The matrices of a stack [experts, out, in]; `name` is what they are called, with a place for the number."""
    path, offset, nbytes = stack.extent
    if len(stack.shape) != 3:
        raise CheckpointError(f"{path}: {name.format('*')} are {list(stack.shape)}, expected [experts, out, in]")
    each = nbytes // stack.shape[0]
    for number in range(stack.shape[0]):
        extent = Extent(path, offset + number * each, each)
        yield name.format(number), GgufWeight(GgufTensor(stack.kind, stack.shape[1:], extent))
