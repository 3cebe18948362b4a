"""What quantization costs: perplexity of a checkpoint by scheme, over a text, as a Markdown table.

    python tools/quality.py CHECKPOINT TEXT [--windows 64] [--length 512]

Converts the checkpoint to a temporary store per scheme and scores the same windows of TEXT with each, in float32, so
that the only difference is the weights. Squared error is that of the layers' linear weights, relative to their norm.
Documents in TEXT are separated by lines holding only <|doc|>.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from tiered.cache import KVCache
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.model import Load, MicroBatch
from tiered.quant import GroupScheme, dequantize, quantize
from tiered.runtime import Options, Runtime
from tiered.store import Store

SCHEMES = {
    "none (bf16)": ConvertOptions(quant="none"),
    "int8, groups of 64": ConvertOptions(quant="int8"),
    "int4, groups of 64, min/max": ConvertOptions(quant="int4", clip="minmax"),
    "int4, groups of 64, clipped": ConvertOptions(quant="int4", clip="mse"),
}
BATCH = 16
"""Windows per pass."""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    arguments = parser.parse_args()
    windows = read_windows(arguments.checkpoint, arguments.text, arguments.windows, arguments.length)
    print(f"{windows.shape[0]} windows of {windows.shape[1]} tokens of {arguments.text.name}\n")
    print("| weights | bits per weight | relative squared error | perplexity | change |\n|---|---|---|---|---|")
    base = None
    for name, options in SCHEMES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "store.tiered"
            convert_checkpoint(arguments.checkpoint, path, options)
            store = Store.open(path)
            layers = [store.layout(block) for block in store.tape if block.role == "layer"]
            bits = 8 * sum(layout.file.nbytes for layout in layers) / sum(layout.weight_count for layout in layers)
            found = perplexity(store, windows)
        base = base or found
        error = squared_error(arguments.checkpoint, options)
        print(f"| {name} | {bits:.2f} | {error:.3g} | {found:.3f} | {found / base - 1:+.2%} |", flush=True)
    return 0


def read_windows(checkpoint: Path, text: Path, count: int, length: int) -> torch.Tensor:
    """[count, length] token ids: documents one after the other, each behind the start token."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    documents = text.read_text().split("\n\n<|doc|>\n\n")
    ids: list[int] = []
    for document in documents:
        ids += [tokenizer.bos_token_id, *tokenizer(document, add_special_tokens=False)["input_ids"]]
    count = min(count, len(ids) // length)
    return torch.tensor(ids[: count * length]).view(count, length)


def perplexity(store: Store, windows: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of every token but each window's first."""
    count, length = windows.shape
    total = 0.0
    with Runtime(store, Load(BATCH, length), Options(dtype="float32")) as runtime:
        for start in range(0, count, BATCH):
            part = windows[start : start + BATCH]
            with runtime.new_cache(len(part), length) as cache:
                total += negative_log_likelihood(runtime, part, cache)
    return math.exp(total / (count * (length - 1)))


def negative_log_likelihood(runtime: Runtime, ids: torch.Tensor, cache: KVCache) -> float:
    """Summed over ids [rows, length]."""
    (logits,) = runtime.forward([MicroBatch(ids, cache, logits_to_keep=0)]).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return float(losses)


def squared_error(checkpoint: Path, options: ConvertOptions) -> float:
    """Of all two-dimensional layer weights together, relative to their squared norm."""
    if options.quant == "none":
        return 0.0
    scheme = GroupScheme(4 if options.quant == "int4" else 8, options.group_size)
    error = norm = 0.0
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                weight = file.get_tensor(name).float()
                if ".layers." in name and weight.ndim == 2:
                    codes = quantize(weight, scheme, clip=options.clip)
                    error += float((dequantize(*codes, scheme) - weight).square().sum())
                    norm += float(weight.square().sum())
    return error / norm


if __name__ == "__main__":
    sys.exit(main())
