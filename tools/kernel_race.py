"""One linear layer by our kernels and by torch's operators.

In: the shape of a layer, kernels, rows of activations. Out: seconds per call. `bench_kernels.py` prints them.

What makes it a fair race: contestants take turns, so that whatever drifts hits all of them; everyone's weights lie in
huge pages, as the runtime's do, and everyone uses so many copies in turn that they exceed the last-level cache. torch's
workers must not spin after a call, as they would take our threads' processors: OMP_WAIT_POLICY=passive does that, if it
is set before torch is imported.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import functional

from tiered.kernels import Kernels
from tiered.quant import E8M0, GroupScheme, QuantizedTensor, QuantizedWeight, Scheme
from tiered.quant.pack import unpack_int4
from tiered.units import MIB
from tools.machine_limits import settled

SCHEME: Final = GroupScheme(4)
TORCH_INT4: Final = "torch int4"
TORCH_BF16: Final = "torch bf16"
TORCH_INT8: Final = "torch int8"
_PANEL_ROWS: Final = 1024
_BURST_SECONDS: Final = 0.02
_MOST_CALLS: Final = 16
_ROUNDS: Final = (3, 15)
_LONG_SECONDS: Final = 0.3
"""A call that takes this long needs no other call before it to warm up."""
_MOST_CACHE_NBYTES: Final = 512 * MIB


@dataclass(frozen=True)
class LayerShape:
    """A linear layer's weight."""

    model: str
    out: int
    in_: int

    @property
    def packed_nbytes(self) -> int:
        """What a kernel has to read: codes, scales, zeros."""
        return self.out * self.in_ // SCHEME.group_size * (SCHEME.group_q_nbytes + 3)


class Inputs:
    """Activations [rows, in], as the contestants want them."""

    def __init__(self, rows: int, in_: int) -> None:
        self.rows = rows
        self.bf16 = torch.randn(rows, in_).to(torch.bfloat16)
        self.int8 = torch.randint(-127, 128, (rows, in_), dtype=torch.int8)


@dataclass(eq=False)
class Contestant:
    """One way to multiply; `copies` are the same weights at different addresses."""

    name: str
    multiply: Callable[[Inputs, Any], torch.Tensor]
    copies: Sequence[Any]
    turn: int = 0

    def call(self, inputs: Inputs) -> torch.Tensor:
        self.turn += 1
        return self.multiply(inputs, self.copies[self.turn % len(self.copies)])

    def burst(self, inputs: Inputs, calls: int) -> float:
        """Seconds per call of `calls` in a row, as a model's layers make them."""
        began = time.perf_counter()
        for _ in range(calls):
            self.call(inputs)
        return (time.perf_counter() - began) / calls


def measure(contestants: Sequence[Contestant], inputs: Inputs, seconds: float) -> dict[str, float]:
    """Median seconds per call of each, by name. Takes about `seconds` in all, longer if three turns each do."""
    estimates = [contestant.burst(inputs, 1) for contestant in contestants]
    calls = [min(_MOST_CALLS, math.ceil(_BURST_SECONDS / estimate)) for estimate in estimates]
    total = sum(estimate * (count + 1) for estimate, count in zip(estimates, calls, strict=True))
    rounds = min(max(int(seconds / total), _ROUNDS[0]), _ROUNDS[1])
    samples: list[list[float]] = [[] for _ in contestants]
    for number in range(rounds):
        for place in range(len(contestants)):
            index = (number + place) % len(contestants)
            if estimates[index] < _LONG_SECONDS:
                contestants[index].burst(inputs, 1)  # wakes threads, and brings the code into the caches
            samples[index].append(contestants[index].burst(inputs, calls[index]))
    return {contestant.name: statistics.median(found) for contestant, found in zip(contestants, samples, strict=True)}


