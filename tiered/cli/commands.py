"""What can be typed: every command of `tiered` with its options. What a command does is in the module of its name.

That module is imported when the command runs, as it loads torch, which takes seconds; this one imports nothing but
click, so that --help and a mistyped option are answered at once. It is long because it is one list, in the order of
`tiered --help`; what commands share is in `shared_options.py`.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tiered.cli.shared_options import (
    ANY_PATH,
    DEVICE,
    FILE,
    KERNEL_MODES,
    KERNELS,
    KV,
    KV_BITS,
    KV_PLACE,
    MEASURE,
    MICRO_BATCH,
    POSITIVE,
    STORE,
    TakesLists,
    batch_size,
    id_files,
    json_output,
    kv_bits,
    listed,
    objective,
    run_options,
    size_text,
    stated,
    texts,
)
from tiered.process import importing


class _InThisOrder(click.Group):
    """A group that lists its commands as they stand here."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InThisOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tiered", message="tiered %(version)s")
def cli() -> None:
    """Run language models that do not fit in memory, at the speed of the disk.

    \b
    tiered convert facebook/opt-6.7b        once: download, quantize, write opt-6.7b.tiered
    tiered generate opt-6.7b.tiered -p Hi   as often as you like, in as little as a few GiB
    """


# The commands, in the order of `tiered --help`.


@cli.command(short_help="Convert a checkpoint into a store of quantized blocks.")
@click.argument("source")
@click.option("-o", "--output", type=ANY_PATH, help="The store to write. [default: ./NAME.tiered]")
@click.option(
    "--quant",
    type=click.Choice(["keep", "int4", "int8", "none", "mxfp4-g32", "nf4-g64", "iq4nl-g32"]),
    help="Of the layers' weights. keep: what is quantized already as it is, or in 8 bits if no scheme holds it. The "
    "last three are looked up in 16 values.  [default: keep where weights are quantized already, else int4]",
)
@click.option("--group-size", default="64", show_default=True, type=click.Choice(["32", "64", "128"]))
@click.option(
    "--compress",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "planes", "none"]),
    help="planes: code the exponents of 16-bit weights; auto: only where this disk is slow enough for it to pay.",
)
@click.option("--ram", help="Refuse to take more than this, such as 2GiB.")
@click.option("--force", is_flag=True, help="Replace the store or unfinished conversion that is in the way.")
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@click.option("--delete-downloads", is_flag=True, help="Remove each file that this downloads once it is converted.")
@click.option("--from", "weights", type=ANY_PATH, help="The weights of the model that SOURCE names, in whatever form.")
@click.option("--md5", type=ANY_PATH, help="Test the weight files first, by a list that md5sum wrote.")
@click.option("--synthetic", is_flag=True, help="Random weights of a known shape (or a toml file), for benchmarks.")
@click.option("--distinct-blocks", type=POSITIVE, metavar="N", help="Synthetic: store only N layers.")
@click.option("--seed", default=0, show_default=True, help="Of synthetic weights.")
@click.option("--tokenizer", type=ANY_PATH, help="A folder or tokenizer.json to take instead of SOURCE's tokenizer.")
def convert(source: str, output: Path | None, **options: Any) -> None:
    """Convert SOURCE into a store that 'tiered generate' runs.

    SOURCE is a Hugging Face folder, a hub id such as facebook/opt-6.7b, a known name such as opt-125m, or a .gguf file.
    OPT may be in metaseq's files (a folder, or one of its *.pt) or in FlexGen's too: 'tiered convert opt-175b --from
    PATH'. An interrupted conversion is resumed by the same command.

    A SOURCE that is a store of an earlier format version is upgraded in place; its weights stay the same. With
    --tokenizer a store of any version gets another tokenizer, or its first.
    """
    if sys.stderr.isatty():
        # Downloads may take hours: let the hub library, imported below, show its own bars, which `main` switches off.
        os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    with importing(is_command=True):
        from tiered.cli.convert import run

    run(source, output, **options)


