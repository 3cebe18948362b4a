"""The families the engine drives, as data: one line each, no branches elsewhere.

A family is listed once a parity test (`tests/model/test_families.py`) has shown that recording its base model's
forward and replaying it block by block gives the same logits as transformers.
"""

from dataclasses import dataclass

from tiered.errors import UnsupportedFamilyError


@dataclass(frozen=True)
class IdTable:
    """A table, beside the token embedding, whose rows the tokens of a pass choose by their ids: it stays on disk."""

    module: str
    """Path of the nn.Embedding inside the causal LM. A configuration may do without it."""
    look_up: str
    """Path of what returns the model's own values for ids [rows, tokens]: the module itself, or a method around it."""
    argument: str
    """By this name the forward takes them; without, it would look them up itself."""


@dataclass(frozen=True)
class Family:
    """What the engine has to know of one `model_type`."""

    model_type: str
    layers: str
    """Path of the ModuleList of decoder layers inside the causal LM, e.g. "model.decoder.layers"."""
    exact_dtype: str | None = None
    """Compute dtype the family's own code insists on; None where any floating type works."""
    gathers: bool = False
    """Dense attention: the family has attention code of its own, which takes keys and values as whole tensors. They
    are gathered from the cache for every layer, and sequences are padded to equal length."""
    tables: tuple[IdTable, ...] = ()


_MODEL_LAYERS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "stablelm",
    "starcoder2",
    "olmo",
    "olmo2",
    "olmo3",
    "granite",
    "cohere",
    "cohere2",
    "smollm3",
    "glm",
    "glm4",
    "helium",
    "nemotron",
    "exaone4",
    "ministral",
    "ministral3",
    "arcee",
    "seed_oss",
    "cwm",
    "ernie4_5",
    "granite_swa",
    "hunyuan_v1_dense",
    "hyperclovax",
    "jais2",
    "nanochat",
    "persimmon",
    "vaultgemma",
    "modernbert-decoder",
    "minicpm3",
)

_MIXTURES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "phimoe",
    "granitemoe",
    "granitemoeshared",
    "granitemoe_swa",
    "ernie4_5_moe",
    "glm4_moe",
    "dots1",
    "minimax_m2",
    "flex_olmo",
    "exaone_moe",
    "cohere2_moe",
    "solar_open",
    "llama4_text",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "axk1",
    "sarvam_mla",
    "mellum",
    "gpt_oss",
)
"""Mixtures of experts, whose experts transformers keeps in one stack per layer: a store has each of them by itself."""

_PER_LAYER = IdTable("model.embed_tokens_per_layer", "model.get_per_layer_inputs", "per_layer_inputs")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("opt", "model.decoder.layers"),
        Family("gpt_neox", "gpt_neox.layers"),
        Family("bloom", "transformer.h", gathers=True),
        Family("falcon", "transformer.h", gathers=True),
        Family("gptj", "transformer.h", gathers=True),
        Family("codegen", "transformer.h", gathers=True),
        Family("mpt", "transformer.blocks", gathers=True),
        Family("gpt_bigcode", "transformer.h"),
        Family("gpt2", "transformer.h"),
        Family("gpt_neo", "transformer.h", gathers=True),
        Family("gpt_neox_japanese", "gpt_neox_japanese.layers", gathers=True),
        Family("biogpt", "biogpt.layers"),
        Family("xglm", "model.layers", gathers=True),
        Family("diffllama", "model.layers", gathers=True),
        Family("gemma4_text", "model.layers", tables=(_PER_LAYER,)),
        *(Family(name, "model.layers") for name in (*_MODEL_LAYERS, *_MIXTURES)),
    )
}


def family_for(model_type: str) -> Family:
    """The table entry of `model_type`.

    Raises UnsupportedFamilyError, which lists what is supported.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedFamilyError(
            f"model family {model_type!r} is not supported: tiered drives decoder-only families whose layers "
            f"it has been tested to replay exactly, which are {', '.join(sorted(FAMILIES))}. "
            "Encoder-decoder, recurrent and multimodal checkpoints are not among them."
        )
    return family
