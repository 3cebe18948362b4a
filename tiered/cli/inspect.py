"""`tiered inspect`: what a store holds, and what fits in which budget. Reads headers only.

The process is measured as a run measures it, after building what a runtime builds first; all other figures are the
planner's own.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from tiered.arch import context_for, load_config
from tiered.cli.lines import columns, print_json
from tiered.cli.run_request import DeviceRequest
from tiered.errors import ConfigError, TieredError
from tiered.generate.tokenizer import load_tokenizer
from tiered.plan import MAX_BATCHED_TOKENS, Budgets, ModelShape, Plan, Workload
from tiered.plan.fits import Fit, fits
from tiered.plan.on_device import CONTEXT_NBYTES
from tiered.prepare import device_budgets, measure_inputs
from tiered.runtime import Options, compute_dtype
from tiered.store import Store
from tiered.store.summary import BlockRow, StoreSummary, summarize
from tiered.units import format_budget, format_rate, format_seconds, format_size, parse_size


@dataclass(frozen=True)
class Inspection:
    """Everything the command shows."""

    store: Store
    summary: StoreSummary
    workload: Workload
    model: ModelShape
    is_mixture: bool
    """By its configuration, whether or not its experts have been taken apart."""
    fits: tuple[Fit, ...]
    default_budget: int
    """What a run would take here and now without --ram."""
    disk_bandwidth: float | None
    bus_bandwidth: float | None = None

    def to_json(self) -> dict[str, Any]:
        manifest, summary = self.store.manifest, self.summary
        return {
            "name": self.store.name,
            "path": str(self.store.path),
            "family": manifest.architecture.get("model_type"),
            "layers": manifest.architecture.get("layers"),
            "parameters": summary.parameters,
            "quantization": {"source": [], **manifest.quantization},
            "synthetic": manifest.synthetic,
            "distinct_blocks": manifest.distinct_blocks,
            "source": dict(manifest.source),
            "tied": manifest.tied,
            "blocks": [row.to_json() for row in summary.rows],
            "model_bytes": summary.model_nbytes,
            "disk_bytes": summary.disk_nbytes,
            "bits_per_weight": summary.bits_per_weight,
            "bytes_per_pass": summary.tape_nbytes,
            "experts": self._experts_json(),
            "dtype": self.model.dtype,
            "state_bytes_per_sequence": 0 if self.model.state is None else self.model.state.nbytes,
            "kv_bytes_per_token": self.model.kv_token_nbytes,
            "load": self._load_json(),
            "baseline_bytes": self.smallest.needs.baseline,
            "default_budget_bytes": self.default_budget,
            "disk_bandwidth": self.disk_bandwidth,
            "bus_bandwidth": self.bus_bandwidth,
            "vram_budget_bytes": None if self.smallest.device is None else self.smallest.device.vram,
            "budgets_are": "estimates; a run measures its own baseline",
            "budgets": [self._fit_json(fit) for fit in self.fits],
        }

    @property
    def copied(self) -> str:
        """What is copied to the device, and when."""
        return "copied with prompts" if self.smallest.decode_device == "cpu" else "copied"

    @property
    def smallest(self) -> Plan:
        """The plan in the smallest budget that works."""
        return self.fits[0].plan

    def _load_json(self) -> dict[str, Any]:
        """The workload that was planned for; 0 stands for what the planner derives from the rest."""
        work = self.workload
        load = {"sequences": work.sequences, "context": work.max_context, "prompt": 0, "pass_tokens": 0, "kv_tokens": 0}
        return {**load, "one_pass": False, "logits": 0, "least_context": 0}

    def _experts_json(self) -> dict[str, Any] | None:
        """Of experts that can be read on demand."""
        experts = self.model.experts
        if experts is None:
            return None
        found = {"layers": experts.layers, "count": experts.count, "chosen": experts.chosen}
        return {**found, "nbytes": experts.file_nbytes, "dense_bytes_per_pass": sum(experts.dense.file_nbytes)}

    def _fit_json(self, fit: Fit) -> dict[str, Any]:
        rate, bus, device = self.disk_bandwidth, self.bus_bandwidth, fit.plan.device
        return {
            "budget_bytes": fit.plan.budget,
            "resident_blocks": fit.plan.resident_blocks,
            "resident_bytes": fit.resident_nbytes,
            "resident_share": fit.resident_share,
            "bytes_read_per_pass": fit.read_nbytes,
            "disk_seconds_per_pass": None if rate is None else fit.disk_seconds(rate),
            "experts_in_memory": None if fit.plan.experts is None else fit.plan.experts.slots,
            "needs": asdict(fit.plan.needs),
            "device_resident_bytes": fit.device_nbytes,
            "bytes_copied_per_pass": fit.bus_nbytes,
            "bus_seconds_per_pass": None if bus is None else fit.bus_seconds(bus),
            "kv_on_device": fit.plan.cache.on_device,
            "device_needs": None if device is None else asdict(device.needs),
        }


def run(
    store: Path,
    context: int | None,
    sequences: int,
    dtype: str,
    disk_bandwidth: str | None,
    bus_bandwidth: str | None,
    as_json: bool,
    **device: Any,
) -> None:
    """Show the store at the path `store`, as lines or as JSON; `device` are the fields of a DeviceRequest."""
    rates = (_parse_rate("--disk-bandwidth", disk_bandwidth), _parse_rate("--bus-bandwidth", bus_bandwidth))
    options = Options(dtype=dtype, kv="auto", **DeviceRequest(**device).device_options())
    if options.has_device and options.vram is None:
        raise ConfigError(f"--tiers {device['tiers']}: say for how much GPU memory to plan, such as --vram 14GiB")
    inspection = _inspect(store, context, sequences, options, *rates)
    if as_json:
        print_json(inspection.to_json())
        return
    for line in _lines(inspection):
        click.echo(line)


def _inspect(
    path: Path,
    context: int | None,
    sequences: int,
    options: Options,
    disk_bandwidth: float | None,
    bus_bandwidth: float | None,
) -> Inspection:
    """Open the store at `path` and ask the planner. Raises StoreError, ConfigError, DeviceBudgetError."""
    store = Store.open(path)
    summary = summarize(store)
    config = load_config(store.path)
    workload = Workload(sequences, context_for(config, context, "--context"), max_batched_tokens=MAX_BATCHED_TOKENS)
    # A run has loaded its tokenizer before it measures the process. A damaged tokenizer does not keep a store from
    # being inspected.
    with contextlib.suppress(TieredError):
        load_tokenizer(store)
    compute_dtype(options.dtype, config, options.has_device)  # raises ConfigError for what cannot compute
    # No device is opened, and the processor has no arithmetic in float16: bfloat16 is as large.
    measured_in = "bfloat16" if options.dtype == "float16" else options.dtype
    model, machine, budgets = measure_inputs(store, Options(dtype=measured_in))
    if measured_in != options.dtype:
        model = model.in_dtype(options.dtype)
    rows = fits(model, machine, workload, _with_device(budgets, options))
    is_mixture = bool(getattr(config, "num_experts_per_tok", None))
    return Inspection(store, summary, workload, model, is_mixture, rows, budgets.ram, disk_bandwidth, bus_bandwidth)


def _with_device(budgets: Budgets, options: Options) -> Budgets:
    """The budgets for a device that need not be there: what its driver takes is assumed."""
    budgets = replace(budgets, tiers=options.tiers, resident_cpu=options.resident_cpu)
    if not options.has_device or options.vram is None:
        return budgets
    context_nbytes = 0 if options.device == "emulated" else CONTEXT_NBYTES
    return device_budgets(budgets, options, options.vram, context_nbytes)


def _parse_rate(option: str, text: str | None) -> float | None:
    """Bytes per second meant by "2GB/s" or "2GB"."""
    if text is None:
        return None
    number, slash, unit = text.strip().partition("/")
    if slash and unit.strip().lower() not in ("s", "sec", "second"):
        raise ConfigError(f"{option} {text!r}: expected a size per second, such as 2GB/s")
    return float(parse_size(number))


def _lines(inspection: Inspection) -> Iterator[str]:
    """The inspection as people read it."""
    yield from _about(inspection)
    yield ""
    yield from _blocks(inspection.summary)
    yield ""
    yield from _budgets(inspection)


def _about(inspection: Inspection) -> list[str]:
    manifest, summary = inspection.store.manifest, inspection.summary
    quantization, source = manifest.quantization, manifest.source
    schemes = ", ".join(
        f"{kind} {quantization[kind] or 'not quantized'}"
        for kind in ("layers", "embed", "head")
        if kind in quantization
    )
    kept = list(quantization.get("unquantized", ()))
    methods = quantization.get("source")
    before = f"; quantized before ({', '.join(methods)})" if methods else ""
    rows = [
        ("name", inspection.store.name),
        ("family", f"{manifest.architecture.get('model_type')}, {manifest.architecture.get('layers')} layers"),
        ("parameters", f"{summary.parameters:,} ({_short_count(summary.parameters)})"),
        ("quantization", schemes + before + (f"; not quantized for their shape: {len(kept)} weights" if kept else "")),
        ("source", " ".join(str(source[key]) for key in ("kind", "name", "revision") if source.get(key))),
        ("size", _size(summary)),
        ("per pass", f"{format_size(summary.tape_nbytes)} streamed when nothing is resident (S)"),
        (
            "KV cache",
            f"{format_size(inspection.model.kv_token_nbytes)} per token in {inspection.model.dtype}",
        ),
    ]
    if inspection.is_mixture:
        rows.insert(-1, ("experts", _experts(inspection.model)))
    if (state := inspection.model.state) is not None:
        rows.append(("state", f"{format_size(state.nbytes)} per sequence, whatever its length"))
    if manifest.synthetic:
        distinct = manifest.distinct_blocks
        layers = "" if distinct is None else f"; {distinct} distinct layer files stand for all layers"
        rows.insert(1, ("synthetic", f"yes: random weights, for benchmarks only{layers}"))
    return columns(rows, "<<")


def _experts(model: ModelShape) -> str:
    experts = model.experts
    if experts is None:
        return "not taken apart: layers stream whole"
    layers = f"{experts.count} of {format_size(experts.file_nbytes)} in each of {experts.layers} layers"
    read = sum(experts.dense.file_nbytes) + experts.layers * experts.chosen * experts.file_nbytes
    return f"{layers}, {experts.chosen} for a token: {format_size(read)} per pass of one, if read on demand"


def _size(summary: StoreSummary) -> str:
    text = f"{format_size(summary.model_nbytes)}, {summary.bits_per_weight:.2f} bits per weight"
    if summary.disk_nbytes != summary.model_nbytes:
        text += f"; {format_size(summary.disk_nbytes)} on disk, where repeated layers are stored once"
    return text


def _blocks(summary: StoreSummary) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("block", "count", "file", "units", "largest unit", "weights each", "bits/weight", "stored as")
    ]
    rows += [_block_row(row) for row in summary.rows]
    return columns(rows, "<>>>>>><")


def _block_row(row: BlockRow) -> tuple[str, ...]:
    name = row.first if row.count == 1 else f"{row.first} … {row.last}"
    if row.shared:
        return name, "1 x", "shared", "", "", f"{row.weights:,}", "", "the embedding's file, streamed again"
    formats = " + ".join(name for name, _ in row.formats)
    size = format_size(row.smallest_nbytes)
    if format_size(row.largest_nbytes) != size:
        size += f" to {format_size(row.largest_nbytes)}"
    experts = f"{row.experts} experts of {format_size(row.expert_nbytes)} + " if row.experts else ""
    units = f"{experts}{row.units - row.experts}", format_size(row.largest_unit_nbytes)
    return name, f"{row.count} x", size, *units, f"{row.weights:,}", f"{row.bits_per_weight:.2f}", formats


def _budgets(inspection: Inspection) -> Iterator[str]:
    work, device = inspection.workload, inspection.smallest.device
    prompts = "one prompt" if work.sequences == 1 else f"{work.sequences} prompts"
    yield f"what fits in which budget (estimates, for {prompts} of {work.max_context} tokens with completion)"
    rows = [_header(inspection), *(_fit_row(fit, inspection) for fit in inspection.fits)]
    if inspection.model.experts is not None:
        ways = (_way(fit, inspection.model.experts.total) for fit in inspection.fits)
        rows = [[*row, way] for row, way in zip(rows, ("experts", *ways), strict=True)]
    yield from columns(rows, ">" * len(rows[0]), indent="  ")
    if any(fit.plan.experts is not None for fit in inspection.fits):
        yield "experts are counted as if all were chosen equally often; routers that prefer some read less of them"
    needs = inspection.smallest.needs
    state = f"{format_size(needs.state)} for recurrent states, " if needs.state else ""
    state += f"{format_size(needs.waiting)} for what waits for the GPU, " if needs.waiting else ""
    yield (
        f"of the smallest, {format_size(needs.baseline)} are for the process itself (measured here), "
        f"{needs.outer_text}, {format_size(needs.kv)} for the KV cache, "
        f"{state}{format_size(needs.workspace)} for activations"
    )
    if device is not None:
        on_gpu = device.needs
        state = f"{format_size(on_gpu.state)} for recurrent states, " if on_gpu.state else ""
        yield (
            f"of --vram {_budget(device.vram)}, {format_size(on_gpu.context)} are for driver and libraries (assumed), "
            f"{format_size(on_gpu.outer)} for tables, {format_size(on_gpu.kv)} for the KV cache, "
            f"{state}{format_size(on_gpu.workspace)} for activations, {format_size(device.placement.ring_nbytes)} for "
            "weights that pass through"
        )
    if inspection.disk_bandwidth is not None or inspection.bus_bandwidth is not None:
        others = ", or copies to the GPU" if device is not None else ""
        yield f"a pass takes at least what the disk takes{others}; computing may take longer"
    yield f"the default here and now is --ram {format_budget(inspection.default_budget)}"


def _header(inspection: Inspection) -> list[str]:
    disk, bus = inspection.disk_bandwidth, inspection.bus_bandwidth
    has_device = inspection.smallest.device is not None
    header = ["--ram", *(["on GPU"] if has_device else []), "resident", "share", "read per pass"]
    header += [f"disk at {format_rate(disk)}"] if disk is not None else []
    header += [inspection.copied] if has_device else []
    return header + ([f"bus at {format_rate(bus)}"] if has_device and bus is not None else [])


def _fit_row(fit: Fit, inspection: Inspection) -> list[str]:
    disk, bus = inspection.disk_bandwidth, inspection.bus_bandwidth
    has_device = fit.plan.device is not None
    row = [_budget(fit.plan.budget), *([format_size(fit.device_nbytes)] if has_device else [])]
    row += [format_size(fit.resident_nbytes - fit.device_nbytes), f"{fit.resident_share:.0%}"]
    row += _moved(fit.read_nbytes, None if disk is None else fit.disk_seconds(disk))
    return row + (_moved(fit.bus_nbytes, None if bus is None else fit.bus_seconds(bus)) if has_device else [])


def _moved(nbytes: int, seconds: float | None) -> list[str]:
    """Bytes per pass, and the seconds they take if the rate is known."""
    moved = [format_size(nbytes) if nbytes else "nothing"]
    return moved if seconds is None else [*moved, format_seconds(seconds) if nbytes else "-"]


def _way(fit: Fit, experts: int) -> str:
    """How experts come."""
    cache = fit.plan.experts
    return "with their layers" if cache is None else f"on demand, {cache.slots} of {experts} in memory"


def _budget(nbytes: int) -> str:
    gib = nbytes >> 30
    return f"{gib}GiB" if gib << 30 == nbytes else format_budget(nbytes)


def _short_count(count: int) -> str:
    for divisor, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= divisor:
            return f"{count / divisor:.3g} {suffix}"
    return str(count)
