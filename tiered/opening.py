"""What a runtime opens, in order: the graph, the plan, its memory, the reader, the engine; and the streams over them.

In: a store and what is wanted of it, on a host that is open. Out: `Parts`, which `runtime.py` uses, and which the stack
that it brings closes.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch

from tiered.device import Device
from tiered.errors import BudgetError, shortened
from tiered.host import PROCESS, Host, Member
from tiered.io import ChunkVerifier, DiskReader, Faults
from tiered.memory import Memory, open_memory
from tiered.model import Engine, load_tables
from tiered.options import Options
from tiered.plan import Machine, ModelShape, Plan, Workload, make_plan, pace_for, process_rss_bytes, wants_rates
from tiered.plan.hardware import GpuRates, Hardware
from tiered.plan.pace import Pace, calibration_of
from tiered.plan.strategies import machine_for
from tiered.prepare import Prepared, budgets_of, prepare, usable
from tiered.process import Held
from tiered.store import Store
from tiered.stream import EmbeddingRows, Fork, KVStream, Streamer, Streams

READ_THREADS: Final = 8
"""Reads of weights in flight at most."""
ROW_THREADS: Final = 32
"""Rows of tables that are read at once: disks serve the more small reads the more are asked for. On a virtual disk, of
a machine with other work, 2,000 rows of 9 KB took 0.8 s with 8, 0.24 s with 32 and 0.22 s with 64."""

FindHardware = Callable[[Host, ModelShape, bool], Hardware | None]
"""Finds this machine's rates for a model on a host: its profile's, or, where that has none and they are wanted, ones
that are measured in seconds; None where they are not known."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a runtime is asked for."""

    store: Store
    workload: Workload
    options: Options
    """As they were given: the device that they name may turn out not to be usable."""
    find_hardware: FindHardware | None
    """Asked before the plan is made; without it, plans go by bytes."""
    has_pool: bool
    """Whether sequences are given room here; otherwise callers bring caches, for which the plan counts memory."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """A plan, and what it was made from."""

    shape: ModelShape
    machine: Machine
    gpu: GpuRates | None
    plan: Plan
    pace: Pace


@dataclass(frozen=True, eq=False)
class Parts:
    """What an open runtime has."""

    member: Member
    options: Options
    """What was wanted, without the device where it cannot be used."""
    dtype: torch.dtype
    chosen: Chosen
    memory: Memory
    reader: DiskReader
    engine: Engine


def open_parts(wanted: Wanted, host: Host, preadv: Faults, stack: contextlib.ExitStack, held: Held) -> Parts:
    """Open what is `wanted` on `host`, all of it until `stack` is closed. Interrupts wait but for steps that own
    nothing, where `held` lets them come. Raises BudgetError if no plan fits."""
    store, before = wanted.store, process_rss_bytes()
    member = stack.enter_context(PROCESS.member())
    stack.enter_context(host)
    options = usable(wanted.options, host)
    # The graph of a large model takes seconds, and so does measuring.
    with held.let_come(), device_memory():
        made = prepare(store, options, host)
    with held.let_come():
        chosen = _choose_plan(wanted, options, made, member, before, host)
    plan = chosen.plan
    member.planned_nbytes = plan.nbytes
    if plan.device is not None:
        stack.enter_context(host.promised(plan.device.nbytes - plan.device.needs.context))
    memory = stack.enter_context(open_memory(store, plan, options, host, wanted.has_pool))
    verifier = ChunkVerifier(options.verify, host.trace, store.path)
    reader = stack.enter_context(
        DiskReader(
            *(store.path, verifier, host.trace, READ_THREADS, options.read_mode),
            clock=host.clock,
            preadv=preadv,
            scattered=ROW_THREADS,
        )
    )
    embedding = EmbeddingRows(store, reader, verifier, memory.staging)
    engine = Engine(made.seats, embedding, host.cancel, host.trace, memory.pool.outbox, memory.room)
    return Parts(member, options, made.dtype, chosen, memory, reader, engine)


def _choose_plan(wanted: Wanted, options: Options, made: Prepared, member: Member, before: int, host: Host) -> Chosen:
    """The plan for the process as it is now, by the machine's rates, if they can be found."""
    shape, machine, workload = made.shape, made.machine, wanted.workload
    budgets, hardware = budgets_of(options, member, before, host), None
    if wanted.find_hardware is not None:
        # Those that can be measured in seconds are the processor's.
        is_measured = not budgets.has_device and wants_rates(shape, machine, workload, budgets)
        hardware = wanted.find_hardware(host, shape, is_measured)
        # Measuring makes the process grow, and its peak counts.
        budgets = budgets_of(options, member, before, host) if is_measured else budgets
    if hardware is not None:
        machine = machine_for(shape, hardware, options.kernel_mode.value).with_memory_of(machine)
    gpu = None if hardware is None else hardware.gpu
    plan = make_plan(shape, machine, workload, budgets, gpu)
    calibration = calibration_of(shape, machine, workload.mean_context, plan.cache.bits)
    return Chosen(shape, machine, gpu, plan, pace_for(plan, shape, gpu, calibration))


def make_streams(parts: Parts, store: Store, host: Host) -> Streams:
    """What reads ahead for `parts`. In the loop that it runs in."""
    memory, plan = parts.memory, parts.chosen.plan
    device = host.computer.device if host.computer is not None else None
    kv, fork = None, None
    if memory.spill is not None and memory.kv_ring is not None:
        kv = KVStream(memory.spill, memory.kv_ring, plan.cache.layers, host.trace, host.cancel)
    if device is not None and "cpu" in (plan.prefill_device, plan.decode_device):
        fork = Fork(plan.tape, plan.placement.resident, plan.placement.ring_nbytes)

    def streamer(device: Device | None) -> Streamer:
        return Streamer(
            store,
            plan,
            parts.reader,
            memory.resident,
            memory.ring,
            host.trace,
            host.cancel,
            parts.options.prefetch,
            memory.experts,
            memory.buffers,
            device,
            fork,
        )

    blocks = streamer(device if fork is None else None)
    device_blocks = streamer(device) if fork is not None else blocks if device is not None else None
    return Streams(asyncio.get_running_loop(), blocks, kv, device_blocks)


async def load_side_tables(parts: Parts, store: Store) -> None:
    """Read what stays in memory beside the tape."""
    await parts.engine.embedding.load_side(parts.memory.side)
    await load_tables([seat.model for seat in parts.engine.seats], store, parts.reader)


@contextlib.contextmanager
def device_memory() -> Iterator[None]:
    """Raise BudgetError where computing on a device takes more of its memory than there is."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BudgetError(
            f"the GPU's memory did not suffice for what is computed: {shortened(error)}; give it more with --vram, or "
            "lower --batch, the context or --micro-batch"
        ) from error