@cli.command(short_help="Generate text from a store, in less memory than it takes.")
@STORE
@click.option("-p", "--prompt", "prompts", multiple=True, help="A prompt; repeat for a batch.")
@texts("A file that is one prompt")
@click.option("--prompt-ids", multiple=True, metavar="IDS", help="A prompt as token ids: 2,100,524; like -p.")
@id_files("A file that is one prompt")
@click.option("-n", "--max-new-tokens", default=128, show_default=True, type=POSITIVE, help="Tokens to generate.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="Sample from the k likeliest tokens; 0: all.")
@click.option("--top-p", default=1.0, show_default=True, help="Sample from the likeliest tokens of this total mass.")
@click.option("--min-p", default=0.0, show_default=True, help="Drop tokens below this share of the likeliest.")
@click.option("--repetition-penalty", default=1.0, show_default=True, help="Above 1 discourages repetition.")
@click.option("--seed", default=0, show_default=True, help="For sampling.")
@click.option("--stop", "stops", multiple=True, help="End at this text; repeatable.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the end-of-text token.")
@click.option("--prompt-tokens", type=POSITIVE, help="Random prompts of exactly N tokens, for measuring.")
@click.option("--sequences", default=1, show_default=True, type=POSITIVE, help="So many --prompt-tokens prompts.")
@click.option("--batch", type=POSITIVE, help="Prompts that run at once. [default: as time and memory allow]")
@MICRO_BATCH
@objective("latency")
@KV_PLACE
@kv_bits((*KV_BITS, "auto"), "; auto: as many bits as cost at most 10 % in bytes read")
@click.option("--chat", is_flag=True, help="Apply the tokenizer's chat template to each prompt.")
@run_options("a text does not depend on what shares its batch")
@click.option("--prefetch", type=click.IntRange(min=0), help="Units read ahead; 0: none. [default: as memory allows]")
@MEASURE
@json_output()
@click.option("--trace", "trace_path", type=FILE, help="Write a Perfetto trace.")
def generate(
    prompts: Sequence[str],
    files: Sequence[Path],
    prompt_ids: Sequence[str],
    id_files: Sequence[Path],
    **options: Any,
) -> None:
    """Generate text from STORE, the folder that 'tiered convert' wrote.

    Prompts come from -p, -f, or standard input; or as token ids, which are taken as they are: nothing is put in front
    of them. The text goes to standard output, everything else to standard error. A store without a tokenizer takes
    token ids only, and gives them instead of a text. One of several prompts that cannot be continued does not keep
    the others from it; the exit code is 1 then.
    """
    from tiered.cli.texts import read_prompts

    texts = read_prompts(prompts, files, prompt_ids, id_files, options["prompt_tokens"], options["sequences"])
    with importing(is_command=True):
        from tiered.cli.generate import GenerateRequest, run

    run(GenerateRequest(**options, prompts=texts, stated=stated()))


@cli.command(short_help="Answer a file of requests; killed and started again at will.")
@STORE
@click.option("-i", "--input", "input_path", required=True, type=FILE, help="Requests, one JSON object per line.")
@click.option("-o", "--output", "output_path", required=True, type=FILE, help="Where results are appended.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, (1 << 64) - 1), help="For sampling.")
@click.option(
    "--max-tokens", default=128, show_default=True, type=POSITIVE, help="Tokens to generate where a line says nothing."
)
@click.option("--context", type=POSITIVE, help="Tokens of the longest sequence. [default: as the input needs]")
@click.option("--batch", type=POSITIVE, help="Sequences that share a pass. [default: as time and memory allow]")
@MICRO_BATCH
@objective("throughput")
@KV_PLACE
@kv_bits()
@run_options("a text does not depend on what shares its batch")
@MEASURE
@json_output("with the report")
def batch(**options: Any) -> None:
    """Answer all requests of a file with STORE, the folder that 'tiered convert' wrote.

    Lines are requests in OpenAI's batch format, for /v1/completions or /v1/chat/completions. Results are appended in
    its result format as they are finished, in any order. The same command again goes on where an interrupted one has
    stopped: what is done is kept, and the results are those of a run in one go. OUTPUT.job tells which job a result
    file belongs to.
    """
    with importing(is_command=True):
        from tiered.cli.batch import BatchRequest, run

    run(BatchRequest(**options, stated=stated()))


@cli.command(short_help="Score texts: perplexity and a log-probability per token.")
@STORE
@texts("A text")
@id_files("A text")
@click.option("--context", type=POSITIVE, help="Tokens in a window. [default: 2048, or what the model has]")
@click.option(
    "--stride",
    type=POSITIVE,
    help="Tokens of a window that are scored anew; the others are context. [default: all: windows do not overlap]",
)
@click.option(
    "--batch",
    "--windows-per-pass",
    "windows_per_pass",
    type=POSITIVE,
    help="Windows that share a pass. [default: as time and memory allow]",
)
@click.option(
    "--per-token",
    "per_token_path",
    type=FILE,
    help="Write a JSON line per token: file, position, token_id, text, logprob.",
)
@kv_bits()
@run_options("a score does not depend on what shares its pass")
@MEASURE
@json_output()
def score(files: Sequence[Path], id_files: Sequence[Path], **options: Any) -> None:
    """Score texts with STORE: perplexity, nats per token, bits per byte.

    Texts come from -f or standard input, each scored on its own. A text is cut into windows of --context tokens, and
    each of its tokens is scored once, by what comes before it in its window. Every window begins with the token that
    the model's tokenizer puts in front of texts; where there is none, a text's first token has nothing before it and
    is not counted. Token ids are to begin with that token themselves; a store without a tokenizer takes nothing else.
    Bits per byte lets models with different tokenizers be compared; token ids have none. The table goes to standard
    output, everything else to standard error. One of several texts that cannot be scored is named, and the others are
    scored; the exit code is 1 then.
    """
    from tiered.cli.texts import read_texts

    texts = read_texts(files, id_files)
    with importing(is_command=True):
        from tiered.cli.score import ScoreRequest, run

    run(ScoreRequest(**options, texts=texts))


@cli.command(cls=TakesLists, short_help="Measure runs in limited memory: tables, pictures, a page to pass on.")
@click.argument("target", required=False, metavar="[STORE|SHAPE]")
@click.option("--workload", metavar="NAME|FILE", help="A file of configs/workloads, such as flexgen-512-32 or chat.")
@click.option("--part", "parts", multiple=True, metavar="NAME", help="Only this part of the workload; repeatable.")
@listed(
    "--batch",
    type=batch_size,
    metavar="N",
    help="Sequences that share a pass; disk-bound: as many as the disk still bounds.",
)
@listed("-p", "--prompt-tokens", type=POSITIVE, metavar="N", help="Tokens of each prompt. [default: 512]")
@listed("-n", "--new-tokens", type=POSITIVE, metavar="N", help="Tokens of each completion. [default: 32]")
@listed("--memory-limit", "memory", type=size_text, metavar="SIZE", help="Enforced by the kernel, page cache included.")
@listed(
    "--ram",
    type=size_text,
    metavar="SIZE",
    help="Budget of a run. [default: 128 MiB below the limit, else 90% of what is free]",
)
@listed("--kernels", type=KERNELS, help="What multiplies. [default: auto]")
@listed("--kernel-mode", type=KERNEL_MODES, help="[default: invariant]")
@listed("--kv", type=KV, help="Where the KV cache is. [default: auto]")
@listed("--kv-bits", type=click.Choice((*KV_BITS, "auto")), help="Precision of the KV cache. [default: 16]")
@listed("--threads", type=POSITIVE, metavar="N", help="Compute threads. [default: all processors]")
@click.option("--quant", type=click.Choice(["int4", "int8", "none"]), help="Of a SHAPE's store. [default: int4]")
@listed("--compress", type=click.Choice(["none", "planes"]), help="Of a SHAPE's store. [default: none]")
@click.option("--distinct-blocks", type=POSITIVE, metavar="N", help="Layer files of a SHAPE's store.")
@click.option(
    "--dir",
    "folder",
    type=ANY_PATH,
    default=tempfile.gettempdir(),
    show_default=True,
    help="Where a SHAPE's store goes, and stays for the next time.",
)
@click.option("--clean", is_flag=True, help="Remove a SHAPE's store afterwards.")
@click.option("-r", "--repeat", default=3, show_default=True, type=POSITIVE, help="Runs of every setting, in turns.")
@click.option("--warm", is_flag=True, help="First a run of every setting that does not count; drop no pages.")
@click.option("--read-rate", metavar="SIZE", help="Slow the disk down to this per second (root, with cgroup v1).")
@click.option("--or-unlimited", is_flag=True, help="Run even where memory cannot be limited.")
@click.option(
    "-o",
    "--output",
    "form",
    default="md",
    show_default=True,
    type=click.Choice(["md", "json", "jsonl", "csv"]),
    help="jsonl: a line per run, as it ends.",
)
@click.option("--plot", "plot_path", type=FILE, help="Draw who waited for whom, and speeds beside bounds: PNG or SVG.")
@click.option("--report", "page_path", type=FILE, help="Write one web page with everything, for others to open.")
def bench(target: str | None, **options: Any) -> None:
    """Measure STORE, or a synthetic store of SHAPE, such as opt-13b, by runs of 'tiered generate'.

    \b
    tiered bench opt-13b.tiered -p 512 -n 32 --memory-limit 4GiB
    tiered bench opt-13b --memory-limit 2GiB 4GiB --batch 1 16 --report bench.html

    Every run is a process of its own, and reads past the page cache. Settings are all combinations of the values
    given, and take turns; prompts are random, and others in every run. Interrupted, the command prints what it has.
    """
    from tiered.cli.bench import BenchRequest, run

    axes = ("batch", "prompt_tokens", "new_tokens", "memory", "ram", "kernels", "kernel_mode", "kv", "kv_bits")
    lists = {axis: options.pop(axis) for axis in (*axes, "threads", "compress")}
    given = {axis: values for axis, values in lists.items() if values}
    run(BenchRequest(target=target, values=given, **options))


@cli.command(short_help="Show what a store holds and what fits in which budget.")
@STORE
@click.option("--context", type=POSITIVE, help="Tokens to plan for. [default: 2048, or what the model has]")
@click.option("--sequences", default=1, show_default=True, type=POSITIVE, help="Prompts in one batch.")
@click.option("--dtype", default="auto", show_default=True, help="auto, bfloat16 or float32: what is computed in.")
@click.option("--disk-bandwidth", help="Of the disk, such as 2GB/s: adds the seconds of a pass.")
@click.option("--bus-bandwidth", help="Of copies to the GPU, such as 25GB/s: adds their seconds.")
@DEVICE
@json_output()
def inspect(**options: Any) -> None:
    """Show what STORE holds and what fits in which memory budget.

    Budgets are estimates for one process like this one; 'tiered generate' measures its own and decides. With a GPU
    among the tiers, and --vram, they are those of memory beside it; no GPU is needed to ask.
    """
    with importing(is_command=True):
        from tiered.cli.inspect import run

    run(**options)


@cli.command(short_help="Predict what a model takes on a machine, before it is there.")
@click.argument("model")
@click.option("--hardware", metavar="NAME|FILE", help="A machine of configs/hardware, or a file. [default: this one]")
@click.option("--ram", help="Budget for the whole process, such as 16GiB. [default: 90% of what there is]")
@click.option("--vram", help="Budget of the GPU's memory. [default: 90% of it]")
@click.option("--prompt-len", default=512, show_default=True, type=POSITIVE, help="Tokens of each prompt.")
@click.option("--gen-len", default=32, show_default=True, type=POSITIVE, help="Tokens that each sequence generates.")
@click.option("--batch", default="auto", show_default=True, metavar="N|auto", help="Sequences at once.")
@click.option("--sequences", type=POSITIVE, help="In all. [default: the batch; else 1, or 128 for throughput]")
@click.option(
    "--objective",
    default="latency",
    show_default=True,
    type=click.Choice(["latency", "throughput"]),
    help="What a batch is chosen for: sequences finished soon, or a job finished soon.",
)
@json_output()
def plan(**options: Any) -> None:
    """Predict what MODEL takes on a machine: one row per strategy, the quickest first.

    MODEL is a store, a known name such as opt-30b, a Hugging Face folder, or a hub id, of which only config.json is
    fetched. Figures are the planner's own for this machine's profile ('tiered profile'), or for another --hardware.
    Without either, seconds are spent on measuring: torch is loaded, and 64 MiB are written to the current folder, read
    and removed, or a store is read.
    """
    from tiered.cli.plan import run

    run(**options)


@cli.command(short_help="Play a plan through without weights: what waits for what.")
@click.argument("model")
@click.option("--hardware", metavar="NAME|FILE", help="A machine of configs/hardware, or a file. [default: this one]")
@click.option("--ram", help="Budget for the whole process, such as 16GiB. [default: 90% of what there is]")
@click.option(
    "--quant", default="int4", show_default=True, type=click.Choice(["int4", "int8"]), help="Where MODEL is no store."
)
@click.option("--prompt-len", default=512, show_default=True, type=POSITIVE, help="Tokens of each prompt.")
@click.option("--gen-len", default=32, show_default=True, type=POSITIVE, help="Tokens that each sequence generates.")
@click.option("--batch", default=1, show_default=True, type=POSITIVE, help="Sequences at once.")
@MICRO_BATCH
@objective("latency")
@click.option(
    "--kv",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "gpu", "cpu", "disk"]),
    help="Where the KV cache is; auto: on the GPU if there is one and it gains, in memory or on disk as a run is "
    "expected to be quicker.",
)
@kv_bits()
@click.option(
    "--tiers", default="disk,cpu", show_default=True, help="Where weights may be; with disk,cpu,gpu a GPU computes."
)
@click.option("--vram", help="Budget of the GPU's memory, such as 14GiB. [default: 90% of what it has]")
@click.option(
    "--decode-device",
    type=click.Choice(["gpu", "cpu"]),
    help="What computes the tokens after prompts. [default: the GPU, if among the tiers]",
)
@click.option("--passes", type=POSITIVE, help="Passes to simulate. [default: the prompts', and three more]")
@click.option("--trace", "trace_path", type=FILE, help="Write a Perfetto trace, as 'tiered generate --trace' does.")
@click.option("--plot", type=FILE, help="Draw a prompt's pass and two more (.png, .svg); needs matplotlib.")
@json_output()
def simulate(**options: Any) -> None:
    """Play the plan for MODEL on a machine through in numbers: when each unit is read, computed and waited for.

    MODEL is what 'tiered plan' takes: a store, a known name such as opt-30b, a Hugging Face folder, a hub id. Nothing
    is read but shapes, and nothing computed: the schedule is the runtime's own, the speeds are those of this machine's
    profile ('tiered profile') or of another --hardware.
    """
    from tiered.cli.simulate import run

    run(**options)


