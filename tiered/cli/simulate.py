"""`tiered simulate`: plays a plan through in numbers, and shows what waits for what, without any weights.

In: what was typed. Out: a summary or JSON, a timeline as a picture, a trace for Perfetto. `plan/simulate.py` computes;
models and machines are found as `tiered plan` finds them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from tiered.bench.plot import check_can_draw
from tiered.cli import timeline
from tiered.cli.lines import print_json
from tiered.cli.plan import Model, check_positions, find_model, hardware_for, ram_budget, vram_limit, wrapped
from tiered.cli.writable import check_writable
from tiered.errors import ConfigError
from tiered.plan.hardware import GpuRates, Hardware
from tiered.plan.inputs import (
    MAX_BATCHED_TOKENS,
    Budgets,
    Computes,
    KVTier,
    ModelShape,
    Objective,
    Tier,
    Workload,
    check_decodes_on_processor,
    parse_tiers,
    tiers_text,
)
from tiered.plan.kv import BITS_BY_NAME
from tiered.plan.lanes import Event
from tiered.plan.make import make_plan
from tiered.plan.on_device import CONTEXT_NBYTES, DevicePlan
from tiered.plan.plan import Plan
from tiered.plan.play import SimulatedPass
from tiered.plan.play_seat import Device
from tiered.plan.simulate import Simulation, simulate
from tiered.plan.strategies import BASELINE_NBYTES, GPU_TIERS, machine_for
from tiered.trace import Tracer
from tiered.units import format_seconds, format_size

_WORDS = {
    "resident": "what is to stay",
    "layer": "streamed layers",
    "head": "the head",
    "experts": "experts",
    "kv": "the KV cache",
    "hidden": "hidden states",
    "gpu": "the GPU",
}
_BOUNDS = {"disk": "the disk", "bus": "the bus to the GPU", "gpu": "the GPU", "compute": "computing"}


@dataclass(frozen=True)
class Played:
    """Everything the command shows."""

    model: Model
    quant: str
    hardware: Hardware
    workload: Workload
    plan: Plan
    found: Simulation

    @property
    def steady(self) -> "Mean":
        return Mean(self.found.steady)

    @property
    def prefill(self) -> tuple[SimulatedPass, ...]:
        return tuple(each for each in self.found.passes if each.load.prompt_tokens)

    def to_json(self) -> dict[str, Any]:
        """Seconds and bytes."""
        plan, steady = self.plan, self.steady
        return {
            "model": self.model.name,
            "quantization": self.quant,
            "hardware": {"name": self.hardware.name, "source": self.hardware.source},
            "plan": {
                "budget_bytes": plan.budget,
                "resident_bytes": plan.placement.resident_nbytes,
                "ring_bytes": plan.placement.ring_nbytes,
                "read_bytes_per_pass": plan.read_nbytes,
                "experts_in_memory": None if plan.experts is None else plan.experts.slots,
                "batch_size": plan.batch_size,
                "micro_batch": plan.micro_batch_rows,
                "kv_on_disk": plan.cache.on_disk,
                "device": None if plan.device is None else self._device_json(plan.device),
            },
            "passes": [_pass_json(each) for each in self.found.passes],
            "seconds_per_pass": steady.seconds,
            "tokens_per_second": steady.tokens / steady.seconds,
            "disk_busy_share": steady.disk_seconds / steady.seconds,
            "bus_busy_share": steady.bus_seconds / steady.seconds,
            "gpu_busy_share": steady.gpu_seconds / steady.seconds,
            "compute_busy_share": steady.compute_seconds / steady.seconds,
            "bound_seconds_per_pass": steady.bound,
            "bottleneck": steady.bottleneck,
        }

    def _device_json(self, device: DevicePlan) -> dict[str, Any]:
        placement, on_device = device.placement, self.plan.cache.on_device
        return {
            "vram_bytes": device.vram,
            "resident_bytes": placement.resident_nbytes,
            "ring_bytes": placement.ring_nbytes,
            "copied_bytes_per_pass": self.plan.decode_bus_nbytes,
            "kv_on_device": on_device,
            "computes": {"prompts": self.plan.prefill_device, "rest": self.plan.decode_device},
        }


@dataclass(frozen=True)
class Mean:
    """Passes on average."""

    passes: Sequence[SimulatedPass]

    def _mean(self, values: Iterator[float]) -> float:
        return sum(values) / len(self.passes)

    @property
    def seconds(self) -> float:
        return self._mean(each.seconds for each in self.passes)

    @property
    def compute_seconds(self) -> float:
        return self._mean(each.compute_seconds for each in self.passes)

    @property
    def gpu_seconds(self) -> float:
        return self._mean(each.gpu_seconds for each in self.passes)

    @property
    def disk_seconds(self) -> float:
        return self._mean(each.disk_seconds for each in self.passes)

    @property
    def bus_seconds(self) -> float:
        return self._mean(each.bus_seconds for each in self.passes)

    @property
    def tokens(self) -> float:
        """Tokens that a pass gives."""
        return self._mean(each.load.logits for each in self.passes)

    @property
    def waits(self) -> dict[str, float]:
        """Seconds that computing waits, by what for."""
        found: dict[str, float] = {}
        for each in self.passes:
            for kind, seconds in each.waits:
                found[kind] = found.get(kind, 0.0) + seconds / len(self.passes)
        return found

    @property
    def bound(self) -> float:
        """Seconds that the busiest of disk, bus and what computes takes."""
        return max(self._busy.values())

    @property
    def above_bound(self) -> float:
        """By which share of it passes take longer; not below 0, as sums are rounded."""
        return max(0.0, self.seconds / self.bound - 1)

    @property
    def bottleneck(self) -> str:
        return max(self._busy, key=self._busy.__getitem__)

    @property
    def _busy(self) -> dict[str, float]:
        seconds = {"compute": self.compute_seconds, "gpu": self.gpu_seconds}
        return seconds | {"disk": self.disk_seconds, "bus": self.bus_seconds}


def run(
    model: str,
    hardware: str | None,
    ram: str | None,
    quant: str,
    prompt_len: int,
    gen_len: int,
    batch: int,
    micro_batch: int | None,
    objective: Objective,
    kv: KVTier,
    kv_bits: str,
    tiers: str,
    vram: str | None,
    decode_device: Computes | None,
    passes: int | None,
    trace_path: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Simulate `model` on a machine. Raises ConfigError, StoreError, BudgetError."""
    has_gpu = Tier.GPU in (places := parse_tiers(tiers))
    if vram is not None and not has_gpu:
        raise ConfigError(
            f"--vram {vram} is for a GPU, and --tiers {tiers} has none; add --tiers {tiers_text(GPU_TIERS)}"
        )
    if decode_device == "gpu" and not has_gpu:
        raise ConfigError(f"--decode-device gpu: --tiers {tiers} has none; add --tiers {tiers_text(GPU_TIERS)}")
    if decode_device == "cpu":
        check_decodes_on_processor(places)
    if plot is not None:
        check_can_draw("--plot", plot)
    for option, path in (("--plot", plot), ("--trace", trace_path)):
        if path is not None:
            check_writable(option, path)
    found = find_model(model)
    check_positions(found, prompt_len, gen_len)
    name, shape = _shape(found, quant)
    machine = hardware_for(found, hardware)
    work = Workload(
        batch,
        prompt_len + gen_len,
        prompt_len,
        max_batched_tokens=MAX_BATCHED_TOKENS,
        objective=objective,
        is_whole=True,
    )
    budget = ram_budget(ram, machine, is_here=hardware is None)
    bits = BITS_BY_NAME[kv_bits]
    budgets = Budgets(budget, BASELINE_NBYTES, tiers=places, kv=kv, kv_bits=bits, micro_batch=micro_batch)
    gpu = _gpu(machine, tiers) if has_gpu else None
    if gpu is not None:
        limit = vram_limit(vram, machine)
        decodes = decode_device or "gpu"
        budgets = replace(budgets, vram=limit, context_nbytes=CONTEXT_NBYTES, decode_device=decodes)
    rates = machine_for(shape, machine)
    plan = make_plan(shape, rates, work, budgets, gpu)
    device = None if gpu is None else Device.of(plan, gpu)
    played = Played(found, name, machine, work, plan, simulate(plan, shape, rates, work, passes, device))
    if trace_path is not None:
        _trace(played.found.events).write(trace_path)
    if plot is not None:
        timeline.draw(played.found, f"{found.name} {name} on {machine.name}, {format_size(budget)} of RAM", plot)
    if as_json:
        print_json(played.to_json())
    else:
        for line in _lines(played):
            click.echo(line)


