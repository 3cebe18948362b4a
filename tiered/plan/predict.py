"""What a run is going to take, by a closed form: the seconds of its passes, its bytes, its memory.

In: a plan and what it was made from. Out: a `Prediction`, pure numbers. `strategies.py` compares plans by it, and
`generate` prints it beside what was measured.

Sequences are taken to be equally long, and share passes as the scheduler has them do (`load.py`): runs of equal passes
are counted as one. A pass takes the longest of reading, copying to a GPU and computing; the first one of all reads (and
copies) every weight. Experts are taken to be chosen equally often, so a real router reads less of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Final, Literal

from tiered.errors import ConfigError
from tiered.plan.cost import kv_block_nbytes, kv_written_nbytes, pass_seconds, slowed
from tiered.plan.hardware import GpuRates
from tiered.plan.inputs import Machine, ModelShape, Workload
from tiered.plan.load import Alike, PassRun, pass_runs
from tiered.plan.pace import Pace, calibration_of, pace_for
from tiered.plan.plan import Plan
from tiered.plan.run_cost import Least, RunCosts
from tiered.plan.way import expected_bus_nbytes, expected_expert_nbytes
from tiered.units import format_seconds

Bottleneck = Literal["disk", "bus", "compute", "memory"]
"""What most of the time goes by; "bus": to a GPU; "memory": nothing is read from disk any more, so computing bounds."""

_WAVES: Final = 2
"""Full batches that are walked through one after the other; later ones take as long as the last of them."""
_ALIKE: Final = 16
"""Passes that share a prompt in the same way and count as equal, at most: what they attend to grows."""
Numbers = tuple[float, ...]
"""The fields of a `Phase`, in their order."""
_SECONDS, _DISK_SECONDS, _COMPUTE_SECONDS = 1, 2, 3
"""Where it has these."""
_NOTED: Final = 6
"""Equal passes that a pace learns from, at most: after so many it knows next to nothing else."""


@dataclass(frozen=True)
class Phase:
    """Passes of one kind, and what they take together."""

    passes: int = 0
    seconds: float = 0.0
    disk_seconds: float = 0.0
    """Of reading and writing, whether or not something computes meanwhile."""
    compute_seconds: float = 0.0
    read_nbytes: float = 0.0
    written_nbytes: float = 0.0
    bus_seconds: float = 0.0
    """Of copying to a GPU and back."""
    decoded_tokens: int = 0
    """Of sequences that decode, alone or beside prompts."""
    touch_seconds: float = 0.0
    """Of touching memory for the first time, for which reading or computing waits, beside the units that stay."""

    def __add__(self, other: "Phase") -> "Phase":
        return Phase(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: int) -> "Phase":
        return Phase(*(times * value for value in vars(self).values()))

    @property
    def of_a_pass(self) -> str:
        """What one of them takes, in words."""
        took = f"{format_seconds(self.compute_seconds / self.passes)} of computing"
        if self.bus_seconds:
            took = f"{format_seconds(self.bus_seconds / self.passes)} of copying and {took}"
        return f"{format_seconds(self.disk_seconds / self.passes)} of disk and {took}" if self.disk_seconds else took

    @property
    def bottleneck(self) -> Bottleneck:
        """What takes longest."""
        if self.bus_seconds > max(self.disk_seconds, self.compute_seconds):
            return "bus"
        if not self.disk_seconds:
            return "memory"
        return "disk" if self.disk_seconds >= self.compute_seconds else "compute"


@dataclass(frozen=True)
class Prediction:
    """What a whole request, or job, is expected to take."""

    prompt_tokens: int
    generated_tokens: int
    prefill: Phase
    decode: Phase
    memory: dict[str, int]
    """Bytes by what takes them."""
    sequences: int = 1

    @property
    def seconds(self) -> float:
        return self.prefill.seconds + self.decode.seconds

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over all seconds, those of the prompts among them, as FlexGen counts."""
        return self.generated_tokens / self.seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Of passes that only decode; None where there are none."""
        return self.decode.decoded_tokens / self.decode.seconds if self.decode.seconds else None

    @property
    def seconds_per_pass(self) -> float | None:
        """Of passes that only decode; None where there are none."""
        return self.decode.seconds / self.decode.passes if self.decode.passes else None

    @property
    def bottleneck(self) -> Bottleneck:
        """That of the phase that takes longer."""
        return max(self.prefill, self.decode, key=lambda phase: phase.seconds).bottleneck

    @property
    def read_nbytes(self) -> float:
        return self.prefill.read_nbytes + self.decode.read_nbytes

    @property
    def written_nbytes(self) -> float:
        return self.prefill.written_nbytes + self.decode.written_nbytes

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; seconds and bytes."""
        return asdict(self) | {
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "bottleneck": self.bottleneck,
            "bytes_read": self.read_nbytes,
            "bytes_written": self.written_nbytes,
        }


