"""This machine in rough numbers, in seconds: for plans on a machine of which there is no profile.

In: a folder on the disk that is meant, shapes of the model, what computes. Out: a `Hardware` with the rates that a plan
asks for. What is not measured takes the place of what is nearest to it. `tiered plan` and runs that choose how many
sequences they take at once ask for it.
"""

import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from tiered.bench.profile import check_on_disk
from tiered.bench.rates import measure_attention, measure_compute, measure_disk
from tiered.convert.compression import read_bandwidth
from tiered.errors import ConfigError
from tiered.kernels import Kernels
from tiered.plan import KVShape, ModelShape
from tiered.plan.hardware import CpuRates, DiskRates, Hardware, LinearRate
from tiered.plan.system import meminfo
from tiered.quant import Scheme
from tiered.store import Store


def quick_hardware(folder: Path, models: Sequence[ModelShape], is_store: bool, kernels: Kernels) -> Hardware:
    """This machine for a model that comes in `models`, which differ in their quantization only.

    Attention is, as linear layers are, over 16 MiB, which large caches hold, and the same for a KV cache of any bits.
    The disk is measured by reading the store at `folder`, or, where that is no store, a file of 64 MiB that is written
    there and removed. Raises ConfigError where that cannot be, or where that folder lies in memory.
    """
    model = models[0]
    read = measure_disk(Store.open(folder)) if is_store else _folder_rate(folder)
    dtype: torch.dtype = getattr(torch, model.dtype)
    linear = tuple(_linear(kernels, one, dtype) for one in models)
    # Of any shape, where no layer attends.
    heads, kv = (model.heads, model.kv) if model.kv else (1, KVShape(1, 64, 64, model.dtype))
    seconds = measure_attention(kernels, heads, kv)
    attention = kv.token_nbytes / seconds
    return Hardware(
        platform.node() or "this machine",
        "measured in seconds: rough; prompts' attention, writes and random reads are guessed",
        True,
        meminfo("MemTotal"),
        DiskRates(read, read),
        # A prompt's attention as slow as decoding's, which it never is.
        CpuRates(kernels.threads, attention, attention, 4 * heads * kv.head_dim / seconds, linear),
    )


def _linear(kernels: Kernels, model: ModelShape, dtype: torch.dtype) -> LinearRate:
    scheme = None if model.quantization is None else Scheme.parse(model.quantization)
    rate = measure_compute(kernels, scheme, model.hidden, dtype)
    return LinearRate(model.quantization or "none", kernels.mode.value, rate)


def _folder_rate(folder: Path) -> float:
    check_on_disk(folder.resolve(), "work in a folder on one, or name a machine with --hardware")
    try:
        return read_bandwidth(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder.resolve()}: its disk cannot be measured: {error.strerror}; work in another folder, or name a "
            "machine with --hardware"
        ) from error
