"""A plan played through: which unit is read and computed when, in a discrete-event model of the runtime's schedule.

In: a plan and what it was made from. Out: the events of each lane (disk, bus, gpu, compute, waits) and what each pass
took. Order of reading, places in the ring and micro-batches are the runtime's own functions (`order.py`, `passes.py`).

    feed      for every unit of the tape, for ever: waits until its place in the ring is free, and queues its read
    disk      moves bytes at its bandwidth, first come, first served; reads of the tape stand still for experts, and
              share the time with the KV cache
    compute   layer after layer, micro-batch after micro-batch, unit after unit: waits for each, computes, gives back
    copy      where a device computes: takes each unit from host memory to the device, over the bus
    gpu       the device, behind the thread that computes: what it has been handed, layer after layer; new keys and
              values, and queries that follow them, go back where the KV cache is the host's

Where prompts are the device's and decoding is the processor's, one feed serves both, and a unit's place is free when
both have done with it. What is not in the model: sampling, bookkeeping, embedding rows, checksums, decoding of
compressed weights, and chunks (a unit can be computed with when all of it is there). A KV ring lends bytes, wherever
they are. Experts are chosen equally often, and in whole numbers only over several layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tiered.errors import ConfigError
from tiered.plan.inputs import Machine, ModelShape, Workload
from tiered.plan.lanes import Event
from tiered.plan.load import PassLoad, pass_loads
from tiered.plan.pace import calibration_of, pace_for
from tiered.plan.plan import Plan
from tiered.plan.play import Player, SimulatedPass
from tiered.plan.play_seat import Device

DECODES: Final = 3
"""Passes after the prompts' that are simulated unless asked otherwise."""


@dataclass(frozen=True)
class Simulation:
    """All passes, and all events in the order of their starts."""

    passes: tuple[SimulatedPass, ...]
    events: tuple[Event, ...]

    @property
    def steady(self) -> tuple[SimulatedPass, ...]:
        """Passes that only decode, of those with the most sequences: others have ended in the rest. Without the first
        that decodes if there are others: the prompts' pass may have left it more in the ring, or less, than each leaves
        the next. Without any that decode, the last one."""
        decoding = tuple(each for each in self.passes if not each.load.prompt_tokens)
        most = max((each.load.decoding for each in decoding), default=0)
        full = tuple(each for each in decoding if each.load.decoding == most)
        return tuple(each for each in full if each is not decoding[0]) or full or self.passes[-1:]


def simulate(
    plan: Plan,
    model: ModelShape,
    machine: Machine,
    workload: Workload,
    passes: int | None = None,
    device: Device | None = None,
) -> Simulation:
    """The first `passes` passes of `workload`; None: those that read prompts first, and `DECODES` more. `device`
    computes what `plan` has its device compute, `machine` the rest.

    Raises ConfigError where `machine` does not say how fast it is.
    """
    if machine.disk_bytes_per_second is None:
        raise ConfigError("no simulation without the disk's bandwidth: run 'tiered profile'")
    player = Player(plan, model, machine, device)
    gpu = None if device is None else device.rates
    calibration = calibration_of(model, machine, workload.mean_context, plan.cache.bits)
    pace = pace_for(plan, model, gpu, calibration)
    player.run(_first(pass_loads(plan, workload, pace), passes), pace)
    return Simulation(tuple(player.passes), tuple(sorted(player.clock.events, key=lambda event: event.start)))


def _first(loads: Iterator[PassLoad], passes: int | None) -> Iterator[PassLoad]:
    """The passes to simulate."""
    left = DECODES if passes is None else passes
    while left > 0 and (load := next(loads, None)) is not None:
        yield load
        left -= 1 if passes is not None or not load.prompt_tokens else 0