def can_predict(machine: Machine, gpu: GpuRates | None, has_device: bool) -> bool:
    """Whether all rates are known that a prediction wants."""
    is_known = machine.linear is not None and machine.disk_bytes_per_second is not None
    return is_known and (gpu is not None or not has_device)


def predict(
    plan: Plan, model: ModelShape, machine: Machine, workload: Workload, gpu: GpuRates | None = None
) -> Prediction:
    """What `plan` is expected to take on `machine`, and on `gpu` what its device computes. Rates must be known: raises
    ConfigError where one is not."""
    found = Predictor(model, machine, gpu).predict(plan, workload)
    assert found is not None
    return found


class Predictor:
    """Predictions for plans of one model on one machine, to be compared: what they have in common is computed once."""

    def __init__(self, model: ModelShape, machine: Machine, gpu: GpuRates | None = None) -> None:
        self._model, self._machine, self.gpu = model, machine, gpu
        self._costs: dict[tuple[object, ...], RunCosts] = {}
        self._calibrations: dict[tuple[float, int], Callable[[int], float] | None] = {}

    def predict(self, plan: Plan, workload: Workload, most_seconds: float = math.inf) -> Prediction | None:
        """As `predict` does; None where `plan` takes more than `most_seconds`, which is then found out early."""
        model, machine = self._model, self._machine
        if not can_predict(machine, None, has_device=False):
            raise ConfigError("no prediction without the machine's rates; run 'tiered profile'")
        if not can_predict(machine, self.gpu, plan.device is not None):
            raise ConfigError("no prediction without the GPU's rates; run 'tiered profile'")
        alike = Alike.mean_of(plan, workload)
        run = _Run(plan, model, machine, self.gpu, self._costs_of(plan))

        def new_pace() -> Pace:
            return pace_for(plan, model, self.gpu, self._calibration(workload.mean_context, plan.cache.bits))

        assert machine.disk_bytes_per_second is not None
        least = run.costs.least(plan.read_nbytes / machine.disk_bytes_per_second / plan.batch_size)
        walked = walk(alike, new_pace, run.phase, most_seconds, least)
        if walked is None:
            return None
        prefill, decode = walked
        count = alike.sequences
        memory = memory_by_kind(plan)
        return Prediction(count * alike.prompt, count * alike.generated, prefill, decode, memory, count)

    def _calibration(self, mean_context: float, bits: int) -> Callable[[int], float] | None:
        """That of a pace, which many plans ask alike."""
        key = mean_context, bits if self._machine.quantized else 16
        if key not in self._calibrations:
            found = calibration_of(self._model, self._machine, mean_context, bits)
            self._calibrations[key] = None if found is None else lru_cache(maxsize=None)(found)
        return self._calibrations[key]

    def _costs_of(self, plan: Plan) -> RunCosts:
        """Those of all plans that compute as `plan` does."""
        alike: tuple[object, ...] = (plan.micro_batch_rows,)
        if plan.device is not None or self._machine.quantized:
            alike = (*alike, plan.prefill_device, plan.decode_device, plan.cache.on_device, plan.cache.bits)
        if alike not in self._costs:
            self._costs[alike] = RunCosts(plan, self._model, self._machine, self.gpu)
        return self._costs[alike]


