"""One run of another system, by the Python of that system's environment; imports nothing of `tiered`.

    PYTHON tools/rival_driver.py hf|llama.cpp|airllm MODEL --batch B --prompt P --new N --seed S --vocab V --threads T
    PYTHON tools/rival_driver.py gguf CHECKPOINT FILE --type Q4_0

In: a model in the system's own form, and random prompts of equal length. Out: one line of JSON: the system's version,
seconds until the first tokens and from there to the last ones, bytes that the kernel counted as read meanwhile. `gguf`
writes a Hugging Face checkpoint of OPT or Llama for llama.cpp. Called by `tools/rivals.py`.

llama.cpp has no OPT. Its GPT-2 has the same shapes (layer norms with biases, learned positions, an MLP of two
matrices) and another activation function: OPT runs as that, which takes as long and says something else.
"""

import argparse
import importlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

_HEAD_BYTES: Final = 8
_MOST_SHOWN: Final = 120
"""Characters of an error."""
_GGUF_CHUNK: Final = 2048
"""Tokens that llama.cpp gets at once, at most: each time it reads all weights."""
_PROBE: Final = 1024
"""Rows and columns of the matrix by which the dtype is chosen that Hugging Face's modules compute in."""


@dataclass(frozen=True)
class Part:
    """A tensor of a GGUF file, from one tensor of the checkpoint or several, one after the other."""

    name: str
    sources: tuple[str, ...]
    first_row: int = 0
    """Rows of the source before it are left out."""
    heads: int = 0
    """If not 0, rows are reordered as llama.cpp's rotary embedding wants them, for so many heads."""


def opt_parts(config: Mapping[str, Any]) -> list[Part]:
    """The tensors of an OPT model as a GPT-2 of llama.cpp; raises ValueError for those of other shapes."""
    if config.get("word_embed_proj_dim", config["hidden_size"]) != config["hidden_size"] or not config.get(
        "do_layer_norm_before", True
    ):
        raise ValueError("expected an OPT whose norms come first and whose embeddings are as wide as its layers")
    base = "model.decoder."
    parts = [
        Part("token_embd.weight", (f"{base}embed_tokens.weight",)),
        # OPT's table begins with two rows that no text uses.
        Part("position_embd.weight", (f"{base}embed_positions.weight",), first_row=2),
    ]
    for end in ("weight", "bias"):
        parts.append(Part(f"output_norm.{end}", (f"{base}final_layer_norm.{end}",)))
    for layer in range(config["num_hidden_layers"]):
        own, here = f"{base}layers.{layer}.", f"blk.{layer}."
        for end in ("weight", "bias"):
            parts += [
                Part(f"{here}attn_norm.{end}", (f"{own}self_attn_layer_norm.{end}",)),
                Part(f"{here}attn_qkv.{end}", tuple(f"{own}self_attn.{name}_proj.{end}" for name in "qkv")),
                Part(f"{here}attn_output.{end}", (f"{own}self_attn.out_proj.{end}",)),
                Part(f"{here}ffn_norm.{end}", (f"{own}final_layer_norm.{end}",)),
                Part(f"{here}ffn_up.{end}", (f"{own}fc1.{end}",)),
                Part(f"{here}ffn_down.{end}", (f"{own}fc2.{end}",)),
            ]
    return parts