def random_weight(out: int, in_: int, scheme: Scheme = SCHEME) -> QuantizedWeight:
    """4-bit weights, in SCHEME of about unit variance times 1 / sqrt(in); no kernel's speed depends on the values."""
    scale = torch.rand(scheme.scale_shape(out, in_)).add_(0.5).mul_(0.22 / in_**0.5)
    if scheme.scale_dtype == E8M0:
        scale.fill_(118)
    q = torch.randint(0, 256, scheme.q_shape(out, in_), dtype=torch.uint8)
    zero = torch.randint(6, 10, scheme.zero_shape(out, in_), dtype=torch.uint8)
    return QuantizedWeight(QuantizedTensor(q, scale.to(scheme.scale_dtype), zero), scheme)


def our_contestants(kernels: Mapping[str, Kernels], weight: QuantizedWeight, cache_nbytes: int) -> list[Contestant]:
    """One for each of `kernels`, all with the same copies of `weight`."""
    parts = _copies(tuple(weight.codes), cache_nbytes)
    copies = [QuantizedWeight(QuantizedTensor(*copy), weight.scheme) for copy in parts]
    return [Contestant(name, partial(_ours, each), copies) for name, each in kernels.items()]


def torch_contestants(weight: QuantizedWeight, cache_nbytes: int) -> list[Contestant]:
    """torch's int4 operator and bf16 `linear` on the same weights, and its raw int8 product with as many weights."""
    out, in_ = weight.shape
    aten = torch.ops.aten

    def int4(inputs: Inputs, copy: Sequence[torch.Tensor]) -> torch.Tensor:
        y: torch.Tensor = aten._weight_int4pack_mm_for_cpu(inputs.bf16, copy[0], SCHEME.group_size, copy[1])
        return y

    def bf16(inputs: Inputs, copy: Sequence[torch.Tensor]) -> torch.Tensor:
        return functional.linear(inputs.bf16, copy[0])

    def int8(inputs: Inputs, copy: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch._int_mm(inputs.int8, copy[0].t())

    q, scale, zero = weight.codes
    panels = [slice(start, min(start + _PANEL_ROWS, out)) for start in range(0, out, _PANEL_ROWS)]
    packed, wide = torch.empty(out, in_ // 2, dtype=torch.uint8), torch.empty(out, in_, dtype=torch.bfloat16)
    for panel in panels:
        codes = unpack_int4(q[panel], SCHEME.group_size).to(torch.int32)
        packed[panel] = aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        wide[panel] = weight.rows(panel.start, panel.stop, torch.bfloat16)
    # The operator computes (code - 8) * scale + zero.
    zeros = (8 - zero.float()) * scale.float()
    scale_and_zero = torch.stack([scale.float(), zeros], dim=-1).transpose(0, 1).to(torch.bfloat16)
    made = [Contestant(TORCH_INT4, int4, _copies((packed, scale_and_zero), cache_nbytes))]
    made.append(Contestant(TORCH_BF16, bf16, _copies((wide,), cache_nbytes)))
    del packed, wide
    made.append(
        Contestant(TORCH_INT8, int8, _copies((torch.randint(-127, 128, (out, in_), dtype=torch.int8),), cache_nbytes))
    )
    return made


def relative_error(kernels: Kernels, weight: QuantizedWeight, x: torch.Tensor, rows: int = 512) -> float:
    """L2 norm of the difference from float64 with the same weights, relative; over the first `rows` of `weight`."""
    part = weight.part(0, min(rows, weight.shape[0]))
    expected = x.double() @ part.rows(0, part.shape[0], torch.float32).double().T
    return float((kernels.linear(x, part).double() - expected).norm() / expected.norm())


def last_level_cache_nbytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the largest cache that the processor reports, at most 512 MiB; 32 MiB where it reports none."""
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    found = max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=32 * MIB)
    return min(found, _MOST_CACHE_NBYTES)


def _ours(kernels: Kernels, inputs: Inputs, copy: QuantizedWeight) -> torch.Tensor:
    return kernels.linear(inputs.bf16, copy)


def _copies(parts: tuple[torch.Tensor, ...], cache_nbytes: int) -> list[tuple[torch.Tensor, ...]]:
    count = max(1, math.ceil(1.5 * cache_nbytes / sum(part.nbytes for part in parts)))
    return [tuple(map(settled, parts)) for _ in range(count)]
