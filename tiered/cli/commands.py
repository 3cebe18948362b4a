"""What can be typed: every command of `tiered` with its options. What a command does is in the module of its name.

That module is imported when the command runs, as it loads torch, which takes seconds; this one imports nothing but
click, so that --help and a mistyped option are answered at once.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from tiered.errors import ConfigError
from tiered.process import importing
from tiered.units import parse_size

_POSITIVE: Final = click.IntRange(min=1)
_ANY_PATH: Final = click.Path(path_type=Path)
_FILE: Final = click.Path(path_type=Path, dir_okay=False)

Command = Callable[..., Any]


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


# Options that several commands have.


def _together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator that adds `options`, in this order."""

    def add(command: Command) -> Command:
        # As decorators stand above a function: the last is applied first.
        for option in reversed(options):
            command = option(command)
        return command

    return add


_store: Final = click.argument("store", type=_ANY_PATH)

_KV_BITS: Final = ("16", "8", "4")
_KERNELS: Final = click.Choice(["auto", "torch", "scalar", "avx2", "avx512", "amx"])
_KERNEL_MODES: Final = click.Choice(["invariant", "fast"])
_KV: Final = click.Choice(["auto", "cpu", "disk"])


def _kv_bits(choices: Sequence[str] = _KV_BITS, more: str = "") -> Callable[[Command], Command]:
    kind = click.Choice(choices)
    return click.option(
        "--kv-bits", default="16", show_default=True, type=kind, help=f"Precision of the KV cache{more}."
    )


_kv: Final = _together(
    click.option(
        "--kv",
        default="auto",
        show_default=True,
        type=_KV,
        help="Where the KV cache is; auto: in memory if it fits.",
    ),
    click.option(
        "--kv-dir",
        type=click.Path(path_type=Path, file_okay=False, exists=True),
        help="Where a KV cache on disk goes. [default: beside the store]",
    ),
)

_measure: Final = click.option(
    "--measure/--no-measure", default=True, help="Measure the raw disk bandwidth after the run."
)


def _json(instead: str = "instead of text") -> Callable[[Command], Command]:
    return click.option("--json", "as_json", is_flag=True, help=f"Print one JSON object {instead}.")


def _texts(what: str) -> Callable[[Command], Command]:
    kind = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
    return click.option("-f", "--file", "files", multiple=True, type=kind, help=f"{what}; repeatable; - is stdin.")


def _id_files(what: str) -> Callable[[Command], Command]:
    kind = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
    return click.option("--ids-file", "id_files", multiple=True, type=kind, help=f"{what} as token ids; like -f.")


_micro_batch = click.option(
    "--micro-batch", type=_POSITIVE, help="Tokens computed together. [default: as many as memory allows and help]"
)


def _objective(default: str) -> Callable[[Command], Command]:
    """The option for what counts where prompts enter while other sequences decode."""
    return click.option(
        "--objective",
        default=default,
        show_default=True,
        type=click.Choice(["latency", "throughput"]),
        help="While others decode: latency reads prompts in small pieces, throughput as much as a pass takes.",
    )


def _run(invariant: str) -> Callable[[Command], Command]:
    """The options for precision, memory, threads and kernels; `invariant` says what the invariant mode promises."""
    return _together(
        click.option(
            "--dtype", default="auto", show_default=True, help="auto, bfloat16 or float32: what is computed in."
        ),
        click.option("--verify", default="first", show_default=True, type=click.Choice(["first", "always", "never"])),
        click.option("--tiers", default="disk,cpu", show_default=True, help="Where weights may be, slowest first."),
        click.option("--ram", help="Budget for the whole process, such as 2GiB. [default: 90% of what is free]"),
        click.option("--threads", type=_POSITIVE, help="Compute threads. [default: all processors]"),
        click.option(
            "--kernels",
            default="auto",
            show_default=True,
            type=_KERNELS,
            help="What multiplies; auto is the best that this machine has.",
        ),
        click.option(
            "--kernel-mode",
            default="invariant",
            show_default=True,
            type=_KERNEL_MODES,
            help=f"invariant: {invariant}. fast: activations may be rounded to 8 bits.",
        ),
    )


