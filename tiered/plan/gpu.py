"""What a run with a GPU is expected to take, by a closed form: nothing of it is built in this version.

In: a model, a machine, budgets. Out: where weights and the KV cache go, and a `Prediction`. Weights stay in VRAM as far
as they fit, then in RAM; what is not in VRAM crosses the bus in every pass, what is in neither is read from disk:

    T_pass = max(disk bytes / B, bus bytes / P, computing)

The KV cache lies in VRAM, in RAM or on disk; callers compare. Attention computes where it lies, on the processor where
that is not VRAM: keys and values do not cross the bus, as FlexGen found best.
"""

from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Final

from tiered.plan.cost import (
    kv_block_nbytes,
    kv_written_nbytes,
    prompt_attention_seconds,
    prompt_pairs,
    seen_tokens,
)
from tiered.plan.hardware import GpuRates, Hardware
from tiered.plan.inputs import Machine, ModelShape, Workload
from tiered.plan.kv import Bits, CachePlan
from tiered.plan.predict import Phase, Prediction, in_waves
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

    def predict(self) -> Prediction:
        """All passes on the GPU."""
        sequences, batch = self.workload.sequences, self.workload.batch_size or 1
        prefill, decode = in_waves(sequences, batch, self._prefill, self._decode)
        prompt, generated = self.workload.max_prompt, self.workload.max_context - self.workload.max_prompt
        return Prediction(sequences * prompt, sequences * generated, prefill, decode, self.memory, sequences)

    def with_decode(self, on_cpu: Prediction) -> Prediction:
        """Prompts on the GPU, which come back as keys and values; the rest as `on_cpu` says."""
        vram = {name: nbytes for name, nbytes in self.memory.items() if name.startswith("vram")}
        return replace(on_cpu, prefill=self.predict().prefill, memory=on_cpu.memory | vram)

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

    def _prefill(self, count: int, is_first: bool) -> Phase:
        total, most = count * self.workload.max_prompt, self.workload.max_batched_tokens
        passes = -(-total // most)
        pairs = count * prompt_pairs(self.model, self.workload.max_prompt)
        attention = prompt_attention_seconds(self.model, pairs, self._gpu.flops)
        written, logits = kv_written_nbytes(self.cache, total) / passes, -(-count // passes)
        phases = []
        for number in range(passes):
            rows = min(most, total - number * most)
            # What has come to stay is read once.
            cold = self.in_vram + self.in_ram if is_first and not number else 0
            copied = 0.0 if self.kv_tier == "gpu" else written / self._gpu.device_to_host
            phases.append(self._pass(rows, logits, attention * rows / total, cold, written, copied))
        return reduce(add, phases)

    def _decode(self, count: int) -> Phase:
        passes = max(0, self.workload.max_context - self.workload.max_prompt - 1)
        context = (self.workload.max_prompt + self.workload.max_context) / 2
        kv = kv_block_nbytes(self.cache, context, count)
        if self.kv_tier == "gpu":
            attention = kv / self._gpu.memory
        else:
            attention = (self.machine.attention_seconds or 0.0) * seen_tokens(self.model, context) * count
        read = kv if self.kv_tier == "disk" else 0.0
        return self._pass(count, count, attention, read, kv_written_nbytes(self.cache, count)) * passes

    def _pass(
        self, rows: int, logits: int, attention: float, read: float, written: float, copied: float = 0.0
    ) -> Phase:
        """A pass of `rows` tokens, which reads `read` bytes from disk besides weights that are nowhere else, adds
        `written` bytes to the cache, and takes `copied` seconds to bring them to the processor."""
        gpu, disk, total = self._gpu, self.hardware.disk, self.total
        used = self._used_share(rows)
        bus = (total - self.in_vram) * used / gpu.host_to_device + copied
        read += (total - self.in_vram - self.in_ram) * used
        computed = (self.model.weights - self.model.head_weights) * self._active_share
        flops = 2 * (rows * computed + logits * self.model.head_weights)
        compute = max(flops / gpu.flops, total * used / gpu.memory) + attention
        on_disk = self.kv_tier == "disk"
        disk_seconds = read / disk.read + (written / disk.write if on_disk else 0.0)
        seconds = max(disk_seconds, bus, compute)
        return Phase(1, seconds, disk_seconds, compute, read, written if on_disk else 0.0, bus)

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
        return 1 - unused / sum(self.model.tape.file_nbytes)


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
