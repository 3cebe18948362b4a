"""A run and the simulation of its plan: units are read in the same order, and computed in the same order."""

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from tests.commands import make_store
from tests.quick import represented
from tests.runtimes import reserved, run_segments
from tiered.device.emulated import EmulatedDevice
from tiered.io import VerifyPolicy
from tiered.model import Segment
from tiered.plan import ComputeRate, Machine, Tape, Tier, Workload, full_ring, make_plan
from tiered.plan.hardware import GpuRates
from tiered.plan.placement import UNHELD
from tiered.plan.play_seat import Device
from tiered.plan.simulate import simulate
from tiered.prepare import measure_inputs
from tiered.runtime import Options, Runtime
from tiered.store import Store
from tiered.units import GIB, MIB

pytestmark = pytest.mark.usefixtures("steady_baseline")

PROMPT, GENERATED = 20, 4
WORK: Final = Workload(1, PROMPT + GENERATED, PROMPT, max_batched_tokens=4096)
GPU: Final = GpuRates("T4", GIB, 1e9, 1e9, 1e12, 1e15)
COMPUTING: Final = ("gpu", "compute")
RATES: Final = Machine(MIB, 1e9, ComputeRate((1, 1024), (1e-9, 1e-8)), 1e-9)


def budget_for(store: Store, options: Options) -> int:
    """A budget in which about a third is resident."""
    model, machine, budgets = measure_inputs(store, options)
    needs = make_plan(model, machine, WORK, replace(budgets, ram=64 * GIB)).needs.total
    return needs + full_ring(model.tape.streamed(UNHELD)) + model.tape.total // 3


@pytest.mark.parametrize(
    ("micro_batch", "has_device"),
    represented([(None, False), (8, False), (None, True), (8, True)], [(8, False), (8, True)]),
    ids=lambda value: {None: "one micro-batch", 8: "held layers", True: "prompts on a device"}.get(value, "processor"),
)
def test_a_run_reads_copies_and_computes_in_the_order_of_its_simulation(
    micro_batch: int | None, has_device: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One thread reads unit after unit; several begin in the same order, and end in any.
    monkeypatch.setattr("tiered.opening.READ_THREADS", 1)
    store = Store.open(make_store(tmp_path, "int4"))
    # A unit whose checksum is to be tested takes a turn of the loop more on its way to a thread, and may be overtaken.
    never = VerifyPolicy.NEVER
    options = Options(ram=16 * GIB, threads=1, micro_batch_rows=micro_batch, verify=never, keep_spans=True)
    if has_device:
        monkeypatch.setattr("tiered.host.open_device", lambda _, vram: EmulatedDevice(vram, mode="plain"))
        there: dict[str, Any] = {"tiers": tuple(Tier), "device": "emulated", "vram": GIB}
        options = replace(options, **there, prefill_device="gpu", decode_device="cpu", kv="cpu")
    units = [unit for block in store.units_of_pass(on_demand=False) for unit in block]
    place_of = {(str(store.path / unit.file.path), unit.offset): number for number, unit in enumerate(units)}
    read: list[int] = []

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        number = place_of.get((str(Path(f"/proc/self/fd/{fd}").readlink()), offset))
        # Rows of the embedding, which may share the head's file, are read by others.
        if number is not None and threading.current_thread().name.startswith("tiered-read"):
            read.append(number)
        return os.preadv(fd, buffers, offset, flags)

    budget = budget_for(store, options)
    with ExitStack() as stack:
        runtime = stack.enter_context(Runtime(store, WORK, replace(options, ram=budget)))
        runtime.reader._preadv = preadv
        model, plan = measure_inputs(store, options)[0], runtime.plan
        assert plan.read_nbytes and plan.placement.resident and (micro_batch is None or plan.held.layers)
        assert (plan.prefill_device, plan.decode_device) == ("gpu" if has_device else "cpu", "cpu")
        kv = reserved(stack, runtime, PROMPT + GENERATED)
        ids = list(range(3, 3 + PROMPT))
        for number in range(GENERATED):
            run_segments(runtime, [Segment(kv, ids if not number else [7], 1)], is_last=number == GENERATED - 1)
        spans = runtime.host.trace.spans
    computed = [span.name for span in spans if span.lane == "compute" and span.name not in ("record", "kv")]
    copied = [span.name.partition("/")[0] for span in spans if span.lane == "bus"]
    found = simulate(plan, model, RATES, WORK, GENERATED, Device.of(plan, GPU) if has_device else None)
    numbers = {name: number for number, name in enumerate(names_of(plan.tape))}
    assert read == [numbers[event.name] for event in found.events if event.lane == "disk"]
    blocks = {lane: [e.name.partition("/")[0] for e in found.events if e.lane == lane] for lane in ("bus", "gpu")}
    assert changes(computed) == changes([e.name.partition("/")[0] for e in found.events if e.lane in COMPUTING])
    assert bool(copied) is has_device
    # What is copied of the head, which only the processor computes, is chance; keys and values have no name in a trace.
    assert [each for each in copied if each != "head"] == [each for each in blocks["bus"] if each.startswith("layer-")]
    assert changes(blocks["gpu"]) == [each for each in changes(blocks["bus"]) if each.startswith("layer-")]


def names_of(tape: Tape) -> list[str]:
    """Of units, as events name them."""
    layers = [f"layer-{number:03}" for number in range(len(tape.counts) - 1)]
    return [
        block if count == 1 else f"{block}/{number}"
        for block, count in zip([*layers, "head"], tape.counts, strict=True)
        for number in range(count)
    ]


def changes(names: list[str]) -> list[str]:
    """`names` without repeats."""
    return [name for name, before in zip(names, ["", *names], strict=False) if name != before]