def walk(
    alike: Alike,
    new_pace: Callable[[], Pace],
    phase: Callable[[PassRun, bool], Numbers],
    most_seconds: float,
    least: Least,
) -> tuple[Phase, Phase] | None:
    """Passes with prompt tokens, and those that only decode, by what `phase` says of each of a run of equal
    ones; it is told, too, whether a run is the first of all, which finds nothing in memory. None where they take more
    than `most_seconds` together; `least` helps to find that out early."""
    full, rest = divmod(alike.sequences, alike.batch_size)
    later = max(0, full - _WAVES)
    few = replace(alike, sequences=(_WAVES - 1) * alike.batch_size + rest)
    # Never ended early: beside others a batch may take less than any bound of it alone.
    first = _walked(few, new_pace(), phase, math.inf, least) if later else (Phase(), Phase())
    assert first is not None
    # All is the second walk, and as often as there are later batches what it takes longer than the first.
    most = (most_seconds + later * (first[0].seconds + first[1].seconds)) / (later + 1)
    every = replace(alike, sequences=(full - later) * alike.batch_size + rest)
    walked = _walked(every, new_pace(), phase, most, least)
    if walked is None:
        return None
    prefill, decode = (each + (each + before * -1) * later for each, before in zip(walked, first, strict=True))
    return prefill, decode


def _walked(
    alike: Alike, pace: Pace, phase: Callable[[PassRun, bool], Numbers], most_seconds: float, least: Least
) -> tuple[Phase, Phase] | None:
    prefill = decode = list(vars(Phase()).values())
    prompts, rows = alike.tokens
    for number, run in enumerate(pass_runs(alike, pace, _ALIKE)):
        each, times = phase(run, not number), run.times
        # Nobody asks for the pace where throughput counts.
        for _ in range(min(times, _NOTED) if alike.objective == "latency" else 0):
            pace.note(run.rows, run.prompt_tokens, each[_COMPUTE_SECONDS], each[_DISK_SECONDS])
        # Numbers one by one: there are tens of thousands of runs where many plans are compared.
        if run.parts:
            prefill = [total + times * value for total, value in zip(prefill, each, strict=True)]
        else:
            decode = [total + times * value for total, value in zip(decode, each, strict=True)]
        prompts, rows = prompts - times * run.prompt_tokens, rows - times * run.rows
        if prefill[_SECONDS] + decode[_SECONDS] + least.seconds(prompts, rows) > most_seconds:
            return None
    return _phase_of(prefill), _phase_of(decode)


def _phase_of(numbers: Sequence[float]) -> Phase:
    passes, seconds, disk, computes, read, written, bus, decoded, touched = numbers
    return Phase(int(passes), seconds, disk, computes, read, written, bus, int(decoded), touched)


def memory_by_kind(plan: Plan) -> dict[str, int]:
    """Bytes of the budgets by what takes them; those of a device begin with "vram"."""
    needs, device = plan.needs, plan.device
    host = {
        "process": needs.baseline,
        "tables": needs.outer + needs.objects,
        "kv_cache": needs.kv,
        "state": needs.state,
        "workspace": needs.workspace,
        "waiting": needs.waiting,
        "resident": plan.placement.resident_nbytes,
        "ring": plan.placement.ring_nbytes,
        "experts": 0 if plan.experts is None else plan.experts.nbytes,
    }
    if device is None:
        return host
    return host | {
        "vram_context": device.needs.context,
        "vram_tables": device.needs.outer,
        "vram_kv_cache": device.needs.kv,
        "vram_state": device.needs.state,
        "vram_workspace": device.needs.workspace,
        "vram_resident": device.placement.resident_nbytes,
        "vram_ring": device.placement.ring_nbytes,
    }


