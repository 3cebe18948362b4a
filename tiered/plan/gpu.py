"""What a run with a GPU is expected to take, by a closed form: nothing of it is built in this version.

In: a model, a machine, budgets. Out: where weights and the KV cache go, and a `Prediction`. Weights stay in VRAM as far
as they fit, then in RAM; what is not in VRAM crosses the bus in every pass, what is in neither is read from disk:

    T_pass = max(disk bytes / B, bus bytes / P, computing)

The KV cache lies in VRAM, in RAM or on disk; callers compare. Attention computes where it lies, on the processor where
that is not VRAM: keys and values do not cross the bus, as FlexGen found best.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from tiered.plan.cost import kv_block_nbytes, kv_written_nbytes, prompt_attention_seconds, seen_tokens
from tiered.plan.hardware import GpuRates, Hardware
from tiered.plan.inputs import Machine, ModelShape, Workload
from tiered.plan.kv import Bits, CachePlan
from tiered.plan.load import Alike, PassRun
from tiered.plan.pace import Pace
from tiered.plan.predict import Phase, Prediction, run_pairs, walk
from tiered.plan.workspace import MAX_ROWS, row_nbytes
from tiered.units import GIB

_RESERVE_NBYTES: Final = GIB // 2
"""Of VRAM, for the driver, its libraries and kernels."""


@dataclass(frozen=True)
class GpuBudget:
    """Bytes for weights, KV cache and activations."""

    ram: int
    vram: int


@dataclass(frozen=True)
class OnGpu:
    """Where everything is."""

    model: ModelShape
    hardware: Hardware
    machine: Machine
    workload: Workload
    cache: CachePlan
    kv_tier: str
    in_vram: int
    """Bytes of weights in VRAM for good."""
    in_ram: int
    workspace: int
    ring: int

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return self.model.tape.total

    @property
    def resident_share(self) -> float:
        return (self.in_vram + self.in_ram) / self.total

    @cached_property
    def prediction(self) -> Prediction:
        """Of all passes on the GPU."""
        work = self.workload
        alike = Alike(
            work.sequences,
            work.batch_size or 1,
            work.max_prompt,
            work.max_context,
            work.max_batched_tokens,
            work.objective,
        )
        prefill, decode = walk(alike, lambda: Pace(self._decode_seconds), self._phase)
        count = work.sequences
        return Prediction(count * alike.prompt, count * alike.generated, prefill, decode, self.memory, count)

    def with_decode(self, on_cpu: Prediction) -> Prediction:
        """Prompts on the GPU, which come back as keys and values; the rest as `on_cpu` says."""
        vram = {name: nbytes for name, nbytes in self.memory.items() if name.startswith("vram")}
        return replace(on_cpu, prefill=self.prediction.prefill, memory=on_cpu.memory | vram)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by what takes them."""
        kv = self.cache.blocks_nbytes
        return {
            "kv_cache": kv if self.kv_tier == "cpu" else 0,
            "resident": self.in_ram,
            "ring": self.ring,
            "vram_kv_cache": kv if self.kv_tier == "gpu" else 0,
            "vram_resident": self.in_vram,
            "vram_ring": self.ring,
            "vram_workspace": self.workspace,
        }

    @property
    def _gpu(self) -> GpuRates:
        assert self.hardware.gpu is not None
        return self.hardware.gpu

    def _decode_seconds(self, rows: int) -> float:
        """Seconds of computing where only `rows` sequences decode, halfway between their prompts and their ends."""
        context = (self.workload.max_prompt + self.workload.max_context) / 2
        return self._computing(rows, rows) + self._decode_attention(rows, context)

    def _decode_attention(self, rows: int, context: float) -> float:
        """Seconds, where the cache is."""
        if self.kv_tier == "gpu":
            return kv_block_nbytes(self.cache, context, rows) / self._gpu.memory
        return (self.machine.attention_seconds or 0.0) * seen_tokens(self.model, context) * rows

    def _computing(self, tokens: int, logits: int) -> float:
        """Seconds of a pass without attention."""
        computed = (self.model.weights - self.model.head_weights) * self._active_share
        flops = 2 * (tokens * computed + logits * self.model.head_weights)
        return max(flops / self._gpu.flops, self.total * self._used_share(tokens) / self._gpu.memory)

    def _phase(self, run: PassRun, is_first: bool) -> Phase:
        """What `run` takes. Weights that are nowhere else are read from disk, what has come to stay but once."""
        gpu, disk, tokens = self._gpu, self.hardware.disk, run.rows + run.prompt_tokens
        used, on_disk = self._used_share(tokens), self.kv_tier == "disk"
        read = (self.total - self.in_vram - self.in_ram) * used + (self.in_vram + self.in_ram if is_first else 0)
        read += kv_block_nbytes(self.cache, run.context, run.rows) if on_disk else 0.0
        written = kv_written_nbytes(self.cache, tokens)
        # Keys and values of prompts are made on the GPU.
        copied = 0.0 if self.kv_tier == "gpu" else kv_written_nbytes(self.cache, run.prompt_tokens)
        bus = (self.total - self.in_vram) * used / gpu.host_to_device + copied / gpu.device_to_host
        computing = self._computing(tokens, -(-run.logits // run.times))
        computing += prompt_attention_seconds(self.model, run_pairs(self.model, run), gpu.flops)
        computing += self._decode_attention(run.rows, run.context)
        disk_seconds = read / disk.read + (written / disk.write if on_disk else 0.0)
        seconds = max(disk_seconds, bus, computing)
        written = written if on_disk else 0.0
        return Phase(1, seconds, disk_seconds, computing, read, written, bus, run.rows) * run.times

    @property
    def _active_share(self) -> float:
        """Of the layers' weights, those that a token goes through."""
        experts = self.model.experts
        if experts is None:
            return 1.0
        layers = self.model.weights - self.model.head_weights
        return 1 - experts.layers * (experts.count - experts.chosen) * experts.weights / layers

    def _used_share(self, rows: int) -> float:
        """Of the weights' bytes, those that a pass of `rows` tokens needs."""
        experts = self.model.experts
        if experts is None:
            return 1.0
        unused = experts.layers * (experts.count - experts.distinct(rows)) * experts.file_nbytes
        return 1 - unused / self._file_nbytes

    @cached_property
    def _file_nbytes(self) -> int:
        return sum(self.model.tape.file_nbytes)


def place_on_gpu(
    model: ModelShape,
    hardware: Hardware,
    machine: Machine,
    workload: Workload,
    budget: GpuBudget,
    bits: Bits,
    tier: str,
) -> OnGpu | None:
    """Weights and cache of `workload` within `budget`, with the cache in `tier` ("gpu", "cpu" or "disk"); None where
    that leaves no room for two units."""
    batch, context = workload.batch_size or 1, workload.max_context
    tokens = workload.tokens_in_flight(batch, context)
    rows = min(tokens, MAX_ROWS)
    workspace = rows * row_nbytes(model, context) + 2 * tokens * model.hidden * model.itemsize
    workspace += 2 * batch * model.vocab * 4 + _RESERVE_NBYTES
    ring = 2 * max(model.tape.nbytes)
    cache = CachePlan(
        model.kv,
        bits,
        tier == "disk",
        model.groups,
        sequences=batch,
        context=context,
        tokens=workload.kv_tokens(batch, context),
        tokens_at_once=rows,
    )
    kv = cache.blocks_nbytes + cache.tails_nbytes
    vram = budget.vram - workspace - (kv if tier == "gpu" else 0)
    # Activations that go to the processor's attention and come back, and pages on their way to and from disk.
    ram = budget.ram - (kv if tier == "cpu" else cache.tails_nbytes if tier == "disk" else 0)
    in_vram = model.tape.total if vram >= model.tape.total else vram - ring
    in_ram = min(model.tape.total - in_vram, ram - ring)
    if in_vram >= 0 and in_ram >= 0:
        return OnGpu(model, hardware, machine, workload, cache, tier, in_vram, in_ram, workspace, ring)
    return None
