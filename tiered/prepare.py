"""What a runtime is made from, before any weight is in memory: the graph at each seat, shapes, the machine, budgets.

In: a store, options, a host. Out: what computes, and the numbers that its plan is made from. Called by the runtime, and
by commands that plan without running.
"""

import contextlib
import functools
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from tiered.arch import build_skeleton, load_config
from tiered.device import Device
from tiered.host import PROCESS, DeviceComputer, Host, Member
from tiered.kernels import device_dtype, device_scratch_nbytes, scratch_nbytes
from tiered.model import Seat, Seats, check_layers, check_match, model_shape
from tiered.options import Options, compute_dtype
from tiered.plan import Budgets, Machine, ModelShape, process_rss_bytes
from tiered.plan.shapes import read_store_shape, write_store_shape
from tiered.process import interrupts_later
from tiered.store import Store


@dataclass(frozen=True, eq=False)
class Prepared:
    """What computes, before any weight is in memory."""

    dtype: torch.dtype
    seats: Seats
    shape: ModelShape
    machine: Machine


def unmeasured_machine(threads: int, native_steps: bool) -> Machine:
    """What kernels take in a process with so many threads, which know no rates; `native_steps`: by the library."""
    return Machine(scratch_nbytes(threads), native_steps=native_steps, device_scratch_nbytes=device_scratch_nbytes())


def prepare(store: Store, options: Options, host: Host) -> Prepared:
    """Build what computes, with the numbers that plans are made from. Raises StoreError, ConfigError."""
    config = load_config(store.path)
    # Before a graph is built, which sets the configuration's own.
    computer, default = host.computer, compute_dtype("auto", config)
    dtype = there = compute_dtype(options.dtype, config, computer is not None)
    if computer is not None:
        there = _dtype_of(computer.device, options, config)
    if "cpu" not in options.computes:
        dtype = there
    check_layers(store, config)
    skeleton = build_skeleton(config, there)
    check_match(store, skeleton)
    known = read_store_shape(store.path)
    shape = model_shape(store, skeleton, dtype, known)
    if known is None and dtype == there == default:
        # Counting the graph takes up to a second or two, which the next opening is spared.
        with contextlib.suppress(OSError):
            write_store_shape(store.path, shape)
    # Also without a device: plans may be asked for one that is elsewhere.
    machine = unmeasured_machine(host.threads, host.kernels.recurrent is not None)
    if computer is None:
        seats = [Seat.take(skeleton, dtype, host.kernels, host.attention)]
    else:
        seats = [Seat.take(skeleton, there, computer.kernels, computer.attention, computer.device)]
        if "cpu" in options.computes:
            # A configuration of its own: it says which attention its model computes with.
            beside = build_skeleton(load_config(store.path), dtype)
            seats.append(Seat.take(beside, dtype, host.kernels, host.attention))
    host.warm_up(dtype)
    if computer is not None and not host.promised_nbytes:
        # What libraries take of the device's memory in the thread that computes is part of its context.
        host.compute(functools.partial(computer.device.warm_up, there))
    return Prepared(dtype, Seats(seats[0], seats[-1]), shape, machine)


def _dtype_of(device: Device, options: Options, config: PretrainedConfig) -> torch.dtype:
    """What a device computes in."""
    wanted = compute_dtype(options.dtype, config, on_device=True)
    return device_dtype(device.capability, wanted) if options.dtype == "auto" else wanted


@dataclass(frozen=True)
class DeviceArithmetic:
    """What the results of a device depend on, besides the device."""

    dtype: torch.dtype
    kernels: str
    """"triton" or "torch"."""


def device_arithmetic(computer: DeviceComputer, options: Options, config: PretrainedConfig) -> DeviceArithmetic:
    """How the device of a host computes."""
    return DeviceArithmetic(_dtype_of(computer.device, options, config), computer.kernels.kind)


def usable(options: Options, host: Host) -> Options:
    """The options that a runtime comes to on `host`, which is open: without the device where it cannot be used."""
    return options if host.device_refusal is None else options.without_device()


def host_for(options: Options) -> Host:
    """The host that `options` ask for."""
    falls_back = options.fallback is not None
    common = options.threads, options.kernels, options.kernel_mode, options.keep_spans
    return Host(*common, options.device_name, options.vram, falls_back)


def budgets_of(options: Options, member: Member, before: int, host: Host) -> Budgets:
    """What may be used, and what the process takes of it by itself. `before`: its bytes before `prepare`."""
    baseline = PROCESS.measure_baseline(member, before, options.ram)
    budgets = host_budgets(options, member.budget, baseline)
    if host.computer is None:
        return budgets
    device = host.computer.device
    vram = max(1, device.vram_nbytes - host.promised_nbytes)
    return device_budgets(budgets, options, vram, device.context_nbytes, device.name)


def host_budgets(options: Options, ram: int, baseline: int) -> Budgets:
    """What may be used of the host, of whose `ram` bytes the process takes `baseline` itself."""
    return Budgets(
        ram,
        baseline,
        options.tiers,
        options.kv,
        kv_bits=16 if options.kv_bits == "auto" else options.kv_bits,
        choose_kv_bits=options.kv_bits == "auto",
        micro_batch=options.micro_batch_rows,
        resident_cpu=options.resident_cpu,
    )


def device_budgets(budgets: Budgets, options: Options, vram: int, context_nbytes: int, device: str = "") -> Budgets:
    """`budgets` with those of a device, called `device`: `vram` bytes of its memory, of which it takes
    `context_nbytes` itself. It need not be there."""
    prefill, decode = options.computes
    return replace(
        budgets,
        tiers=options.tiers,
        kv=options.kv,
        vram=vram,
        context_nbytes=context_nbytes,
        device=device,
        resident_gpu=options.resident_gpu,
        prefill_device=prefill,
        decode_device=decode,
    )


def measure_inputs(store: Store, options: Options) -> tuple[ModelShape, Machine, Budgets]:
    """What plans for `store` are made from, by this process as it is now.

    Builds what a runtime builds first, measures, and releases it. Takes no memory for weights and reads none.
    """
    with PROCESS.opening, interrupts_later() as held, PROCESS.member() as member:
        before = process_rss_bytes()
        with host_for(replace(options, keep_spans=False)) as host, held.let_come():
            options = usable(options, host)
            made = prepare(store, options, host)
            return made.shape, made.machine, budgets_of(options, member, before, host)
