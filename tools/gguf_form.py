"""Models of transformers written as GGUF files with the package gguf, as llama.cpp's converter writes them.

In: a model in memory, and the type of each weight. Out: a file, and what gguf reads back of it. For tests and the fuzz
program: a tiny model takes a moment, and nothing is streamed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from transformers import PreTrainedModel

Bytes = NDArray[np.uint8]
TypeOf = Callable[[str], Type]
"""The type that a file has a tensor of the model in, by its name in the model."""

ARCHITECTURES: Final = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
"""What llama.cpp calls each model type."""
_SCALES: Final = {Type.Q4_K: (0, 2), Type.Q6_K: (208,), Type.IQ4_XS: (0,), Type.IQ4_NL: (0,)}
"""Types that gguf cannot quantize to: where in a block it has its scales, in 16 bits."""


@dataclass
class Written:
    """What a file holds."""

    path: Path
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    """Each tensor of the model, by its name there: what gguf reads back, in float32."""
    types: dict[str, Type] = field(default_factory=dict)


def plain(_: str) -> Type:
    return Type.F32


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    type_of: TypeOf = plain,
    *,
    change: Callable[[gguf.GGUFWriter], None] = lambda _: None,
    parts: int = 0,
) -> Written:
    """Write `model` to `path`, vectors in float32; `change` adds to the file. With `parts`, that many tensors go into
    each of several files."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=parts)
    _add_metadata(writer, config)
    names = gguf.get_tensor_name_map(_number_of(architecture), config.num_hidden_layers)
    written = Written(path)
    generator = np.random.default_rng(3)
    for name, tensor in _split_stacks(model).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        kind = type_of(name) if tensor.ndim > 1 else Type.F32
        added = np.float32(architecture.startswith("gemma") and name.endswith("norm.weight"))
        raw = _encoded(tensor.numpy() + added, kind, generator)
        written.values[name] = torch.from_numpy(gguf.dequantize(raw, kind).reshape(tensor.shape) - added)
        written.types[name] = kind
        base, _, leaf = name.rpartition(".")
        own = _expert_name(name) or f"{names.get_name(base)}.{leaf}"
        writer.add_tensor(own, _arranged(raw, name, config), raw_dtype=kind)
    change(writer)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def add_tokenizer(writer: gguf.GGUFWriter, count: int = 160) -> None:
    """A sentencepiece vocabulary of `count` tokens: some words, and bytes."""
    words = ["▁", "▁the", "the", "th", "he", "▁t", *"abcdefghijklmnopqrstuvwxyz", "<|end|>"]
    tokens = ["<unk>", "<s>", "</s>", *words]
    tokens += [f"<0x{byte:02X}>" for byte in range(count - len(tokens))]
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    kinds[:3] = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds[tokens.index("<|end|>")] = gguf.TokenType.CONTROL
    kinds[3 + len(words) :] = [gguf.TokenType.BYTE] * (count - 3 - len(words))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(number) for number in range(count)])
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_eot_token_id(tokens.index("<|end|>"))
    writer.add_chat_template("{% for message in messages %}{{ message.content }}<|end|>{% endfor %}")


def add_merges(writer: gguf.GGUFWriter, split: str) -> None:
    """GPT-2's kind of vocabulary, of which one word is a token that no merges build."""
    tokens = ["<|pad|>", "<|begin|>", "<|end|>", *"abcdefghijklmnopqrstuvwxyz", "ab", "whole"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])


def _add_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    architecture = ARCHITECTURES[config.model_type]
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture not in ("qwen2", "qwen2moe", "phi3"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name in ("long", "short"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32))
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_divisors(rope, head_dim))
    if getattr(config, "sliding_window", None) and architecture in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma3":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if experts and architecture != "llama":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if architecture == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(2)


def _llama3_divisors(rope: Mapping[str, Any], head_dim: int) -> NDArray[np.float32]:
    """As llama.cpp's converter computes them: a divisor for each frequency."""
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    frequencies = 1.0 / (rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim))
    divisors = []
    for length in 2 * np.pi / frequencies:
        smooth = (rope["original_max_position_embeddings"] / length - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        divisors.append(1.0 if length < high else rope["factor"] if length > low else between)
    return np.array(divisors, np.float32)


def _split_stacks(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's tensors; of stacks of experts gate and up apart."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("gate_up_proj"):
            gate, up = tensor.chunk(2, 1)
            found[name.replace("gate_up", "gate")], found[name.replace("gate_up", "up")] = gate, up
        else:
            found[name] = tensor
    return {name: tensor.detach().float().contiguous() for name, tensor in found.items()}


def _expert_name(name: str) -> str | None:
    if ".experts." not in name:
        return None
    layer, matrix = name.split(".")[2], name.rpartition(".")[2].removesuffix("_proj")
    return f"blk.{layer}.ffn_{matrix}_exps.weight"


def _encoded(values: NDArray[np.float32], kind: Type, generator: np.random.Generator) -> Bytes:
    """`values` in a file's type; of one that gguf cannot make, random bytes with sane scales."""
    if kind not in _SCALES:
        return gguf.quantize(values, kind)
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (values.size // size, nbytes), np.uint8)
    for offset in _SCALES[kind]:
        scales = generator.normal(0, 1e-3, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*values.shape[:-1], -1)


def _arranged(raw: Bytes, name: str, config: Any) -> Bytes:
    """Rows as llama.cpp has them: it interleaves the halves of each head of Llama's queries and keys."""
    part = name.split(".")[-2]
    if ARCHITECTURES[config.model_type] == "llama" and part in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
        shape = (heads, 2, raw.shape[0] // heads // 2, *raw.shape[1:])
        raw = np.ascontiguousarray(raw.reshape(shape).swapaxes(1, 2).reshape(raw.shape))
    if part == "shared_expert_gate":
        raw = raw.reshape(-1)
    return raw


def _number_of(architecture: str) -> gguf.MODEL_ARCH:
    return next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