def _gpu(machine: Hardware, tiers: str) -> GpuRates:
    """The GPU of `machine`; raises ConfigError where it has none."""
    if machine.gpu is None:
        raise ConfigError(f"--tiers {tiers}: {machine.name} has no GPU; drop it, or name another --hardware")
    return machine.gpu


def _shape(model: Model, quant: str) -> tuple[str, ModelShape]:
    """The shape to simulate: a store's own, else that of a conversion with `quant`."""
    if len(model.shapes) == 1:
        return next(iter(model.shapes.items()))
    return quant, model.shapes[quant]


def _trace(events: Sequence[Event]) -> Tracer:
    """The events as spans of a run."""
    tracer = Tracer(keep_spans=True)
    for event in events:
        tracer.record(event.lane, event.name, event.start, event.seconds, event.nbytes)
    return tracer


def _pass_json(each: SimulatedPass) -> dict[str, Any]:
    return {
        "prompt_tokens": each.load.prompt_tokens,
        "decoding": each.load.decoding,
        "seconds": each.seconds,
        "compute_seconds": each.compute_seconds,
        "gpu_seconds": each.gpu_seconds,
        "disk_seconds": each.disk_seconds,
        "disk_bytes": each.disk_nbytes,
        "bus_seconds": each.bus_seconds,
        "waits": dict(each.waits),
    }