def _stated() -> frozenset[str]:
    """Names of the options that the running command was given, as opposed to their defaults."""
    context = click.get_current_context()
    given = ParameterSource.COMMANDLINE
    return frozenset(name for name in context.params if context.get_parameter_source(name) is given)


class _TakesLists(click.Command):
    """A command whose options may have their values one after the other: --batch 1 4 16, or --batch 1,4,16."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        lists = [one for one in self.params if isinstance(one, click.Option) and one.multiple]
        options = {name: one for one in lists if one.type is not click.STRING for name in one.opts}
        return super().parse_args(ctx, list(self._one_by_one(args, options)))

    def _one_by_one(self, args: Sequence[str], options: Mapping[str, click.Option]) -> Iterator[str]:
        """`args`, with the name of a list's option before each of its values."""
        rest = iter(args)
        option: tuple[str, click.Option] | None = None
        for word in rest:
            if option is not None and _is_value(option[1], word):
                for value in word.split(","):
                    yield from (option[0], value)
                continue
            option = (word, options[word]) if word in options else None
            if option is None:
                yield word
            if word == "--":
                yield from rest
            elif option is not None:
                # The first value is taken as it is, so that a wrong one is named.
                for value in next(rest, "").split(","):
                    yield from (word, value)


def _is_value(option: click.Option, text: str) -> bool:
    """Whether `text` goes on with the list of `option`; a number does, if only to be refused by name."""
    if text.isdecimal():
        return True
    try:
        for value in text.split(","):
            option.type.convert(value, option, None)
    except click.BadParameter:
        return False
    return True


def _size(text: str) -> str:
    """A number of bytes, which stays as it is written."""
    try:
        parse_size(text)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from None
    return text


def _batch(text: str) -> int | str:
    """A number of sequences, or "disk-bound"."""
    if text == "disk-bound":
        return text
    if not text.isdecimal() or not int(text[:9]) >= 1:
        raise click.BadParameter(f"{text}: expected a whole number above 0, or disk-bound")
    return int(text)


def _list(*names: str, type: Any, help: str, metavar: str | None = None) -> Callable[[Command], Command]:
    """An option of a command that `_TakesLists`."""
    return click.option(*names, multiple=True, type=type, help=help, metavar=metavar)


# The commands, in the order of `tiered --help`.


