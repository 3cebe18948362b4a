"""Trains a small mixture of experts on the documentation that this machine has, as a checkpoint with routers that mean
something.

    python tools/train_mixture.py OUT [--seconds 1800] [--threads 2] [--roots FOLDER ...]

Random routers choose experts evenly and without memory: on them no cache of experts gains anything, and nothing can be
learnt about one. OUT is a Hugging Face folder of the family qwen3_moe: 32 experts a layer of which 4 compute, with the
tokenizer of tests/data/models/opt-docs-8m. The text is prose: documents and docstrings below the roots (by default the
Python that runs this, with its packages).
"""

import argparse
import ast
import json
import math
import random
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ROOT: Final = Path(__file__).parent.parent
TOKENIZER: Final = ROOT / "tests/data/models/opt-docs-8m"
_LENGTH: Final = 512
"""Tokens of a training sequence."""
_BATCH: Final = 4
_RATE: Final = 2e-3
_MOST_FILE_NBYTES: Final = 1 << 20


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--most", type=int, default=8_000_000, help="tokens of text that are read")
    parser.add_argument(
        "--roots", type=Path, nargs="*", default=[Path(sysconfig.get_path(n)) for n in ("stdlib", "purelib")]
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    data = torch.tensor(read_tokens(arguments.roots, tokenizer, arguments.most), dtype=torch.int32)
    model = make_model(tokenizer.get_vocab_size())
    print(f"{len(data):,} tokens, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(model, data, arguments.seconds)
    model.config.output_router_logits = False  # it was for the loss
    model.bfloat16().save_pretrained(arguments.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, arguments.out / name)
    generation = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    (arguments.out / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")
    return 0


def make_model(vocab: int) -> PreTrainedModel:
    """The untrained mixture."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,  # a multiple of the usual group that codes are quantized in
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    config._experts_implementation = "grouped_mm"
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def train(model: PreTrainedModel, data: torch.Tensor, seconds: float) -> None:
    """AdamW with a cosine schedule over the time there is."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    began, step, average = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - began) / seconds) < 1:
        rate = _RATE * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done)) + 2e-5
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(0, len(data) - _LENGTH - 1, (_BATCH,))
        ids = torch.stack([data[start : start + _LENGTH] for start in starts]).long()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        step += 1
        if step % 50 == 0:
            print(f"{step}: loss {average:.3f}, {time.monotonic() - began:.0f} s", flush=True)


def read_tokens(roots: list[Path], tokenizer: Tokenizer, most: int) -> list[int]:
    """Tokens of the texts below `roots`, in a random order of files; each text begins with the tokenizer's </s>."""
    files = sorted(path for root in roots for path in root.rglob("*") if path.suffix in (".md", ".rst", ".txt", ".py"))
    random.Random(0).shuffle(files)
    ids: list[int] = []
    for path in files:
        for text in texts_of(path):
            ids += [2, *tokenizer.encode(text, add_special_tokens=False).ids]
        if len(ids) >= most:
            break
    return ids[:most]


def texts_of(path: Path) -> Iterator[str]:
    """The prose of a file: all of it, or a module's docstrings."""
    try:
        if path.stat().st_size > _MOST_FILE_NBYTES:
            return
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".py":
            yield text
            return
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
        yield "\n\n".join(docstring for docstring in found if docstring)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return


if __name__ == "__main__":
    sys.exit(main())
