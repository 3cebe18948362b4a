"""The families the engine drives, as data: one line each, no branches elsewhere; and why it does not drive the others.

A family is listed once a parity test (`tests/model/test_families.py`) has shown that recording its base model's
forward and replaying it block by block gives the same logits as transformers.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from tiered.errors import CheckpointError, UnsupportedFamilyError
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
        """The grid of the model with this configuration. Raises CheckpointError where that has none."""
        if isinstance(self.grid, int):
            return Grid(self.grid, self.one_cell)
        tokens = getattr(config, self.grid, None)
        if not isinstance(tokens, int) or tokens < 1:
            raise CheckpointError(
                f"{config.name_or_path or config.model_type}: {self.grid} is {tokens!r}, expected a whole number above "
                "0; put the model's own config.json there"
            )
        return Grid(tokens, self.one_cell)


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
    scan: Scan | None = None
    """Some of its layers keep a state of fixed size instead of keys and values, or beside them."""
    embedding_scale: str | None = None
    """The field of the configuration that its forward multiplies embeddings by, but only those that it has looked up
    itself."""
    is_recent: bool = False
    """It is driven as transformers computes it from 5.24 on: earlier versions take other arguments, or give the cache
    to it in another way."""

    @property
    def needs_recent(self) -> bool:
        """Whether transformers must be 5.24 or newer: before, mixers took their states in other ways, too."""
        return self.is_recent or self.scan is not None


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
    "apertus",
    "apertus1p5_text",
    "bitnet",
    "cohere_compass_text",
    "exaone",
    "internlm3",
    "iquestcoder",
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
    "afmoe",
    "aria_text",
    "beam",
    "flint",
    "hunyuan_v1_moe",
    "hy_v3",
    "kolibri1",
    "laguna",
)
"""Mixtures of experts, whose experts transformers keeps in one stack per layer: a store has each of them by itself."""

_PER_LAYER = IdTable("model.embed_tokens_per_layer", "model.get_per_layer_inputs", "per_layer_inputs")
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
        Family("gpt2", "transformer.h"),
        Family("ctrl", "transformer.h"),
        Family("dbrx", "transformer.blocks"),
        Family("gpt_neo", "transformer.h", gathers=True),
        Family("gpt_neox_japanese", "gpt_neox_japanese.layers", gathers=True),
        Family("biogpt", "biogpt.layers"),
        Family("xglm", "model.layers", gathers=True),
        Family("diffllama", "model.layers", gathers=True),
        Family("gemma4_text", "model.layers", tables=(_PER_LAYER,), is_recent=True),
        Family("doge", "model.layers", gathers=True, is_recent=True),
        Family("jetmoe", "model.layers", gathers=True),
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


_PLAIN_TEXT = ("llama", "mistral", "ministral3", "qwen2", "qwen3", "qwen3_moe", "gpt_oss")
"""Families whose logits are the head's product and nothing more: most models that also see compute no more than that,
whatever their text half alone would (Cohere's scale its logits)."""

TEXT_HALVES: dict[str, tuple[str, ...]] = {
    "gemma3": ("gemma3_text",),
    "gemma4": ("gemma4_text",),
    "llama4": ("llama4_text",),
    "qwen3_5": ("qwen3_5_text",),
    "qwen3_5_moe": ("qwen3_5_moe_text",),
    **dict.fromkeys(("mistral3", "llava", "llava_next", "vipllava", "internvl", "idefics3", "smolvlm"), _PLAIN_TEXT),
}
"""Models that also see, with the text families that compute, where no picture is among the tokens, what the whole model
does. Of their checkpoints the text half is converted."""


_REASONS: dict[str, tuple[str, ...]] = {
    "it is an encoder, which generates text only as half of another model": (
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
        *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
        *("xlm", "xmod"),
    ),
    "its decoder attends to what an encoder has read, which has no place in a pass over one text": (
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
        *("prophetnet", "trocr", "whisper"),
    ),
    "it generates or reads pictures or sound by its own layers, and is no text model with something beside it": (
        *("emu3", "fuyu", "git", "got_ocr2", "mllama", "moshi", "moss_transcribe_diarize", "musicgen"),
        *("musicgen_melody", "phi4_multimodal"),
    ),
    "its layers keep a recurrent state that is not driven yet": (
        *("bailing_hybrid", "inkling_text", "inkling2_text", "lara_mini", "lfm3", "minimax", "rwkv", "xlstm", "zamba"),
        *("zamba2", "zaya"),
    ),
    "its recurrent state is kept in a way in which a second part of a prompt gives other logits without an error": (
        *("falcon_mamba", "mamba", "recurrent_gemma"),
    ),
    "its published queries, keys and values are put together from parts of unequal height, which are not taken apart "
    "or put together here": ("kimi_linear", "olmo_hybrid", "sarvam_moe"),
    "each of its layers attends twice, to latents of its own": ("longcat_flash",),
    "its attention chooses what it reads by an index of its own beside keys and values": (
        *("axk2", "deepseek_v32", "deepseek_v4", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4"),
        *("minimax_m3_vl_text", "qwen4_exp", "qwen4_exp_text"),
    ),
    "its layers have keys and values of different shapes, or share them, in a way which is not driven yet": (
        *("gemma4_unified", "gemma4_unified_text", "mimo_v2_flash"),
    ),
    "several versions of a token's hidden state go through its layers": ("gemma3n", "gemma3n_text"),
    "it drafts tokens for another model, whose hidden states it reads": (
        *("gemma4_assistant", "gemma4_unified_assistant"),
    ),
    "its forward goes through its layers in another way than once, one after the other": (
        *("blt", "hrm_text", "inkling2_loop_text", "reformer", "xlnet"),
    ),
    "its projection to logits is no linear layer alone": ("dory",),
    "transformers itself loads other weights than its file has": ("youtu",),
    "it has no configuration of its own: those of its models say gpt2": ("gpt-sw3",),
    "what enters its layers is more than the embeddings of tokens": ("cpmant",),
    "its forward takes no cache": ("openai-gpt",),
}

REFUSED: dict[str, str] = {family: reason for reason, families in _REASONS.items() for family in families}
"""Why each of transformers' causal language models that is not in the table is not."""


def family_for(model_type: str) -> Family:
    """The table entry of `model_type`.

    Raises UnsupportedFamilyError, which says why it is not supported, or lists what is.
    """
    family = FAMILIES.get(model_type)
    if family is None and model_type in REFUSED:
        raise UnsupportedFamilyError(f"model family {model_type!r} is not supported: {REFUSED[model_type]}")
    if family is None:
        raise UnsupportedFamilyError(
            f"model family {model_type!r} is not supported: tiered drives decoder-only families whose layers "
            f"it has been tested to replay exactly, which are {', '.join(sorted(FAMILIES))}"
        )
    return family