@cli.command(short_help="Convert a checkpoint into a store of quantized blocks.")
@click.argument("source")
@click.option("-o", "--output", type=_ANY_PATH, help="The store to write. [default: ./NAME.tiered]")
@click.option("--quant", default="int4", show_default=True, type=click.Choice(["int4", "int8", "none"]))
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
@click.option("--from", "weights", type=_ANY_PATH, help="The weights of the model that SOURCE names, in whatever form.")
@click.option("--md5", type=_ANY_PATH, help="Test the weight files first, by a list that md5sum wrote.")
@click.option("--synthetic", is_flag=True, help="Random weights of a known shape (or a toml file), for benchmarks.")
@click.option("--distinct-blocks", type=_POSITIVE, metavar="N", help="Synthetic: store only N layers.")
@click.option("--seed", default=0, show_default=True, help="Of synthetic weights.")
@click.option("--tokenizer", type=_ANY_PATH, help="A folder or tokenizer.json to take instead of SOURCE's tokenizer.")
def convert(source: str, output: Path | None, **options: Any) -> None:
    """Convert SOURCE into a store that 'tiered generate' runs.

    SOURCE is a Hugging Face folder, a hub id such as facebook/opt-6.7b, or a known name such as opt-125m. OPT may be in
    metaseq's files (a folder, or one of its *.pt) or in FlexGen's too: 'tiered convert opt-175b --from PATH'. An
    interrupted conversion is resumed by the same command.

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
@_store
@click.option("-p", "--prompt", "prompts", multiple=True, help="A prompt; repeat for a batch.")
@_texts("A file that is one prompt")
@click.option("--prompt-ids", multiple=True, metavar="IDS", help="A prompt as token ids: 2,100,524; like -p.")
@_id_files("A file that is one prompt")
@click.option("-n", "--max-new-tokens", default=128, show_default=True, type=_POSITIVE, help="Tokens to generate.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="Sample from the k likeliest tokens; 0: all.")
@click.option("--top-p", default=1.0, show_default=True, help="Sample from the likeliest tokens of this total mass.")
@click.option("--min-p", default=0.0, show_default=True, help="Drop tokens below this share of the likeliest.")
@click.option("--repetition-penalty", default=1.0, show_default=True, help="Above 1 discourages repetition.")
@click.option("--seed", default=0, show_default=True, help="For sampling.")
@click.option("--stop", "stops", multiple=True, help="End at this text; repeatable.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the end-of-text token.")
@click.option("--prompt-tokens", type=_POSITIVE, help="Random prompts of exactly N tokens, for measuring.")
@click.option("--sequences", default=1, show_default=True, type=_POSITIVE, help="So many --prompt-tokens prompts.")
@click.option("--batch", type=_POSITIVE, help="Prompts that run at once. [default: all]")
@_micro_batch
@_objective("latency")
@_kv
@_kv_bits((*_KV_BITS, "auto"), "; auto: as many bits as cost at most 10 % in bytes read")
@click.option("--chat", is_flag=True, help="Apply the tokenizer's chat template to each prompt.")
@_run("a text does not depend on what shares its batch")
@click.option("--prefetch", type=click.IntRange(min=0), help="Units read ahead; 0: none. [default: as memory allows]")
@_measure
@_json()
@click.option("--trace", "trace_path", type=_FILE, help="Write a Perfetto trace.")
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

    run(GenerateRequest(**options, prompts=texts, stated=_stated()))


@cli.command(short_help="Answer a file of requests; killed and started again at will.")
@_store
@click.option("-i", "--input", "input_path", required=True, type=_FILE, help="Requests, one JSON object per line.")
@click.option("-o", "--output", "output_path", required=True, type=_FILE, help="Where results are appended.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, (1 << 64) - 1), help="For sampling.")
@click.option(
    "--max-tokens", default=128, show_default=True, type=_POSITIVE, help="Tokens to generate where a line says nothing."
)
@click.option("--context", type=_POSITIVE, help="Tokens of the longest sequence. [default: as the input needs]")
@click.option("--batch", type=_POSITIVE, help="Sequences that share a pass. [default: as time and memory allow]")
@_micro_batch
@_objective("throughput")
@_kv
@_kv_bits()
@_run("a text does not depend on what shares its batch")
@_measure
@_json("with the report")
def batch(**options: Any) -> None:
    """Answer all requests of a file with STORE, the folder that 'tiered convert' wrote.

    Lines are requests in OpenAI's batch format, for /v1/completions or /v1/chat/completions. Results are appended in
    its result format as they are finished, in any order. The same command again goes on where an interrupted one has
    stopped: what is done is kept, and the results are those of a run in one go. OUTPUT.job tells which job a result
    file belongs to.
    """
    with importing(is_command=True):
        from tiered.cli.batch import BatchRequest, run

    run(BatchRequest(**options, stated=_stated()))


@cli.command(short_help="Score texts: perplexity and a log-probability per token.")
@_store
@_texts("A text")
@_id_files("A text")
@click.option("--context", type=_POSITIVE, help="Tokens in a window. [default: 2048, or what the model has]")
@click.option(
    "--stride",
    type=_POSITIVE,
    help="Tokens of a window that are scored anew; the others are context. [default: all: windows do not overlap]",
)
@click.option(
    "--batch",
    "--windows-per-pass",
    "windows_per_pass",
    type=_POSITIVE,
    help="Windows that share a pass. [default: as memory allows]",
)
@click.option(
    "--per-token",
    "per_token_path",
    type=_FILE,
    help="Write a JSON line per token: file, position, token_id, text, logprob.",
)
@_kv_bits()
@_run("a score does not depend on what shares its pass")
@_measure
@_json()
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


@cli.command(cls=_TakesLists, short_help="Measure runs in limited memory: tables, pictures, a page to pass on.")
@click.argument("target", required=False, metavar="[STORE|SHAPE]")
@click.option("--workload", metavar="NAME|FILE", help="A file of configs/workloads, such as flexgen-512-32 or chat.")
@click.option("--part", "parts", multiple=True, metavar="NAME", help="Only this part of the workload; repeatable.")
@_list(
    "--batch",
    type=_batch,
    metavar="N",
    help="Sequences that share a pass; disk-bound: as many as the disk still bounds.",
)
@_list("-p", "--prompt-tokens", type=_POSITIVE, metavar="N", help="Tokens of each prompt. [default: 512]")
@_list("-n", "--new-tokens", type=_POSITIVE, metavar="N", help="Tokens of each completion. [default: 32]")
@_list("--memory-limit", "memory", type=_size, metavar="SIZE", help="Enforced by the kernel, page cache included.")
@_list(
    "--ram",
    type=_size,
    metavar="SIZE",
    help="Budget of a run. [default: 128 MiB below the limit, else 90% of what is free]",
)
@_list("--kernels", type=_KERNELS, help="What multiplies. [default: auto]")
@_list("--kernel-mode", type=_KERNEL_MODES, help="[default: invariant]")
@_list("--kv", type=_KV, help="Where the KV cache is. [default: auto]")
@_list("--kv-bits", type=click.Choice((*_KV_BITS, "auto")), help="Precision of the KV cache. [default: 16]")
@_list("--threads", type=_POSITIVE, metavar="N", help="Compute threads. [default: all processors]")
@click.option("--quant", type=click.Choice(["int4", "int8", "none"]), help="Of a SHAPE's store. [default: int4]")
@_list("--compress", type=click.Choice(["none", "planes"]), help="Of a SHAPE's store. [default: none]")
@click.option("--distinct-blocks", type=_POSITIVE, metavar="N", help="Layer files of a SHAPE's store.")
@click.option(
    "--dir",
    "folder",
    type=_ANY_PATH,
    default=tempfile.gettempdir(),
    show_default=True,
    help="Where a SHAPE's store goes, and stays for the next time.",
)
@click.option("--clean", is_flag=True, help="Remove a SHAPE's store afterwards.")
@click.option("-r", "--repeat", default=3, show_default=True, type=_POSITIVE, help="Runs of every setting, in turns.")
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
@click.option("--plot", "plot_path", type=_FILE, help="Draw who waited for whom, and speeds beside bounds: PNG or SVG.")
@click.option("--report", "page_path", type=_FILE, help="Write one web page with everything, for others to open.")
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
@_store
@click.option("--context", type=_POSITIVE, help="Tokens to plan for. [default: 2048, or what the model has]")
@click.option("--sequences", default=1, show_default=True, type=_POSITIVE, help="Prompts in one batch.")
@click.option("--dtype", default="auto", show_default=True, help="auto, bfloat16 or float32: what is computed in.")
@click.option("--disk-bandwidth", help="Of the disk, such as 2GB/s: adds the seconds of a pass.")
@_json()
def inspect(**options: Any) -> None:
    """Show what STORE holds and what fits in which memory budget.

    Budgets are estimates for one process like this one; 'tiered generate' measures its own and decides.
    """
    with importing(is_command=True):
        from tiered.cli.inspect import run

    run(**options)


@cli.command(short_help="Predict what a model takes on a machine, before it is there.")
@click.argument("model")
@click.option("--hardware", metavar="NAME|FILE", help="A machine of configs/hardware, or a file. [default: this one]")
@click.option("--ram", help="Budget for the whole process, such as 16GiB. [default: 90% of what there is]")
@click.option("--vram", help="Budget of the GPU. [default: all of it]")
@click.option("--prompt-len", default=512, show_default=True, type=_POSITIVE, help="Tokens of each prompt.")
@click.option("--gen-len", default=32, show_default=True, type=_POSITIVE, help="Tokens that each sequence generates.")
@click.option("--batch", default="auto", show_default=True, metavar="N|auto", help="Sequences at once.")
@click.option("--sequences", type=_POSITIVE, help="In all. [default: the batch; else 1, or 128 for throughput]")
@click.option(
    "--objective",
    default="latency",
    show_default=True,
    type=click.Choice(["latency", "throughput"]),
    help="What a batch is chosen for: sequences finished soon, or a job finished soon.",
)
@_json()
def plan(**options: Any) -> None:
    """Predict what MODEL takes on a machine: one row per strategy, the quickest first.

    MODEL is a store, a known name such as opt-30b, a Hugging Face folder, or a hub id, of which only config.json is
    fetched. Figures are the planner's own for this machine's profile ('tiered profile'), or for another --hardware.
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
@click.option("--prompt-len", default=512, show_default=True, type=_POSITIVE, help="Tokens of each prompt.")
@click.option("--gen-len", default=32, show_default=True, type=_POSITIVE, help="Tokens that each sequence generates.")
@click.option("--batch", default=1, show_default=True, type=_POSITIVE, help="Sequences at once.")
@_micro_batch
@_objective("latency")
@click.option(
    "--kv",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "disk"]),
    help="Where the KV cache is; auto: in memory if it fits.",
)
@_kv_bits()
@click.option("--passes", type=_POSITIVE, help="Passes to simulate. [default: the prompts', and three more]")
@click.option("--trace", "trace_path", type=_FILE, help="Write a Perfetto trace, as 'tiered generate --trace' does.")
@click.option("--plot", type=_FILE, help="Draw a prompt's pass and two more (.png, .svg); needs matplotlib.")
@_json()
def simulate(**options: Any) -> None:
    """Play the plan for MODEL on a machine through in numbers: when each unit is read, computed and waited for.

    MODEL is what 'tiered plan' takes: a store, a known name such as opt-30b, a Hugging Face folder, a hub id. Nothing
    is read but shapes, and nothing computed: the schedule is the runtime's own, the speeds are those of this machine's
    profile ('tiered profile') or of another --hardware.
    """
    from tiered.cli.simulate import run

    run(**options)


