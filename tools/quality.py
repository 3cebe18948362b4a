"""What quantization costs: perplexity of a checkpoint by scheme, of weights and of the KV cache, as Markdown tables.

    python tools/quality.py CHECKPOINT TEXT [--windows 64] [--length 512]

Converts the checkpoint to a temporary store per scheme and scores the same windows of TEXT with each, in float32, so
that the only difference is the weights. Squared error is that of the layers' linear weights, relative to their norm.
The KV cache is scored with unquantized weights; its 16 bits are the compute dtype, so here 32.
Documents in TEXT are separated by lines holding only <|doc|>. `tiered score` scores any text with one store.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open
from transformers import AutoTokenizer

from tiered.cache import Bits
from tiered.convert import ConvertOptions, convert_checkpoint
from tiered.generate.score import Window, score
from tiered.plan import Workload
from tiered.quant import GroupScheme, dequantize, quantize
from tiered.runtime import Options, Runtime
from tiered.store import Store

SCHEMES = {
    "none (bf16)": ConvertOptions(quant="none"),
    "int8, groups of 64": ConvertOptions(quant="int8"),
    "int4, groups of 64, min/max": ConvertOptions(quant="int4", clip="minmax"),
    "int4, groups of 64, clipped": ConvertOptions(quant="int4", clip="mse"),
}
CACHE_BITS: tuple[Bits, ...] = (16, 8, 4)
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
    if not windows:
        parser.error(f"{arguments.text}: has fewer than --length {arguments.length} tokens; lower it")
    print(f"{len(windows)} windows of {arguments.length} tokens of {arguments.text.name}\n")
    print_weights(arguments.checkpoint, windows)
    print()
    print_cache(arguments.checkpoint, windows)
    return 0


def print_weights(checkpoint: Path, windows: list[Window]) -> None:
    """The table of weight formats."""
    print("| weights | bits per weight | relative squared error | perplexity | change |\n|---|---|---|---|---|")
    base = None
    for name, options in SCHEMES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "store.tiered"
            convert_checkpoint(checkpoint, path, options)
            store = Store.open(path)
            layers = [store.layout(block) for block in store.tape if block.role == "layer"]
            bits = 8 * sum(layout.file.nbytes for layout in layers) / sum(layout.weight_count for layout in layers)
            found = perplexity(store, windows)
        base = base or found
        error = squared_error(checkpoint, options)
        print(f"| {name} | {bits:.2f} | {error:.3g} | {found:.3f} | {found / base - 1:+.2%} |", flush=True)


def print_cache(checkpoint: Path, windows: list[Window]) -> None:
    """The table of KV cache formats."""
    print("| KV cache | perplexity | change |\n|---|---|---|")
    base = None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.tiered"
        convert_checkpoint(checkpoint, path, ConvertOptions(quant="none"))
        for bits in CACHE_BITS:
            found = perplexity(Store.open(path), windows, bits)
            base = base or found
            print(f"| {bits} bits | {found:.3f} | {found / base - 1:+.2%} |", flush=True)


def read_windows(checkpoint: Path, text: Path, count: int, length: int) -> list[Window]:
    """At most `count` windows: documents one after the other, each behind the start token, cut every `length` tokens.

    Every token but a window's first is scored.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    documents = text.read_text().split("\n\n<|doc|>\n\n")
    ids: list[int] = []
    for document in documents:
        ids += [tokenizer.bos_token_id, *tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]]
    starts = range(0, min(count, len(ids) // length) * length, length)
    return [Window(ids[at : at + length - 1], ids[at + 1 : at + length], at + 1) for at in starts]


def perplexity(store: Store, windows: list[Window], bits: Bits = 16) -> float:
    """exp of the mean negative log-likelihood of every token but each window's first."""
    length = len(windows[0].input_ids)
    workload = Workload(BATCH, length, length, all_logits=True)
    with Runtime(store, workload, Options(dtype="float32", kv_bits=bits)) as runtime:
        return score(runtime, windows, BATCH, lambda *_: None).total.perplexity


def squared_error(checkpoint: Path, options: ConvertOptions) -> float:
    """Squared error of all two-dimensional layer weights together, relative to their squared norm."""
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
