"""A GPU in numbers, as plans and predictions want it: what its kernels take, and how fast it computes.

In: rates of `hardware.py`, a model, where its KV cache is. Out: a `Machine`, so that what holds for the processor's
seconds (`cost.py`) holds for the GPU's. Where weights go is for `make.py`, what passes take for `predict.py`. Nothing
here was measured on a GPU.
"""

from dataclasses import replace
from typing import Final

from tiered.plan.hardware import GpuRates, roofline
from tiered.plan.inputs import Machine, ModelShape
from tiered.plan.kv import CachePlan
from tiered.units import MIB

SCRATCH_NBYTES: Final = 96 * MIB
"""What a device's kernels hold besides results, at most: what `tiered.kernels.device_scratch_nbytes` says."""


def on_gpu(machine: Machine, model: ModelShape, cache: CachePlan, gpu: GpuRates) -> Machine:
    """`machine`, with the GPU's speed for all that it computes: linear layers, prompts' attention, and that of decoding
    if `cache` is on it; else the processor attends, and fills the cache's pages. What else a row takes is counted as
    nothing there, and whoever reads takes nothing from it; having a layer done takes as long as on the processor, which
    gives the orders.

    Raises ConfigError for a quantization whose bytes are not known.
    """
    in_bits = model.kv.token_nbytes * cache.bits / 16 if model.kv else 0.0
    return replace(
        machine,
        linear=roofline(model.quantization or "none", gpu.flops, gpu.memory),
        attention_seconds=in_bits / gpu.memory if cache.on_device else machine.attention_seconds,
        recent_attention_seconds=None if cache.on_device else machine.recent_attention_seconds,
        store_seconds=0.0,
        quantized=(),
        prompt_attention_flops=gpu.flops,
        element_seconds=0.0,
        reading_seconds=0.0,
    )