def llama_parts(config: Mapping[str, Any]) -> list[Part]:
    """The tensors of a Llama."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    parts = [
        Part("token_embd.weight", ("model.embed_tokens.weight",)),
        Part("output_norm.weight", ("model.norm.weight",)),
    ]
    if not config.get("tie_word_embeddings", False):
        parts.append(Part("output.weight", ("lm_head.weight",)))
    for layer in range(config["num_hidden_layers"]):
        own, here = f"model.layers.{layer}.", f"blk.{layer}."
        parts += [
            Part(f"{here}attn_norm.weight", (f"{own}input_layernorm.weight",)),
            Part(f"{here}attn_q.weight", (f"{own}self_attn.q_proj.weight",), heads=heads),
            Part(f"{here}attn_k.weight", (f"{own}self_attn.k_proj.weight",), heads=kv_heads),
            Part(f"{here}attn_v.weight", (f"{own}self_attn.v_proj.weight",)),
            Part(f"{here}attn_output.weight", (f"{own}self_attn.o_proj.weight",)),
            Part(f"{here}ffn_norm.weight", (f"{own}post_attention_layernorm.weight",)),
            *(Part(f"{here}ffn_{name}.weight", (f"{own}mlp.{name}_proj.weight",)) for name in ("gate", "up", "down")),
        ]
    return parts


class Tensors:
    """The tensors of the safetensors files in a folder, as 32-bit numbers."""

    def __init__(self, folder: Path) -> None:
        self._entries: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(_HEAD_BYTES), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            self._entries |= {name: (path, _HEAD_BYTES + length, entry) for name, entry in header.items()}

    def shape(self, name: str) -> list[int]:
        found: list[int] = self._entries[name][2]["shape"]
        return found

    def read(self, name: str) -> Any:
        """A numpy array; raises KeyError for an unknown name or dtype."""
        import numpy as np

        path, start, entry = self._entries[name]
        begin, end = entry["data_offsets"]
        kind: Any = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[entry["dtype"]]
        count = (end - begin) // np.dtype(kind).itemsize
        raw = np.fromfile(path, kind, count, offset=start + begin)
        if entry["dtype"] == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32, copy=False).reshape(entry["shape"])


def write_gguf(checkpoint: Path, path: Path, kind: str) -> None:
    """Write `checkpoint` as GGUF with its matrices in `kind`; one tensor is in memory at a time."""
    import numpy as np

    gguf = importlib.import_module("gguf")

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    family = config["model_type"]
    parts = {"opt": opt_parts, "llama": llama_parts, "mistral": llama_parts}[family](config)
    tensors, wanted = Tensors(checkpoint), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "gpt2" if family == "opt" else "llama")
    _describe(writer, config)
    types = []
    for part in parts:
        shape = [sum(tensors.shape(name)[0] for name in part.sources) - part.first_row]
        shape += tensors.shape(part.sources[0])[1:]
        # Positions and norms are small; llama.cpp adds them, which it does not do with quantized numbers.
        packs = len(shape) == 2 and shape[1] % 32 == 0 and not part.name.startswith("position")
        if packs:
            nbytes = gguf.quant_shape_to_byte_shape(shape, wanted)
            writer.add_tensor_info(part.name, nbytes, np.dtype(np.uint8), int(np.prod(nbytes)), wanted)
        else:
            writer.add_tensor_info(part.name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
        types.append(wanted if packs else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part, packed in zip(parts, types, strict=True):
        value = np.concatenate([tensors.read(name) for name in part.sources])[part.first_row :]
        if part.heads:
            halves = value.reshape(part.heads, 2, value.shape[0] // part.heads // 2, value.shape[1])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        value = np.ascontiguousarray(value)
        writer.write_tensor_data(value if packed is None else gguf.quants.quantize(value, packed))
    writer.close()


def _describe(writer: Any, config: Mapping[str, Any]) -> None:
    """What llama.cpp wants to know besides tensors; prompts are numbers, so there is no vocabulary."""
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config.get("ffn_dim") or config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    if config["model_type"] == "opt":
        writer.add_layer_norm_eps(1e-5)
        return
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta", 10000.0))


def prompts(batch: int, tokens: int, vocab: int, seed: int) -> list[list[int]]:
    """Random tokens; the first few of a vocabulary, which end texts and the like, are left out."""
    chance = random.Random(seed)
    return [[chance.randrange(min(16, vocab - 1), vocab) for _ in range(tokens)] for _ in range(batch)]


def quickest_dtype(options: argparse.Namespace) -> Any:
    """The dtype in which torch multiplies a row of each sequence quickest here, with the threads that are asked for:
    many processors only emulate bfloat16."""
    import torch

    torch.set_num_threads(options.threads)

    def seconds(dtype: Any) -> float:
        weight, some = (torch.ones(count, _PROBE, dtype=dtype) for count in (_PROBE, options.batch))
        times = []
        for _ in range(4):
            began = time.perf_counter()
            torch.nn.functional.linear(some, weight)
            times.append(time.perf_counter() - began)
        return min(times)

    return min((torch.bfloat16, torch.float32), key=seconds)


def hugging_face(options: argparse.Namespace) -> Iterator[float]:
    """accelerate's offload to disk: weights are read from the checkpoint's files, layer by layer, in each pass."""
    from transformers import AutoModelForCausalLM

    options.dtype = quickest_dtype(options)
    limits: dict[str, Any] = {"device_map": {"": "disk"}} if not options.kept else {"device_map": "auto"}
    if options.kept:
        limits["max_memory"] = {"cpu": options.kept}
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=options.dtype, offload_folder=str(options.scratch), **limits
    )
    yield from _generate(model, options)


def airllm(options: argparse.Namespace) -> Iterator[float]:
    """AirLLM cuts the checkpoint into files of a layer, once, and loads them one after the other."""
    options.dtype = quickest_dtype(options)
    model = importlib.import_module("airllm").AutoModel.from_pretrained(
        str(options.model),
        device="cpu",
        dtype=options.dtype,
        layer_shards_saving_path=str(options.scratch),
    )
    yield from _generate(model, options)


def _generate(model: Any, options: argparse.Namespace) -> Iterator[float]:
    """When a pass has given its logits, for each pass; first of all when the first begins."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    times: list[float] = []

    class Clock(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            times.append(time.perf_counter())
            return scores

    ids = torch.tensor(prompts(options.batch, options.prompt, options.vocab, options.seed))
    yield time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.new,
            min_new_tokens=options.new,
            do_sample=False,
            use_cache=True,
            logits_processor=LogitsProcessorList([Clock()]),
        )
    yield from times


