"""How the tensors of a quantized weight are called, in each of the formats in which checkpoints are published.

Out: `KINDS`, by which `quantized_reader.py` finds quantized weights among the names of a checkpoint. A kind says which
tensor is which part, what `published.py` makes of them, and what config.json says of them before they are here.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tiered.convert.formats import Format, Read, group_scheme
from tiered.convert.published import (
    Parts,
    Settings,
    bitsandbytes_4bit,
    bitsandbytes_int8,
    gptq,
    mxfp4_experts,
    packed,
    scaled,
)
from tiered.errors import CheckpointError, shortened
from tiered.quant import CodebookScheme, Scheme
from tiered.quant.schemes import GROUP_SIZES


def config_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What `config`, of config.json, says of the module `name`: `dynamic` of GPTQModel and `extra_config` of AutoRound
    may say something else of some modules than of all.

    Of `dynamic` counts the first pattern that the name begins with; one after "-:" is for modules that are not
    quantized. Raises CheckpointError where a pattern is no regular expression.
    """
    dynamic, extra = config.get("dynamic"), config.get("extra_config")
    own = extra.get(name) if isinstance(extra, Mapping) else None
    for pattern, said in dynamic.items() if isinstance(dynamic, Mapping) else ():
        try:
            found = re.match(re.sub("^[+-]:", "", pattern), name)
        except re.error as error:
            raise CheckpointError(
                f"config.json: quantization_config: dynamic: expected regular expressions, found {shortened(error)} in "
                f"{pattern!r}; download it again, or correct it"
            ) from None
        if found:
            own = {"bits": None} if pattern.startswith("-:") else said
            break
    return {**config, **own} if isinstance(own, Mapping) else config


def _declared_words(config: Mapping[str, Any]) -> tuple[str, Scheme | None]:
    bits, size = config.get("bits"), config.get("group_size")
    method = f"{config.get('quant_method', 'gptq')} int{bits}"
    if config.get("desc_act") or not isinstance(bits, int) or not isinstance(size, int):
        return method, None
    return method, group_scheme(bits, size if size > 0 else max(GROUP_SIZES))


def _declared_groups(config: Mapping[str, Any]) -> tuple[str, Scheme | None]:
    groups = config.get("config_groups")
    found = [group["weights"] for group in groups.values()] if isinstance(groups, dict) else []
    schemes = set()
    for weights in found:
        bits, size = weights.get("num_bits"), weights.get("group_size") or max(GROUP_SIZES)
        is_plain = weights.get("type") == "int" and not weights.get("actorder")
        schemes.add(group_scheme(bits, size) if is_plain else CodebookScheme("mxfp4", 32) if size == 32 else None)
    return "compressed-tensors", schemes.pop() if len(schemes) == 1 else None


def _declared_mxfp4(config: Mapping[str, Any]) -> tuple[str, Scheme | None]:
    return "mxfp4", CodebookScheme("mxfp4", 32)


def _declared_nf4(config: Mapping[str, Any]) -> tuple[str, Scheme | None]:
    kind = config.get("bnb_4bit_quant_type", "fp4")
    return f"bitsandbytes {kind}", CodebookScheme("nf4", 64) if kind == "nf4" else None


@dataclass(frozen=True)
class Kind:
    """How the tensors of one weight are called: NAME + `mark` makes it one of these, and others may belong to it."""

    mark: str
    name: str
    """What follows NAME in the name that the weight has in 16 bits."""
    parts: Mapping[str, str]
    """What follows NAME in the name of each tensor -> the part of the weight that it is; "" is not read."""
    needed: tuple[str, ...]
    main: str
    """The part with the codes, whose file the weight counts to."""
    describe: Callable[[Parts, Read, Settings], Format]
    declared: Callable[[Mapping[str, Any]], tuple[str, Scheme | None]]
    """The method, and the scheme that holds its codes, if any, by config.json: for weights that are not here yet."""


_ACTIVATIONS: Final = {
    f".{name}": ""
    for name in ("input_scale", "input_global_scale", "input_zero_point", "input_scale_ub", "output_scale")
}
"""Scales of what a weight is multiplied by: weights do not depend on them."""


def _scaled(mark: str, weight: str) -> Kind:
    """A weight NAME + `weight` with scales NAME + `weight` + `mark`."""
    parts = {weight: "weight", f"{weight}{mark}": "scale", f"{weight}_scale_2": "scale_2"}
    parts[f"{weight}_zero_point"] = "zero_point"
    return Kind(
        f"{weight}{mark}",
        weight,
        {**parts, **_ACTIVATIONS},
        ("weight", "scale"),
        "weight",
        scaled,
        lambda _: ("fp8", None),
    )


KINDS: Final = (
    Kind(
        ".qweight",
        ".weight",
        {f".{part}": part for part in ("qweight", "qzeros", "scales", "g_idx")},
        ("qweight", "qzeros", "scales"),
        "qweight",
        gptq,
        _declared_words,
    ),
    Kind(
        ".weight_packed",
        ".weight",
        {
            **{
                f".weight_{part}": f"weight_{part}"
                for part in ("packed", "scale", "shape", "zero_point", "g_idx", "global_scale")
            },
            **_ACTIVATIONS,
        },
        ("weight_packed", "weight_scale"),
        "weight_packed",
        packed,
        _declared_groups,
    ),
    Kind(
        "_blocks",
        "",
        {"_blocks": "blocks", "_scales": "scales"},
        ("blocks", "scales"),
        "blocks",
        mxfp4_experts,
        _declared_mxfp4,
    ),
    Kind(
        ".weight.absmax",
        ".weight",
        {
            ".weight": "weight",
            **{f".weight.{part}": part for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")},
            **{f".weight.quant_state.bitsandbytes__{kind}": "quant_state" for kind in ("nf4", "fp4")},
        },
        ("weight", "absmax", "quant_map", "quant_state"),
        "weight",
        bitsandbytes_4bit,
        _declared_nf4,
    ),
    Kind(
        ".SCB",
        ".weight",
        {".weight": "weight", ".SCB": "scale", ".weight_format": "format"},
        ("weight", "scale"),
        "weight",
        bitsandbytes_int8,
        lambda _: ("bitsandbytes int8", None),
    ),
    *(_scaled(mark, weight) for weight in (".weight", "_proj") for mark in ("_scale_inv", "_scale")),
)
"""All formats that are read; of a name that several fit, the first counts."""
