"""`tiered plan`: what a model would take on a machine, one row per strategy, before anything is bought or converted.

In: what was typed. Out: a table, or JSON. For models and machines that are known this loads neither torch nor
transformers and touches no machine: `plan/strategies.py` computes, this finds its inputs and prints its rows.
"""

import shlex
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click

from tiered.cli.lines import columns, print_json
from tiered.configs_path import config_dir
from tiered.errors import BudgetError, ConfigError, StoreError
from tiered.files import read_json
from tiered.plan.budget import DEFAULT_SHARE, available_budget
from tiered.plan.hardware import Hardware
from tiered.plan.inputs import ModelShape, Objective, tiers_text
from tiered.plan.machines import find_profile, load_hardware
from tiered.plan.shapes import known_shapes, positions_of, read_store_shape
from tiered.plan.strategies import BOTH, CPU, GPU_TIERS, Ask, Comparison, Row, compare
from tiered.process import importing
from tiered.units import MIB, format_budget, format_seconds, format_size, parse_option

_QUANTS: Final = ("int4", "int8")
_WIDTH: Final = 100
"""Of what people read; commands to copy are not cut."""
_SOLD_AS: Final = 1.08
"""So many times what programs get of its memory a card may be called by: a driver takes some of "24 GB", and what
corrects errors a sixteenth."""
_JOB: Final = 128
"""Sequences of a job of unknown size."""


@dataclass(frozen=True)
class Model:
    """What is to be run."""

    name: str
    source: str
    """What to convert."""
    path: Path | None
    """Of the store; None where it is still to be converted."""
    shapes: Mapping[str, ModelShape]
    """By quantization."""
    positions: int | None
    """Tokens of a sequence that it is made for; None where its configuration names no limit."""

    def command(self, row: Row, ask: Ask) -> str:
        """What to type to run `row`."""
        store = Path(f"{self.name}.tiered") if self.path is None else self.path
        words = ["tiered", "generate" if ask.objective == "latency" else "batch", str(store)]
        words += ["--ram", format_budget(ask.ram), "--batch", str(row.batch_size)]
        if ask.vram is not None and row.strategy != CPU:
            words += ["--tiers", tiers_text(GPU_TIERS), "--vram", format_budget(ask.vram)]
            words += ["--prefill-device", "gpu", "--decode-device", "cpu"] if row.strategy == BOTH else []
        words += ["--kv", row.kv_tier, "--kv-bits", str(row.kv_bits)]
        if row.is_resident and row.strategy == CPU:
            words += ["--tiers", "cpu"]
        if row.plan.holds_less:
            held = row.plan.placement.resident_nbytes
            words += ["--resident-cpu", format_budget(held) if held else "0"]
        if ask.objective == "latency":
            words += ["-n", str(ask.generate), "-p", "..."]
        else:
            words += ["--max-tokens", str(ask.generate), "-i", "requests.jsonl", "-o", "results.jsonl"]
        return shlex.join(words)


def run(
    model: str,
    hardware: str | None,
    ram: str | None,
    vram: str | None,
    prompt_len: int,
    gen_len: int,
    batch: str,
    sequences: int | None,
    objective: Objective,
    as_json: bool,
) -> None:
    """Print what `model` takes. Raises ConfigError, and BudgetError where no strategy fits."""
    size = _batch(batch)
    if ram is not None:
        parse_option("--ram", ram)  # before anything is looked for or measured
    if vram is not None:
        parse_option("--vram", vram)
    found = find_model(model)
    check_positions(found, prompt_len, gen_len)
    machine = hardware_for(found, hardware)
    ask = Ask(
        prompt_len,
        gen_len,
        sequences or size or (1 if objective == "latency" else _JOB),
        size,
        ram_budget(ram, machine, is_here=hardware is None),
        None if vram is None and machine.gpu is None else vram_limit(vram, machine),
        objective,
    )
    compared = compare(found.shapes.__getitem__, tuple(found.shapes), machine, ask)
    if as_json:
        print_json(_to_json(found, machine, ask, compared))
    elif compared.rows:
        for line in _lines(found, machine, ask, compared):
            click.echo(line)
    if compared.best is None:
        refused = (one for one in compared.refusals if one.strategy == CPU)
        raise BudgetError("; ".join(f"{found.name} in {one.quant} {one.message}" for one in refused))


