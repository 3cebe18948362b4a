"""Whether a checkpoint's weights are quantized in a form that is not read: by config.json, by dtypes, by names.

In: configuration, dtypes and names. Out: the name of the quantization method, for the one error that refuses them all.
A conversion that left out a scale would not fail, it would give another model: so no tensor that belongs to a weight
may be left over.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from transformers import PretrainedConfig

from tiered.errors import CheckpointError

PLAIN: Final = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""The types of weights that are not quantized."""
READ_METHODS: Final = (
    *("gptq", "auto-round", "awq", "compressed-tensors", "fp8", "fbgemm_fp8", "modelopt", "mxfp4", "bitsandbytes"),
)
"""Methods whose formats are read (`kinds.py`), as config.json calls them."""
_TYPES: Final = {
    torch.int8: "int8",
    torch.uint8: "packed in uint8",
    torch.int16: "packed in int16",
    torch.int32: "packed in int32",
    torch.uint32: "packed in uint32",
    torch.qint8: "int8",
    torch.quint8: "int8",
}
_NAMES: Final = (
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "gptq or awq"),
    (re.compile(r"(absmax|quant_map|\.SCB|\.weight_format)$|\.quant_state\."), "bitsandbytes"),
    (re.compile(r"\.weight_(packed|shape|zero_point|g_idx|global_scale)$"), "compressed-tensors"),
    (re.compile(r"_(blocks|scales)$"), "mxfp4"),
    (re.compile(r"\.(W_q|quant_scale|quant_zero)$"), "hqq"),
    (re.compile(r"\.(codebooks|codes|Qidxs|centroids)$"), "codebooks"),
    (re.compile(r"\.weight\._(data|scale|shift)$"), "quanto"),
    (re.compile(r"\.weight_scale_2$"), "nvfp4"),
    (re.compile(r"weight_scale_inv$"), "fp8"),
    (re.compile(r"\.scales$|(weight|input|activation)_scales?$"), "fp8 or int8"),
)
"""Names of tensors that stand beside or in place of a quantized weight, and the method that uses them."""
_CACHE_SCALES: Final = re.compile(r"[._](q|k|v|kv|prob)_scale$")
"""Scales of a KV cache in 8 bits: the weights do not depend on them."""
_SHOWN: Final = 3


def refuse_quantized(name: str, method: str | None) -> None:
    """Raise CheckpointError unless `method`, by which the weights of the checkpoint `name` are quantized, is None."""
    if method is not None:
        raise CheckpointError(
            f"{name}: its weights are already quantized ({method}), in a form that is not read; pass one that is "
            "(docs/folders.md lists them), or the original checkpoint, of 16 or 32 bits"
        )


def quantization_config(config: PretrainedConfig) -> Mapping[str, Any]:
    """What config.json says of how the weights are quantized; empty where it says nothing."""
    for key in ("quantization_config", "compression_config"):
        found = getattr(config, key, None)
        if found:
            return found if isinstance(found, dict) else dict(found.to_dict())
    return {}


def configured_method(quantization: Mapping[str, Any]) -> str | None:
    """The method that `quantization_config` names; None where it says nothing."""
    return str(quantization.get("quant_method") or "quantization_config in config.json") if quantization else None


def refuse_unread(name: str, quantization: Mapping[str, Any]) -> None:
    """Raise CheckpointError where `quantization`, of config.json, is of a method that is not read, or says that what
    comes into layers is transformed: tensors alone would not tell."""
    method = configured_method(quantization)
    refuse_quantized(name, None if method in READ_METHODS else method)
    transforms = quantization.get("transform_config")
    if transforms and (not isinstance(transforms, Mapping) or transforms.get("config_groups")):
        refuse_quantized(name, f"{method}, with rotated weights: transform_config in config.json")


def method_of_float(dtype: torch.dtype) -> str | None:
    """The method that keeps weights as `dtype`, where that is a floating type of 8 bits or less."""
    name = str(dtype).removeprefix("torch.")
    return f"fp{name[5]}" if name.startswith("float") and dtype not in PLAIN else None


def method_of_type(dtype: torch.dtype) -> str | None:
    """The method that keeps weights as `dtype`; None for a plain type, and for one that no method uses."""
    return method_of_float(dtype) or _TYPES.get(dtype)


def refuse_left_over(left: Sequence[str], weights: Collection[str], where: str = "checkpoint") -> None:
    """Raise CheckpointError where one of the tensors `left`, which have no place in the model, comes from quantization
    or is another part of one of its `weights`. `where` is what the error calls the checkpoint."""
    left = [name for name in left if not _CACHE_SCALES.search(name)]
    for pattern, method in _NAMES:
        found = [name for name in left if pattern.search(name)]
        if found:
            refuse_quantized(where, f"{method}: it has {_some(found)}")
    found = list(_parts(left, set(weights)))
    if found:
        raise CheckpointError(
            f"{where}: has {len(found)} parts of weights that the model has no place for ({_some(found)}); without "
            "them it would be another model: pass the original checkpoint, adapters merged, weights of 16 or 32 bits"
        )


def _parts(left: Collection[str], weights: set[str]) -> Iterator[str]:
    """The names in `left` that continue a weight's name, or lie in the module whose `weight` it is.

    Biases are not among them: a bias is a term of its own, which config.json may leave out.
    """
    modules = {weight.removesuffix(".weight") for weight in weights if weight.endswith(".weight")}
    for name in left:
        if name.endswith("bias"):
            continue
        above = [name[: match.start()] for match in re.finditer(r"\.|_", name)]
        inside = {part for part in above if name[len(part)] == "."}
        if not weights.isdisjoint(above) or not modules.isdisjoint(inside):
            yield name


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
