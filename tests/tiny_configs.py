"""Configurations of the tiny models: every family, and the variants of a family that compute differently.

Long, because it is a table: a family more is an entry more. `Tiny` (tests/tiny.py) makes the models.
"""

from typing import Any, Final

import transformers
from transformers import CONFIG_MAPPING, AutoConfig

from tiered.arch import FAMILIES

CONTEXT: Final = 64
"""Tokens that each tiny model has positions for."""
WINDOW: Final = 8
"""Sliding window of the families that have one: shorter than the prompts."""

_SIZES: Final[dict[str, Any]] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    # Greedy decoding is to go on for as long as a test likes.
    "eos_token_id": None,
}
_UNGROUPED: Final = {"num_key_value_heads": None, "head_dim": None}
"""For families that know no grouped attention."""
_SLIDING: Final = {"sliding_window": WINDOW}
_MIXED: Final = {**_SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_ROPE: Final = {"rope_type": "default", "rope_theta": 10000.0}
_OPT: Final = {**_UNGROUPED, "model_type": "opt", "ffn_dim": 128, "word_embed_proj_dim": 64}
_FALCON: Final = {**_UNGROUPED, "model_type": "falcon", "ffn_hidden_size": 128}
_EXPERTS: Final = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
"""Under every name that some family of mixtures has for it."""
_GROUPED_EXPERTS: Final = {
    **_EXPERTS,
    **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "norm_topk_prob": True},
}
"""For families that choose among groups of experts first, and have a first layer without."""
_LATENT: Final = {
    **_UNGROUPED,
    **{"q_lora_rank": 32, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24},
}
"""For families that keep latents, of which attention makes keys and values."""
_SOFT_CAPS: Final = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
_GEMMA4: Final = {
    **_SLIDING,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "vocab_size_per_layer_input": 160,
    "final_logit_softcapping": 3.0,
    "global_head_dim": 32,
}
_GEMMA4_SHARING: Final = {
    **_GEMMA4,
    "hidden_size_per_layer_input": 32,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
}
_GEMMA4_EXPERTS: Final = {
    **_GEMMA4,
    "model_type": "gemma4_text",
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
}
"""Gemma 4 as the small models have it, and as the mixture."""

_ALTERNATING: Final = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_DELTA: Final = {
    **_ALTERNATING,
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16},
}
_MAMBA: Final = {
    **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_chunk_size": 8},
    "mamba_expand": 2,
}

