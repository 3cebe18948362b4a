"""What is measured around a run: the process, the raw disk after it, the kernel's own counters; and before it what is
known of the machine: its profile, or quick rates."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch

from tiered.arch import load_config
from tiered.bench import RawBandwidth, measure_raw
from tiered.bench.gpu import measure_bus
from tiered.bench.quick import quick_hardware
from tiered.cli.screen import StatusLine
from tiered.errors import ConfigError
from tiered.generate import DeviceFigures, Figures, Surroundings
from tiered.host import Host
from tiered.io import ReadMode
from tiered.kernels import load_library
from tiered.opening import FindHardware
from tiered.options import Options, compute_dtype
from tiered.plan import (
    Budgets,
    ModelShape,
    Workload,
    available_budget,
    cpu_count,
    process_peak_rss_bytes,
    process_rss_bytes,
)
from tiered.plan.budget import DEFAULT_SHARE
from tiered.plan.hardware import GpuRates, Hardware
from tiered.plan.machines import find_profile
from tiered.plan.on_device import CONTEXT_NBYTES
from tiered.plan.phases import PhaseChoice, choose_phases
from tiered.plan.predict import Prediction, can_predict, predict
from tiered.plan.shapes import read_store_shape
from tiered.plan.strategies import BASELINE_NBYTES, machine_for
from tiered.prepare import device_budgets, host_budgets, unmeasured_machine
from tiered.runtime import Runtime
from tiered.shapes import store_shape
from tiered.store import Store
from tiered.units import format_seconds

_LOG: Final = logging.getLogger(__name__)
_FIRST: Final = ("cuda", "cuda:0")
"""What the device is called whose rates a profile has."""


@dataclass(frozen=True)
class Counters:
    """The kernel's figures for this process, in bytes; None where it keeps none."""

    read: int | None
    written: int | None

    @classmethod
    def now(cls) -> "Counters":
        try:
            lines = Path("/proc/self/io").read_text().splitlines()
        except OSError:
            return cls(None, None)
        values = {key: int(value) for key, value in (line.split(": ") for line in lines)}
        return cls(values["read_bytes"], values["write_bytes"])

    def since(self, before: "Counters") -> "Counters":
        """What has been added."""
        read = None if self.read is None or before.read is None else self.read - before.read
        written = None if self.written is None or before.written is None else self.written - before.written
        return Counters(read, written)


@dataclass
class Measured:
    """What was found out around a run."""

    raw: list[RawBandwidth] = field(default_factory=list)
    """Measured twice, after the run; empty where nothing streams or nobody asked."""
    counters: Counters = field(default_factory=lambda: Counters(None, None))
    raw_bus: float | None = None
    """Bytes per second of plain copies to the device; None without one, and where nothing is copied in every pass."""

    def surroundings(self, runtime: Runtime, disk_wait_seconds: float) -> Surroundings:
        """All that a report needs to know besides the run's own figures."""
        store, plan = runtime.store, runtime.plan
        figures = Figures(
            raw_disk_bandwidth=max((raw.bytes_per_second for raw in self.raw), default=None),
            raw_disk_best_look=max((raw.best_look for raw in self.raw), default=None),
            bytes_read=runtime.bytes_read,
            bytes_read_kernel=self.counters.read,
            bytes_written=self.counters.written,
            kv_bytes_read=runtime.kv_bytes_read,
            kv_bytes_written=runtime.kv_bytes_written,
            kv_bits=plan.cache.bits,
            kv_on_disk=plan.cache.on_disk,
            disk_wait_seconds=disk_wait_seconds,
            peak_rss_bytes=process_peak_rss_bytes(),
            ram_budget_bytes=plan.budget,
            tape_bytes=plan.tape.file_total,
            resident_bytes=plan.placement.resident_nbytes,
            missing_overlap_bytes=plan.missing_overlap_nbytes,
            holds_less=plan.holds_less,
            read_mode=runtime.reader.mode.value if runtime.reader.mode is not None else "nothing read",
            kernels=runtime.host.kernels.description,
            synthetic=store.manifest.synthetic,
            device=self._device(runtime),
            fallback=runtime.host.device_refusal,
        )
        return Surroundings(plan, plan.read_nbytes, figures, sum(map(len, store.expert_units)))

    def _device(self, runtime: Runtime) -> DeviceFigures | None:
        computer, plan = runtime.host.computer, runtime.plan
        if computer is None or plan.device is None:
            return None
        return DeviceFigures(
            name=computer.device.name,
            description=computer.device.description,
            kernels=computer.kernels.description,
            prefill_device=plan.prefill_device,
            decode_device=plan.decode_device,
            vram_budget_bytes=plan.device.vram,
            vram_peak_bytes=computer.device.peak_nbytes,
            resident_bytes=plan.device.placement.resident_nbytes,
            kv_on_device=plan.cache.on_device,
            vram_decode_bytes=runtime.rested_nbytes,
            waiting_tokens=0 if plan.device.waiting is None else plan.device.waiting.tokens,
            emulated_bytes=plan.device.vram if computer.device.where.type == "cpu" else 0,
            raw_bus_bandwidth=self.raw_bus,
            unregistered=computer.device.unregistered,
        )