def _lines(played: Played) -> Iterator[str]:
    """The simulation as people read it."""
    plan, work, steady = played.plan, played.workload, played.steady
    sequences = "1 sequence" if work.sequences == 1 else f"{work.sequences} sequences"
    tokens = f"{work.max_prompt} + {work.max_context - work.max_prompt} tokens"
    yield f"{played.model.name} {played.quant}: {sequences} of {tokens}, in {format_size(plan.budget)} of RAM"
    yield from wrapped("machine", f"{played.hardware.name}, {played.hardware.source}")
    placement, experts = plan.placement, plan.experts
    if played.hardware.gpu is not None and plan.device is None:
        yield "          its GPU is idle: what is played is a plan of the processor's"
    kept = "" if experts is None else f", experts on demand ({experts.slots} in memory)"
    total = format_size(plan.tape.total)
    place = "on disk" if plan.cache.on_disk else "on the GPU" if plan.cache.on_device else "in memory"
    yield (
        f"plan      {format_size(placement.resident_nbytes)} of {total} resident, ring "
        f"{format_size(placement.ring_nbytes)}{kept}, KV cache {place}"
    )
    if plan.device is not None:
        held, ring = plan.device.placement.resident_nbytes, plan.device.placement.ring_nbytes
        until = ", given back when no prompt waits" if plan.decode_device == "cpu" else ""
        there = f"{format_size(held)} resident, ring {format_size(ring)}{until}"
        yield f"          on the GPU {there}; not tried on a GPU yet"
        if plan.decode_device == "cpu":
            yield "          prompts on the GPU, all else on the processor"
    if plan.missing_overlap_nbytes:
        yield f"          the ring lacks {format_size(plan.missing_overlap_nbytes)}: reading and computing take turns"
    if played.prefill:
        yield _prefill_line(played.prefill)
    if not steady.passes[0].load.prompt_tokens:
        rate, count = steady.tokens / steady.seconds, len(steady.passes)
        decoding, most = steady.passes[0].load.decoding, min(plan.batch_size, work.sequences)
        those = "" if decoding == most else f" with {decoding} of {most} sequences"
        yield f"decode    {rate:.3g} tokens/s, {format_seconds(steady.seconds)} per pass, of {count} simulated{those}"
    disk, compute = steady.disk_seconds / steady.seconds, steady.compute_seconds / steady.seconds
    there = ""
    if plan.decode_device == "gpu":
        there = f"bus {steady.bus_seconds / steady.seconds:.0%}, GPU {steady.gpu_seconds / steady.seconds:.0%}, "
    of = "the processor" if plan.device is not None else "computing"
    yield f"busy      disk {disk:.0%}, {there}{of} {compute:.0%}"
    waits = [f"{format_seconds(seconds)} for {_WORDS[kind]}" for kind, seconds in steady.waits.items() if seconds]
    yield f"waits     per pass: computing {', '.join(waits) or 'for nothing'}; the disk {_idle(played)}"
    yield (
        f"bound     {format_seconds(steady.bound)} per pass by {_BOUNDS[steady.bottleneck]}; the simulation is "
        f"{steady.above_bound:.1%} above it"
    )


def _idle(played: Played) -> str:
    """What the disk waits for in a pass, and how long."""
    seconds = format_seconds(max(0.0, played.steady.seconds - played.steady.disk_seconds))
    if played.plan.read_nbytes and all(each.load.is_last for each in played.found.steady):
        return f"has nothing to read for {seconds}"  # no pass comes for which it could read ahead
    if played.plan.read_nbytes:
        return f"{seconds} for memory"
    return f"has nothing to read for {seconds}" if played.plan.experts is None else f"{seconds} for choices of experts"


def _prefill_line(passes: Sequence[SimulatedPass]) -> str:
    seconds, mean = sum(each.seconds for each in passes), Mean(passes)
    count = "a pass" if len(passes) == 1 else f"{len(passes)} passes"
    tokens = sum(each.load.prompt_tokens for each in passes)
    busy = f"disk busy {mean.disk_seconds / mean.seconds:.0%}, computing {mean.compute_seconds / mean.seconds:.0%}"
    if mean.gpu_seconds:
        busy += f", bus {mean.bus_seconds / mean.seconds:.0%}, GPU {mean.gpu_seconds / mean.seconds:.0%}"
    return f"prefill   {tokens} tokens in {format_seconds(seconds)}, {count}; {busy}"
