"""Launches of Triton's kernels as they are made at a device, compiled and not run: a stand-in takes the driver's place.

python -m tests.kernels.triton_launches      writes JSON: for each kernel the binaries that numbers of rows took
"""

import json
from collections.abc import Iterator
from typing import Any, Final

import torch
import triton
from triton.backends.compiler import GPUTarget

from tests.kernels.native_linear import random_case
from tiered.kernels import triton_kernels as kernels
from tiered.quant import CodebookScheme, GroupScheme, QuantizedWeight

ROWS: Final = (1, 2, 16, 70)


class Driver:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    made: dict[str, list[str]] = {}
    compile_only = triton.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> Any:
        compiled = compile_only(self, *args, grid=grid, warmup=True, **more)
        made.setdefault(f"{name} {self.fn.__name__}", []).append(compiled.hash)
        return compiled

    triton.runtime.driver.set_active(Driver())
    triton.JITFunction.run = run
    for name in launches():  # noqa: B007 - `run` reads it
        pass
    print(json.dumps({kernel: sorted(set(hashes)) for kernel, hashes in made.items()}))


def launches() -> Iterator[str]:
    """Names of what is launched next."""
    for scheme in (GroupScheme(4), GroupScheme(8, 32), CodebookScheme("mxfp4", 32)):
        for has_bias in (False, True):
            yield f"{scheme.name}{' bias' if has_bias else ''}"
            for rows in ROWS:
                case = random_case(scheme, 67, 4, rows, torch.bfloat16)
                weight, bias = case.weight, case.bias if has_bias else None
                assert isinstance(weight, QuantizedWeight)
                y = torch.empty(rows, 67, dtype=torch.bfloat16)
                kernels.linear(case.x, weight, bias, y, kernels.LINEAR)
                kernels.linear_by_sums(case.x.half(), weight, bias, y.half())
                kernels.dequantize(weight, torch.empty(67, weight.shape[1], dtype=torch.bfloat16))
                if scheme.bits == 8:
                    scale = torch.empty(rows, 4)
                    kernels.linear_int8(case.x.to(torch.int8), scale, weight, bias, y, kernels.LINEAR_FEW)


if __name__ == "__main__":
    main()
