"""Small checkpoints in the forms that Hugging Face folders come in, and what a store says of them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.store.make import load_unit
from tiered.quant import QuantizedWeight
from tiered.store import Store

TRAINED: Final = Path(__file__).parents[1] / "data" / "models" / "opt-docs-8m"

_SIZES: Final[Mapping[str, Any]] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "llama": {"num_key_value_heads": 2},
    "gpt_neox": {},
    "bloom": {"n_layer": 3, "n_head": 4},
    "falcon": {},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 3},
    "granitemoe": {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2},
}


def tiny_model(family: str, *, tied: bool | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model, the same each time."""
    torch.manual_seed(7)
    fields = {**_SIZES, **FAMILIES[family]}
    if tied is not None:
        fields["tie_word_embeddings"] = tied
    config = AutoConfig.for_model(family, **fields)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: constants would hide a mix-up
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def save_model(folder: Path, model: PreTrainedModel, shard: str = "5GB") -> Path:
    """A safetensors checkpoint, in shards of at most `shard`."""
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def save_bin(folder: Path, model: PreTrainedModel, *, zipped: bool = True, shards: int = 1) -> Path:
    """A torch checkpoint: `pytorch_model.bin`, or shards with an index."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = list(state)
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        torch.save({n: state[n] for n in part}, folder / file, _use_new_zipfile_serialization=zipped)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def rewrite(folder: Path, change: Any) -> None:
    """Replace the tensors of `folder`'s model.safetensors by what `change` makes of them."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in change(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def read_store(path: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Every weight of the store by its model name; quantized ones dequantized to float32, others as they are."""
    store = Store.open(path)
    weights: dict[str, torch.Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for unit in (unit for layout in store.layouts.values() for unit in layout.units):
        memory = load_unit(path, unit)
        for weight in unit.weights.values():
            plain = weight.view(memory)
            if isinstance(plain, QuantizedWeight):
                plain = plain.rows(0, plain.shape[0], torch.float32)
            name = weight.whole_name
            assert weight.whole is not None or name not in weights, name
            weights[name] = torch.cat([weights[name], plain]) if name in weights else plain
            shapes[name] = weight.whole or weight.shape
    return {n: (w if dtype is None else w.to(dtype)).view(shapes[n]) for n, w in weights.items()}


def store_digest(path: Path) -> dict[str, str]:
    """The content of every file in the store."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def expected_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a store without quantization must hold: the state dict, a tied head left out."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        head = model.get_output_embeddings()
        state = {n: t for n, t in state.items() if not (n.endswith(("lm_head.weight", "embed_out.weight")) and head)}
    return state