def find_model(text: str) -> Model:
    """The model called `text`: a store, a name of configs/models, a Hugging Face folder, a hub id. What its notes say
    is told on standard error.

    Raises ConfigError, StoreError or CheckpointError where it is none of them, or a damaged one.
    """
    path = Path(text).expanduser()
    if _is_file(path / "manifest.json"):
        shape = read_store_shape(path)
        if shape is None:
            with importing(is_command=True):
                from tiered.shapes import store_shape
            shape = store_shape(path)
        quant = "none" if shape.quantization is None else shape.quantization.partition("-")[0]
        positions = positions_of(read_json(path / "config.json", StoreError, "convert the model again"))
        return Model(path.resolve().name.removesuffix(".tiered"), text, path, {quant: shape}, positions)
    models = config_dir() / "models"
    known = None if _is_file(path) else known_shapes(models, text)
    if known is not None:
        positions = positions_of(tomllib.loads((models / f"{text}.toml").read_text(encoding="utf-8"))["config"])
        return Model(text, text, None, {quant: known[quant] for quant in _QUANTS}, positions)
    with importing(is_command=True):
        from tiered.shapes import outline
    found = outline(text, _QUANTS)
    for note in found.notes:
        click.echo(f"tiered: {note}", err=True)
    return Model(text.rstrip("/").rpartition("/")[2], text, None, found.shapes, found.positions)