@cli.command(short_help="Test every checksum of a store, at disk speed.")
@STORE
@click.option("--threads", default=8, show_default=True, type=click.IntRange(1, 256), help="Reads in flight.")
@json_output()
def verify(**options: Any) -> None:
    """Test every checksum of STORE, in parallel, at the speed of the disk.

    Names every chunk that is damaged and every file that is missing, truncated or cannot be read. Exit code 4 where
    anything is damaged, 1 where something could only not be read.
    """
    with importing(is_command=True):
        from tiered.cli.verify import run

    run(**options)


@cli.command(short_help="Show what this machine can do, what is switched off, and why.")
@click.argument("path", default=".", type=ANY_PATH)
@click.option("--disk-test", is_flag=True, help="Write, read and remove a temporary file of 256 MiB.")
@json_output()
def doctor(**options: Any) -> None:
    """Show what this machine can do for tiered, what is switched off, and what would switch it on.

    PATH is a store, or the folder where one is to be; the current folder by default.
    """
    with importing(is_command=True):
        from tiered.cli.doctor import run

    run(**options)


@cli.command(short_help="Measure this machine and its disk, for plans and predictions.")
@click.argument("store", required=False, type=ANY_PATH)
@click.option("--dir", "folder", type=ANY_PATH, help="Measure the disk of this folder. [default: the current one]")
@click.option("--threads", type=POSITIVE, help="Threads that compute and read memory. [default: all processors]")
@click.option("--plot", type=FILE, help="Draw speed over rows, with what bounds it (.png, .svg); needs matplotlib.")
@click.option("-o", "--output", type=FILE, help="Write the profile here, not to where plans look for it.")
@json_output()
def profile(**options: Any) -> None:
    """Measure this machine in some two minutes: disk, memory, linear layers, attention, passes over small models, GPU.

    The disk is that of the current folder, or of --dir, measured with a temporary file of up to 2 GiB; or that of
    STORE, whose files are read (and 512 MiB written to a temporary file). The profile is kept in the user's cache
    folder, one per machine and file system. Let nothing else run meanwhile.
    """
    with importing(is_command=True):
        from tiered.cli.profile import run

    run(**options)