_MODELS: Final[dict[str, dict[str, Any]]] = {
    "opt": _OPT,
    "opt-350m": {**_OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "gpt_neox": {**_UNGROUPED, "use_parallel_residual": True},
    "gpt_neox-sequential": {**_UNGROUPED, "model_type": "gpt_neox", "use_parallel_residual": False},
    "bloom": _UNGROUPED,
    "falcon": {**_FALCON, "multi_query": True, "alibi": False},
    "falcon-new": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "falcon-alibi": {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    "llama": {},
    "llama-tied-biased": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama-scaled-rope": {
        "model_type": "llama",
        "rope_parameters": {
            **_ROPE,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": _SLIDING,
    "qwen2": {},
    "qwen2-sliding-yarn": {
        **_SLIDING,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "max_window_layers": 1,
        "rope_parameters": {**_ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "qwen3": {},
    "phi": {"qk_layernorm": True},
    "phi3": _SLIDING,
    "gemma": {},
    "gemma2": {**_MIXED, **_SOFT_CAPS, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_MIXED, "query_pre_attn_scalar": 16},
    "gemma4_text": _GEMMA4_SHARING,
    "gemma4_text-experts": _GEMMA4_EXPERTS,
    "stablelm": {"use_qkv_bias": True},
    "stablelm-parallel": {"model_type": "stablelm", "use_parallel_residual": True, "qk_layernorm": True},
    "starcoder2": _SLIDING,
    "olmo": {"clip_qkv": 1.0},
    "olmo2": {},
    "olmo3": _MIXED,
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "cohere": {"use_qk_norm": True},
    "cohere2": _MIXED,
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "glm": {},
    "glm4": {},
    "helium": {},
    "nemotron": {},
    "exaone4": _MIXED,
    "ministral": _MIXED,
    "ministral3": {"rope_parameters": {**_ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}},
    "arcee": {},
    "seed_oss": {},
    "cwm": {**_MIXED, "rope_parameters": _ROPE},
    "diffllama": {},
    "ernie4_5": {},
    "granite_swa": _MIXED,
    "hunyuan_v1_dense": {},
    "hyperclovax": {},
    "jais2": {},
    "nanochat": {},
    "persimmon": _UNGROUPED,
    "vaultgemma": {**_MIXED, **_SOFT_CAPS},
    "xglm": {**_UNGROUPED, "ffn_dim": 96},
    "biogpt": _UNGROUPED,
    "gptj": {**_UNGROUPED, "rotary_dim": 8},
    "codegen": {**_UNGROUPED, "rotary_dim": 8},
    "mpt": _UNGROUPED,
    "gpt_bigcode": {**_UNGROUPED, "multi_query": True},
    "gpt_bigcode-heads": {**_UNGROUPED, "model_type": "gpt_bigcode", "multi_query": False, "n_head": 4},
    "gpt_neo": {
        **_UNGROUPED,
        "attention_types": [[["global", "local"], 2]],
        "num_hidden_layers": 4,
        "window_size": WINDOW,
    },
    "gpt_neox_japanese": _UNGROUPED,
    "modernbert-decoder": {**_MIXED, **_UNGROUPED},
    "mixtral": {**_EXPERTS, **_SLIDING},
    "qwen2_moe": {**_EXPERTS, "mlp_only_layers": [0], "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**_EXPERTS, "norm_topk_prob": True},
    "olmoe": _EXPERTS,
    "phimoe": _EXPERTS,
    "granitemoe": {**_EXPERTS, "attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "granitemoeshared": {**_EXPERTS, "shared_intermediate_size": 48},
    "granitemoe_swa": {**_EXPERTS, **_MIXED},
    "ernie4_5_moe": {**_EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "glm4_moe": _GROUPED_EXPERTS,
    "dots1": {**_GROUPED_EXPERTS, **_MIXED},
    "minimax_m2": _EXPERTS,
    "flex_olmo": _EXPERTS,
    "exaone_moe": {**_GROUPED_EXPERTS, **_MIXED, "is_moe_layer": [False, True, True]},
    "cohere2_moe": {**_EXPERTS, **_MIXED},
    "solar_open": _GROUPED_EXPERTS,
    # Chunks instead of windows, and queries that are scaled by their position.
    "llama4_text": {
        **_EXPERTS,
        **{"attention_chunk_size": WINDOW, "no_rope_layers": [1, 0, 1], "floor_scale": 4, "moe_layers": [1, 2]},
        **{"intermediate_size": 64, "intermediate_size_mlp": 96, "rope_parameters": _ROPE},
    },
    "minicpm3": {**_LATENT, "scale_emb": 2.0, "dim_model_base": 32},
    "deepseek_v2": {**_GROUPED_EXPERTS, **_LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_GROUPED_EXPERTS, **_LATENT},
    "glm4_moe_lite": {**_GROUPED_EXPERTS, **_LATENT},
    "axk1": {**_GROUPED_EXPERTS, **_LATENT},
    "sarvam_mla": {**_GROUPED_EXPERTS, **_LATENT},
    "mellum": {**_EXPERTS, **_MIXED},
    "qwen3_next": {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 48},
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 48},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**_EXPERTS, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "granitemoehybrid": {**_EXPERTS, **_ALTERNATING, **_MAMBA, "embedding_multiplier": 2.0},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128, "embedding_multiplier": 2.0, "ssm_in_multiplier": 0.5},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16, "chunk_size": 8},
    "nemotron_h": {
        **_EXPERTS,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe", "linear_attention"],
        "moe_shared_expert_intermediate_size": 48,
        **{"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 8},
    },
    "jamba": {**_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1},
    "gpt2": {**_UNGROUPED, "tie_word_embeddings": True},
    "dbrx": {
        **{"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": CONTEXT},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "ctrl": {**_UNGROUPED, "n_ctx": CONTEXT, "dff": 96},
    # Experts transposed, gate and up in turn, with biases; sinks.
    "gpt_oss": {**_EXPERTS, **_MIXED, "intermediate_size": 64},
    "apertus": {},
    "apertus1p5_text": {},
    "bitnet": {},
    "cohere_compass_text": {
        **_MIXED,
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _ROPE),
    },
    "exaone": {},
    "internlm3": {},
    "iquestcoder": {},
    "afmoe": {**_GROUPED_EXPERTS, **_MIXED, "num_dense_layers": 1, "n_group": 1, "num_shared_experts": 1},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "beam": {**_GROUPED_EXPERTS, **_MIXED, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "flint": {**_EXPERTS, **_MIXED, "shared_expert_intermediate_size": 64},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": [2, 2, 2]},
    "hy_v3": _GROUPED_EXPERTS,
    "kolibri1": {**_GROUPED_EXPERTS, **_MIXED},
    "laguna": {**_EXPERTS, **_MIXED, "shared_expert_intermediate_size": 64},
    "doge": {},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 16},
}
"""Configurations by name, on top of `_SIZES`; the name is the model_type where none is given."""

_IS_RECENT: Final = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
DRIVEN: Final = frozenset(
    name for name in FAMILIES.keys() & CONFIG_MAPPING if _IS_RECENT or not FAMILIES[name].needs_recent
)
"""Families of the table that the installed transformers knows in the form that is driven."""
TINY: Final = {name: fields for name, fields in _MODELS.items() if fields.get("model_type", name) in DRIVEN}
"""Those of these families: the oldest version lacks a few."""


SHORT_TEXT: Final = 16
"""Tokens beyond which the rotary frequencies of LENGTH_DEPENDENT models change."""
LENGTH_DEPENDENT: Final[dict[str, dict[str, Any]]] = {
    "phi3-longrope": {
        "model_type": "phi3",
        "original_max_position_embeddings": SHORT_TEXT,
        "rope_parameters": {
            **_ROPE,
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [1.5 + 0.5 * i for i in range(8)],
            "factor": CONTEXT / SHORT_TEXT,
            "original_max_position_embeddings": SHORT_TEXT,
        },
    },
    "llama-dynamic": {
        "model_type": "llama",
        "max_position_embeddings": SHORT_TEXT,
        "rope_parameters": {**_ROPE, "rope_type": "dynamic", "factor": 4.0},
    },
}
"""More configurations: what these make of a token depends on how long the text is when it is computed."""


STEPWISE: Final = ("nemotron_h",)
"""Models of which transformers makes something else token by token than of a whole text: they are compared token by
token, as they generate."""


def tiny_config(name: str) -> Any:
    """The configuration of tiny model `name`."""
    fields = {"model_type": name, **_SIZES, **(TINY | LENGTH_DEPENDENT)[name]}
    return AutoConfig.for_model(**{key: value for key, value in fields.items() if value is not None})