def check_positions(model: Model, prompt_len: int, gen_len: int) -> None:
    """Raise ConfigError where `model` has fewer positions than so many tokens."""
    if model.positions is not None and prompt_len + gen_len > model.positions:
        raise ConfigError(
            f"--prompt-len {prompt_len} and --gen-len {gen_len}: {model.name} has positions for {model.positions}; "
            "ask for fewer"
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False  # no path can have this name


def hardware_for(model: Model, name: str | None) -> Hardware:
    """The machine called `name`; None: the profile of this one, or quick rates where none has been measured."""
    if name is not None:
        return load_hardware(name)
    folder = Path() if model.path is None else model.path
    found = find_profile(folder)
    if found is None:
        click.echo("tiered: no profile of this machine: measuring for seconds; 'tiered profile' is exact", err=True)
        with importing(is_command=True):
            from tiered.bench.quick import quick_hardware
            from tiered.host import Host
        with Host() as host:
            found = quick_hardware(folder, tuple(model.shapes.values()), model.path is not None, host.kernels)
    return found


def ram_budget(text: str | None, machine: Hardware, is_here: bool) -> int:
    """The budget: as `text` asks for, or what a run would take without being told. Raises ConfigError."""
    if text is None:
        return min(available_budget(), machine.ram) if is_here else int(machine.ram * DEFAULT_SHARE)
    asked = parse_option("--ram", text)
    if asked > machine.ram:
        raise ConfigError(f"--ram {text}: {machine.name} has {format_size(machine.ram)}; ask for less")
    return asked


def vram_limit(text: str | None, machine: Hardware) -> int:
    """The budget of the GPU's memory: as `text` asks for, or about what a run would take without being told. Raises
    ConfigError."""
    if machine.gpu is None:
        raise ConfigError(f"--vram {text}: {machine.name} has no GPU; drop it, or name another --hardware")
    most = machine.gpu.vram
    asked = int(most * DEFAULT_SHARE) if text is None else parse_option("--vram", text)
    if asked > most * _SOLD_AS:
        raise ConfigError(f"--vram {text}: {machine.gpu.name} has {format_size(most)}; ask for less")
    if asked > most:
        has = f"{machine.gpu.name} has {most // MIB} MiB"
        click.echo(f"tiered: --vram {text}: {has}; planning with all of it", err=True)
    return min(asked, most)


def _batch(text: str) -> int | None:
    """Sequences at once; None for "auto"."""
    if text == "auto":
        return None
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--batch {text!r}: expected auto, or a whole number above 0")
    return int(text)


def _to_json(model: Model, machine: Hardware, ask: Ask, compared: Comparison) -> dict[str, Any]:
    best = compared.best
    return {
        "model": model.name,
        "hardware": {"name": machine.name, "source": machine.source, "is_measured": machine.is_measured},
        "ask": asdict(ask),
        "rows": [row.to_json() | {"is_best": row is best, "command": model.command(row, ask)} for row in compared.rows],
        "refusals": [asdict(refusal) for refusal in compared.refusals],
        "why": compared.why,
    }


def _lines(model: Model, machine: Hardware, ask: Ask, compared: Comparison) -> Iterator[str]:
    """The comparison as people read it."""
    one = "1 sequence" if ask.sequences == 1 else f"{ask.sequences} sequences"
    vram = "" if ask.vram is None else f" and {format_size(ask.vram)} of VRAM"
    yield f"{model.name}: {one} of {ask.prompt} + {ask.generate} tokens, in {format_size(ask.ram)} of RAM{vram}"
    yield from wrapped("machine", f"{machine.name}, {machine.source}")
    yield f"          of RAM {format_size(ask.baseline)} are for the process, as measured once elsewhere"
    yield ""
    yield from _table(compared)
    yield "kept: weights in memory for good (in RAM, VRAM: all); tok/s counts the prompts' seconds, dec/s not"
    for refusal in compared.refusals:
        yield from wrapped("", f"{refusal.strategy} {refusal.quant}: {refusal.message}")
    if any(row.strategy != CPU for row in compared.rows):
        yield "with a gpu: not tried on a GPU yet, only proven by emulation"
    best = compared.best
    if best is None:
        return
    yield ""
    yield from wrapped("best", f"{best.title} {best.quant}: {compared.why}")
    memory = (f"{name.replace('_', ' ')} {format_size(n)}" for name, n in best.prediction.memory.items() if n)
    yield from wrapped("memory", ", ".join(memory))
    read, written = best.prediction.read_nbytes, best.prediction.written_nbytes
    yield f"disk      {read / 1e9:.3g} GB read, {written / 1e9:.3g} GB written"
    first = "run       "
    if model.path is None:
        yield f"{first}tiered convert {shlex.quote(model.source)} --quant {best.quant}"
        first = " " * len(first)
    yield first + model.command(best, ask)


def wrapped(title: str, text: str) -> list[str]:
    indent = " " * 10 if title else ""
    return textwrap.wrap(f"{title:<{len(indent)}}{text}", _WIDTH, subsequent_indent=indent)


def _table(compared: Comparison) -> list[str]:
    header = ["", "strategy", "quant", "batch", "kept", "KV", "prefill", "decode", "tok/s", "dec/s", "bound"]
    priced = any(row.usd_per_million_tokens is not None for row in compared.rows)
    rows = [header + ["$/Mtok"] * priced]
    for row in compared.rows:
        found = row.prediction
        decoding = found.decode_tokens_per_second
        cells = ["*" if row is compared.best else "", row.title, row.quant, str(row.batch_size)]
        cells += [f"{row.resident_share:.0%}", f"{row.kv_tier} {row.kv_bits}"]
        cells += [format_seconds(found.prefill.seconds), format_seconds(found.decode.seconds)]
        cells += [_short(found.tokens_per_second), _short(decoding), found.bottleneck]
        cells += [_short(row.usd_per_million_tokens)] * priced
        rows.append(cells)
    return columns(rows, "<<<>><>>>><" + ">" * priced)


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