@cli.command(short_help="Test every checksum of a store, at disk speed.")
@_store
@click.option("--threads", default=8, show_default=True, type=click.IntRange(1, 256), help="Reads in flight.")
@_json()
def verify(**options: Any) -> None:
    """Test every checksum of STORE, in parallel, at the speed of the disk.

    Names every chunk that is damaged and every file that is missing, truncated or cannot be read. Exit code 4 where
    anything is damaged, 1 where something could only not be read.
    """
    with importing(is_command=True):
        from tiered.cli.verify import run

    run(**options)


@cli.command(short_help="Show what this machine can do, what is switched off, and why.")
@click.argument("path", default=".", type=_ANY_PATH)
@click.option("--disk-test", is_flag=True, help="Write, read and remove a temporary file of 256 MiB.")
@_json()
def doctor(**options: Any) -> None:
    """Show what this machine can do for tiered, what is switched off, and what would switch it on.

    PATH is a store, or the folder where one is to be; the current folder by default.
    """
    with importing(is_command=True):
        from tiered.cli.doctor import run

    run(**options)


@cli.command(short_help="Measure this machine and its disk, for plans and predictions.")
@click.argument("store", required=False, type=_ANY_PATH)
@click.option("--dir", "folder", type=_ANY_PATH, help="Measure the disk of this folder. [default: the current one]")
@click.option("--threads", type=_POSITIVE, help="Threads that compute and read memory. [default: all processors]")
@click.option("--plot", type=_FILE, help="Draw speed over rows, with what bounds it (.png, .svg); needs matplotlib.")
@click.option("-o", "--output", type=_FILE, help="Write the profile here, not to where plans look for it.")
@_json()
def profile(**options: Any) -> None:
    """Measure this machine in about a minute: disk, memory, linear layers, attention, GPU.

    The disk is that of the current folder, or of --dir, measured with a temporary file of up to 2 GiB; or that of
    STORE, whose files are read (and 512 MiB written to a temporary file). The profile is kept in the user's cache
    folder, one per machine and file system. Let nothing else run meanwhile.
    """
    with importing(is_command=True):
        from tiered.cli.profile import run

    run(**options)
