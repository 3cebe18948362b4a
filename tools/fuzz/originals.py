"""The originals that cases damage: tiny random checkpoints of a few families and formats, and their stores."""

import contextlib
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoConfig, AutoModelForCausalLM

import tiered
from tiered.cli import cli
from tiered.configs_path import config_dir
from tiered.convert import ConvertOptions, ConvertProgress, convert_checkpoint
from tiered.convert.synthetic import BOS_ID, EOS_ID, PAD_ID, tokenizer_files
from tools.gguf_form import add_tokenizer, write_gguf
from tools.opt_forms import write_form

CONTEXT: Final = 256
_SIZES: Final[dict[str, Any]] = {
    **{"vocab_size": 272, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "max_position_embeddings": CONTEXT},
    **{"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID},
}
_GROUPED: Final = {"num_key_value_heads": 2, "head_dim": 16}
_MODELS: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "opt": ({"ffn_dim": 128, "word_embed_proj_dim": 64}, "none"),
    "llama": (_GROUPED, "int4"),
    "gemma2": ({**_GROUPED, "sliding_window": 8, "query_pre_attn_scalar": 16}, "int8"),
    "mixtral": ({**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, "none"),
    "gpt_neo": ({"attention_types": [[["global", "local"], 2]], "num_hidden_layers": 4, "window_size": 8}, "none"),
    "bloom": ({}, "int4"),
}
"""Model type -> its configuration besides `_SIZES`, and how its store is quantized."""
_FORMS: Final[dict[str, dict[str, Any]]] = {
    "raw": {"parts": 2, "shards": 2},
    "resharded": {"parts": 2, "legacy": True},
    "singleton": {},
    "numpy": {},
}
"""Forms of OPT, and how it is split in them."""
_TEMPLATE: Final = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class Originals:
    """Folders by model type."""

    checkpoints: tuple[Path, ...]
    stores: tuple[Path, ...]
    unfinished: Path
    """The first checkpoint's conversion, interrupted."""
    forms: tuple[Path, ...]
    """The OPT checkpoint in other forms than Hugging Face's."""
    gguf: Path
    """The Llama in GGUF."""
    job: Path
    """A folder with the input, the results and the job file of a finished batch over the first store."""


def find(folder: Path) -> Originals:
    """The originals that `make` has put into `folder`."""
    names = sorted(_MODELS)
    return Originals(
        tuple(folder / name for name in names),
        tuple(folder / f"{name}.tiered" for name in names),
        folder / "unfinished.tiered",
        tuple(folder / f"form-{name}" for name in _FORMS),
        folder / "gguf",
        folder / "job",
    )


def prepare() -> None:
    """Import what cases will need, without running any of it: threads would be lost in a fork."""
    package = Path(tiered.__file__).parent
    for path in package.rglob("*.py"):
        try:
            importlib.import_module(".".join(["tiered", *path.relative_to(package).with_suffix("").parts]))
        except ModuleNotFoundError as error:
            if error.name != "triton":  # for GPUs, and not always there
                raise
    for model_type in _MODELS:
        config = AutoConfig.for_model(model_type)
        AutoModelForCausalLM._model_mapping[type(config)]


def make(folder: Path) -> None:
    """Make all of them; in a process of its own, as this starts threads."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name, (fields, quant) in _MODELS.items():
        checkpoint = folder / name
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**_SIZES, **fields}))
        # Shards with an index for one, a pickle for another.
        model.save_pretrained(checkpoint, max_shard_size="100KB" if name == "llama" else "1GB")
        if name == "llama":
            (folder / "gguf").mkdir()
            write_gguf(
                folder / "gguf" / "llama.gguf",
                model,
                lambda _: Type.Q4_0,
                change=lambda writer: add_tokenizer(writer, 272),
            )
        if name == "opt":
            for form, split in _FORMS.items():
                write_form(form, folder / f"form-{form}", model.state_dict(), **split)
        if name == "gpt_neo":
            torch.save(model.state_dict(), checkpoint / "pytorch_model.bin")
            (checkpoint / "model.safetensors").unlink()
        for file, content in tokenizer_files(CONTEXT).items():
            (checkpoint / file).write_bytes(content)
        tokenizer = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
        tokenizer["chat_template"] = _TEMPLATE
        (checkpoint / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        compress = "planes" if name == "mixtral" else "none"
        convert_checkpoint(checkpoint, folder / f"{name}.tiered", ConvertOptions(quant=quant, compress=compress))
    _leave_behind(find(folder))


def _leave_behind(originals: Originals) -> None:
    """What an interrupted conversion and a finished job leave, and a shape for synthetic weights."""

    def interrupt(progress: ConvertProgress) -> None:
        if progress.block == "layer-001":
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        convert_checkpoint(originals.checkpoints[0], originals.unfinished, ConvertOptions(), interrupt)
    originals.job.mkdir()
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi", "max_tokens": 2}}
        for i in range(3)
    ]
    (originals.job / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    words = ["batch", originals.stores[0], "-i", originals.job / "in.jsonl", "-o", originals.job / "results.jsonl"]
    cli.main([*map(str, words), "--batch", "2", "--no-measure", "--threads", "1"], standalone_mode=False)
    shape = (config_dir() / "models" / "tiny-llama.toml").read_bytes()
    (originals.job.parent / "shape.toml").write_bytes(shape)
