"""The families the engine drives, as data: one line each, no branches elsewhere.

A family is listed once a parity test (`tests/model/test_families.py`) has shown that recording its base model's
forward and replaying it block by block gives the same logits as transformers.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from tiered.errors import UnsupportedFamilyError
from tiered.plan.state import Grid


@dataclass(frozen=True)
class Scan:
    """How recurrent layers compute several tokens of a sequence at once: on a grid that begins with the text."""

    grid: int | str = 1
    """Tokens from one line of the grid to the next, or the field of the configuration that has them. A prompt that is
    cut there, and nowhere else, has the bits of one that is not. 1: anywhere; 0: nowhere, as a scan of several tokens
    begins without the state that earlier ones have left."""
    one_cell: bool = False
    """What is computed at once ends with the cell of the grid that it begins in: over several cells the family's code
    sums in another order."""

    def grid_of(self, config: PretrainedConfig) -> Grid:
        """The grid of the model with this configuration."""
        tokens = self.grid if isinstance(self.grid, int) else int(getattr(config, self.grid))
        return Grid(tokens, self.one_cell)


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
    scan: Scan | None = None
    """Some of its layers keep a state of fixed size instead of keys and values, or beside them."""
    embedding_scale: str | None = None
    """The field of the configuration that its forward multiplies embeddings by, but only those that it has looked up
    itself."""


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
    "mellum",
)
"""Mixtures of experts, whose experts transformers keeps in one stack per layer: a store has each of them by itself."""

_DELTA = Scan(64)
"""Gated delta rule: 64 is a constant of the families' code."""
_MAMBA2 = Scan("mamba_chunk_size", one_cell=True)

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
        Family("gpt_neo", "transformer.h", gathers=True),
        Family("gpt_neox_japanese", "gpt_neox_japanese.layers", gathers=True),
        Family("biogpt", "biogpt.layers"),
        Family("xglm", "model.layers", gathers=True),
        Family("diffllama", "model.layers", gathers=True),
        *(Family(name, "model.layers") for name in (*_MODEL_LAYERS, *_MIXTURES)),
        *(Family(name, "model.layers", scan=_DELTA) for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")),
        *(Family(name, "model.layers", scan=Scan()) for name in ("lfm2", "lfm2_moe")),
        *(Family(name, "model.layers", scan=_MAMBA2) for name in ("bamba", "granitemoehybrid")),
        Family("falcon_h1", "model.layers", scan=_MAMBA2, embedding_scale="embedding_multiplier"),
        Family("mamba2", "backbone.layers", scan=Scan("chunk_size", one_cell=True)),
        Family("nemotron_h", "model.layers", scan=Scan("chunk_size", one_cell=True)),
        Family("jamba", "model.layers", scan=Scan(0)),
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