@contextmanager
def measured(runtime: Runtime, status: StatusLine, measure: bool) -> Iterator[Measured]:
    """Around a run: counts bytes, and measures the raw disk after it if `measure` and something streams: nobody waits
    for that before there is a text."""
    found, plan = Measured(), runtime.plan
    measures_bus = measure and plan.device is not None and plan.bus_nbytes > 0
    measure = measure and (bool(plan.streamed_nbytes) or plan.experts is not None or runtime.on_disk)
    if measure and not _is_one_disk(runtime):
        # A bound made of two disks' bytes over one disk's bandwidth would say nothing.
        _LOG.warning("--kv-dir is on another disk than the store: the report has no bandwidth and no bound")
        measure = False
    before = Counters.now()
    status.say(f"reading {runtime.store.name}")
    yield found
    found.counters = Counters.now().since(before)
    runtime.stop_streaming()
    if measures_bus:
        status.say("measuring the bus")
        found.raw_bus = _raw_bus_bandwidth(runtime)
    if measure:
        status.say("measuring the disk")
        found.raw += [_raw_bandwidth(runtime) for _ in range(2)]


def predicted(runtime: Runtime, workload: Workload | None = None) -> Prediction | None:
    """What the run is expected to take, by the rates that its plan was made by; None where they were not known. What an
    emulated device takes nobody knows. `workload`: what is run, where that is not what the runtime was planned for."""
    computer = runtime.host.computer
    if computer is not None and computer.device.where.type == "cpu":
        return None
    if not can_predict(runtime.machine, runtime.gpu, computer is not None):
        return None
    return predict(runtime.plan, runtime.shape, runtime.machine, workload or runtime.workload, runtime.gpu)


def hardware_of(
    store: Store, options: Options, say: Callable[[str], object] | None, status: StatusLine | None = None
) -> FindHardware:
    """What finds this machine's rates for runs of `store`: its profile, or quick rates, where a choice wants some.
    `say` is told of these, with `status` beside while they are measured."""

    def found(host: Host, model: ModelShape, is_wanted: bool) -> Hardware | None:
        # A profile's rates are of the best kernels, in 16 bits.
        is_usual = options.kernels == "auto" and options.dtype != "float32"
        profile = _profile(store, host.threads, options.device_name) if is_usual else None
        try:
            if profile is not None:
                machine_for(model, profile, options.kernel_mode.value)
                return profile
        except ConfigError as error:
            _LOG.info("no rates of this model: %s", error)
        if not is_wanted:
            return None
        if status is not None:
            status.say("measuring disk and processor")
        began = time.monotonic()
        quick = quick_hardware(store.path, (model,), True, host.kernels)
        if say is not None:
            took = format_seconds(time.monotonic() - began)
            say(f"rates     measured in {took}, rough: no profile of this machine fits this run, see 'tiered profile'")
        return quick

    return found