def llama_cpp(options: argparse.Namespace) -> Iterator[float]:
    """llama.cpp by its C interface, which takes many sequences at once; its pages come and go by mmap. Loading reads
    them, which counts: others read theirs in their first pass."""
    import numpy as np

    library = importlib.import_module("llama_cpp")
    library.llama_backend_init()
    about_model = library.llama_model_default_params()
    about_model.n_gpu_layers = 0
    if hasattr(about_model, "use_extra_bufts"):
        about_model.use_extra_bufts = False  # weights in another order would all be copied to memory
    yield time.perf_counter()
    model = library.llama_model_load_from_file(str(options.model).encode(), about_model)
    about = library.llama_context_default_params()
    # One cache for all sequences: llama.cpp rounds up the tokens of each cache to 256, which is memory for weights.
    about.kv_unified, about.n_seq_max = True, options.batch
    about.n_ctx = (options.prompt + options.new) * options.batch
    about.n_batch = about.n_ubatch = min(_GGUF_CHUNK, options.prompt * options.batch)
    about.n_threads = about.n_threads_batch = options.threads
    context = library.llama_init_from_model(model, about) if model else None
    if not context:
        raise SystemExit(f"{options.model}: llama.cpp does not load it")
    batch = library.llama_batch_init(_GGUF_CHUNK, 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """The likeliest token after each row that wants logits, by sequence; rows are token, position, sequence."""
        batch.n_tokens = len(rows)
        for at, (token, position, sequence, wants) in enumerate(rows):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
            batch.seq_id[at][0], batch.logits[at] = sequence, wants
        if library.llama_decode(context, batch):
            raise SystemExit("llama.cpp: a pass has failed")
        found = {}
        for at, (_, _, sequence, wants) in enumerate(rows):
            if wants:
                logits = library.llama_get_logits_ith(context, at)
                found[sequence] = int(np.ctypeslib.as_array(logits, (options.vocab,)).argmax())
        return found

    rows = [
        (token, position, sequence, position == options.prompt - 1)
        for sequence, prompt in enumerate(prompts(options.batch, options.prompt, options.vocab, options.seed))
        for position, token in enumerate(prompt)
    ]
    newest: dict[int, int] = {}
    for start in range(0, len(rows), _GGUF_CHUNK):
        newest |= decode(rows[start : start + _GGUF_CHUNK])
    yield time.perf_counter()
    for position in range(options.prompt, options.prompt + options.new - 1):
        newest = decode([(token, position, sequence, True) for sequence, token in newest.items()])
        yield time.perf_counter()


_SYSTEMS: Final[dict[str, tuple[str, Callable[[argparse.Namespace], Iterator[float]]]]] = {
    "hf": ("accelerate", hugging_face),
    "llama.cpp": ("llama-cpp-python", llama_cpp),
    "airllm": ("airllm", airllm),
}


def measured(times: Iterator[float]) -> dict[str, float]:
    """Seconds of the first pass and of all others, and their bytes, of a run that says when each ends."""
    ends, read = [], []
    for end in times:
        ends.append(end)
        read.append(_bytes_read())
    return {
        **{"prefill_seconds": ends[1] - ends[0], "decode_seconds": ends[-1] - ends[1], "passes": len(ends) - 1},
        **{"bytes_read": read[-1] - read[0]},
    }


def _bytes_read() -> int:
    """Bytes that this process had read from disk, page faults among them, by the kernel's count."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def main() -> int:
    parser = argparse.ArgumentParser(description="One run of another system.")
    parser.add_argument("system", choices=[*_SYSTEMS, "gguf"])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--type", default="Q4_0")
    for name in ("batch", "prompt", "new", "seed", "vocab", "threads"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="a folder that the system may write to")
    parser.add_argument("--kept", help="bytes of weights that stay in memory, as accelerate spells them")
    options = parser.parse_args()
    if options.system == "gguf":
        write_gguf(options.model, options.output, options.type)
        return 0
    package, run = _SYSTEMS[options.system]
    try:
        found = measured(run(options))
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        # Of the operating system, such as a full disk; safetensors tells of that in words.
        may_pass = getattr(error, "errno", None) is not None or "(os error " in str(error)
        print(json.dumps({"error": first[:_MOST_SHOWN], "may_pass": may_pass}), flush=True)
        raise
    computed_in = f", {options.dtype}".replace("torch.", "") if "dtype" in options else ""
    print(json.dumps({"version": version(package) + computed_in, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