@dataclass(frozen=True)
class _Run:
    plan: Plan
    model: ModelShape
    machine: Machine
    gpu: GpuRates | None
    costs: RunCosts

    def phase(self, run: PassRun, is_first: bool) -> Numbers:
        """What each pass of `run` takes, the fields of a `Phase`; `is_first`: nothing is in memory yet."""
        tokens = run.rows + run.prompt_tokens
        disk, expert_seconds, read, written = self._disk(run, tokens, is_first)
        computing = self.costs.computing(run, self._seats_take_turns)
        computes = computing.seconds
        if not self.plan.reads_in_turns:
            computes = slowed(self.costs.slowest(run), computes, read)
        bus, expert_bus = self._bus(run, is_first)
        # In turns, computing waits for all that is read, experts among it.
        waited = 0.0 if self.plan.reads_in_turns else max(expert_seconds, expert_bus)
        reading, touched = self._touching(tokens) if is_first else (0.0, 0.0)
        computed = touched + pass_seconds(0.0, computes, waited, computing.expert_seconds)
        copied = bus + computed if self.plan.copies_in_turns else max(bus, computed)
        seconds = disk + reading + copied if self.plan.reads_in_turns else max(disk + reading, copied)
        return 1, seconds, disk, computes, read, written, bus, run.rows, reading + touched

    def _touching(self, tokens: int) -> tuple[float, float]:
        """Seconds in which a first pass touches what it reads into, and what it computes with. Nothing is read into a
        ring that has not been touched; units that stay have a rate of their own."""
        plan, machine = self.plan, self.machine
        if plan.device is not None:
            return 0.0, 0.0
        nbytes = min(plan.placement.ring_nbytes, plan.streamed_nbytes)
        if plan.experts is not None and self.model.experts is not None:
            cold = self.model.experts.layers * self.model.experts.distinct(tokens)
            nbytes += round(min(plan.experts.slots, cold) * plan.experts.slot_nbytes)
        return machine.touch_seconds(nbytes), machine.touch_seconds(plan.fresh_nbytes(tokens))

    def _bus(self, run: PassRun, is_first: bool) -> tuple[float, float]:
        """Of each pass: seconds of copying weights and recurrent states to the device, new keys and values and states
        back, and hidden states that wait both ways at once; and those of them for experts."""
        plan, gpu = self.plan, self.gpu
        rows = run.rows if plan.decode_device == "gpu" else 0
        parts = run.parts if plan.prefill_device == "gpu" else ()
        tokens = rows + (run.prompt_tokens if parts else 0)
        if gpu is None or not tokens:
            return 0.0, 0.0
        weights = plan.tape.total if is_first else plan.bus_nbytes
        experts = expected_bus_nbytes(self.model, plan, tokens) / gpu.host_to_device
        kv = 0 if plan.cache.on_device else tokens * self.model.kv_token_nbytes
        waiting = plan.waiting_nbytes(tokens) / min(gpu.host_to_device, gpu.device_to_host)
        if not plan.cache.on_device:
            arriving, leaving = self._state_nbytes(rows, parts)
            weights, kv = weights + arriving, kv + leaving
        return weights / gpu.host_to_device + experts + kv / gpu.device_to_host + waiting, experts

    def _state_nbytes(self, rows: int, parts: Sequence[range]) -> tuple[int, int]:
        """Bytes of recurrent states that `rows` decoding sequences and `parts` of prompts begin with, and leave."""
        nbytes = 0 if self.plan.cache.state is None else self.plan.cache.state.nbytes
        return (rows + sum(part.start > 0 for part in parts)) * nbytes, (rows + len(parts)) * nbytes

    def _disk(self, run: PassRun, tokens: int, is_first: bool) -> tuple[float, float, float, float]:
        """Of each pass: seconds of the disk, those of them for experts, bytes read, bytes written."""
        plan, machine, cache = self.plan, self.machine, self.plan.cache
        experts: float = expected_expert_nbytes(self.model, plan, tokens)
        read = float(plan.read_nbytes)
        if is_first:
            read = plan.tape.file_total
            if plan.experts is not None and self.model.experts is not None:
                cold = self.model.experts.layers * self.model.experts.distinct(tokens)
                experts = max(experts, cold * self.model.experts.file_nbytes)
        written = 0.0
        if cache.on_disk:
            # What is before the tokens of a prompt has been written by earlier passes.
            begun = (part.start + (run.times - 1) / 2 * len(part) for part in run.parts if part.start)
            read += sum(kv_block_nbytes(cache, each) for each in begun)
            read += kv_block_nbytes(cache, run.context, run.rows)
            written = kv_written_nbytes(cache, tokens)
            states_read, states_written = self._state_nbytes(run.rows, run.parts)
            read, written = read + states_read, written + states_written
        rate = machine.disk_bytes_per_second
        assert rate is not None
        expert_seconds = experts / (machine.expert_bytes_per_second or rate)
        seconds = read / rate + expert_seconds + written / (machine.disk_write_bytes_per_second or rate)
        if is_first:
            kept = plan.resident_file_nbytes
            seconds += kept / machine.kept_rate(is_touched=plan.device is not None) - kept / rate
        return seconds, expert_seconds, read + experts, written

    @cached_property
    def _seats_take_turns(self) -> bool:
        """Whether the processor waits inside each layer for what a device computes: a choice of experts, or pages whose
        memory is only lent."""
        return self.plan.experts is not None or self.plan.cache.on_disk