def _profile(store: Store, threads: int, device: str | None) -> Hardware | None:
    """This machine's profile for the store's disk, if it is one of so many threads, with the rates of its GPU only if
    that is the `device` that is called so: the first CUDA device, or, if the profile's is called so, the emulated."""
    try:
        found = find_profile(store.path)
    except ConfigError as error:
        _LOG.info("no profile: %s", error)
        return None
    if found is None or found.cpu.cores != threads:
        return None
    is_there = found.gpu is not None and device in (("emulated",) if found.gpu.name == "emulated" else _FIRST)
    return found if is_there else replace(found, gpu=None)


def with_chosen_phases(
    options: Options, store: Store, workload: Callable[[], Workload], say: Callable[[str], object] | None
) -> Options:
    """`options` with what "auto" stands for in a run of `workload`, which is asked for, and told to `say`, only where
    there is a choice."""
    choice = _chosen_phases(options, store, workload)
    if choice is None:
        return options
    if say is not None:
        say(f"phases    {choice.why}")
    return options.with_phases(choice.computes)


def _chosen_phases(options: Options, store: Store, workload: Callable[[], Workload]) -> PhaseChoice | None:
    """What "auto" stands for in `options`, where there is a choice and this machine's profile tells what each takes:
    for the first CUDA device, or, if that is what it calls its GPU, for the emulated one. None: the GPU, if a tier."""
    if len(choices := options.phase_choices) < 2:
        return None
    try:
        profile = _profile(store, options.threads or cpu_count(), options.device_name)
        if profile is None or profile.gpu is None:
            return None
        dtype = compute_dtype(options.dtype, load_config(store.path), on_device=True)
        shape = (read_store_shape(store.path) or store_shape(store.path)).in_dtype(str(dtype).removeprefix("torch."))
        budgets = {each: _budgets(options.with_phases(each), profile.gpu) for each in choices}
        is_native = options.kernels != "torch" and not isinstance(load_library(), str)
        process = unmeasured_machine(options.threads or cpu_count(), is_native)
        machine = machine_for(shape, profile, options.kernel_mode.value).with_memory_of(process)
        return choose_phases(budgets, shape, machine, workload(), profile.gpu)
    except ConfigError as error:
        _LOG.info("no choice by prediction: %s", error)
        return None


def _budgets(options: Options, gpu: GpuRates) -> Budgets:
    """About what a run would have, whose process nobody has measured yet."""
    baseline = max(BASELINE_NBYTES, process_rss_bytes())
    budgets = host_budgets(options, options.ram or available_budget(), baseline)
    if not options.has_device:
        return budgets
    vram = options.vram or int(gpu.vram * DEFAULT_SHARE)
    return device_budgets(budgets, options, vram, 0 if options.device_name == "emulated" else CONTEXT_NBYTES)


def _is_one_disk(runtime: Runtime) -> bool:
    """Whether weights and KV cache, if on disk, are on the same one."""
    folder = runtime.options.kv_folder
    return not runtime.on_disk or folder is None or folder.stat().st_dev == runtime.store.path.stat().st_dev


def _raw_bus_bandwidth(runtime: Runtime) -> float:
    """The bandwidth of the bus, by copies as large as the ring of slots, whose place on the device is free then."""
    assert runtime.plan.device is not None and runtime.host.computer is not None
    memory = torch.frombuffer(runtime.scratch_memory(), dtype=torch.uint8)
    nbytes = min(len(memory), runtime.plan.device.placement.ring_nbytes)
    return measure_bus(runtime.host.computer.device, memory, nbytes)


def _raw_bandwidth(runtime: Runtime) -> RawBandwidth:
    """The bandwidth of the files that are streamed, or of all files where only the KV cache is on disk."""
    files = runtime.streamed_files or [runtime.store.file_path(block) for block in runtime.store.tape]
    direct = runtime.probe_read_mode() is ReadMode.DIRECT
    return measure_raw(files, runtime.scratch_memory(), direct)
