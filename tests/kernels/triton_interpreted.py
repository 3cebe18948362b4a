"""Triton's kernels in its interpreter: a program of its own, as the interpreter is chosen before anything is imported.

    TRITON_INTERPRET=1 python -m tests.kernels.triton_interpreted      writes JSON: relative errors by case

Instances of kernels take milliseconds each there, so layers are small. bf16 cannot be multiplied there: such
activations are multiplied as float32, and results are float32.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import torch

from tests.kernels.native_linear import SCHEMES, Case, random_case, relative_error
from tiered.kernels import DeviceKernels, Mode
from tiered.quant import GroupScheme, QuantizedWeight, Scheme

HOST: Final = torch.device("cpu")
GROUPS: Final = (32, 64, 128)
HALF: Final = 3e-4
"""What rounding results to fp16 leaves room for; errors are relative to the size of factors."""
EXACT: Final = 1e-6


def main() -> None:
    print(json.dumps({name: {"found": error, "allowed": allowed} for name, error, allowed in found()}))


def found() -> Iterator[tuple[str, float, float]]:
    """Every case with its error, and the largest allowed: relative, or the share of numbers of other bits."""
    for scheme in SCHEMES:
        yield f"dequantize {scheme.name}", _differing_weights(scheme), 0
        yield f"invariant {scheme.name}", _error(scheme, Mode.INVARIANT, rows=5), HALF
        yield f"bf16 {scheme.name}", _error_of_bf16(scheme), EXACT
    for scheme in (GroupScheme(4, 64), GroupScheme(8, 32)):
        yield f"invariant, many rows {scheme.name}", _error(scheme, Mode.INVARIANT, rows=70), HALF
        yield f"alone and in batches {scheme.name}", _differing_rows(scheme), 0
        yield f"by sums {scheme.name}", _error(scheme, Mode.FAST, rows=3, out=9, has_products=False), HALF
    yield "fast, few rows", _error(GroupScheme(4), Mode.FAST, rows=17), HALF
    yield "fast, many rows", _error(GroupScheme(4), Mode.FAST, rows=70), HALF
    for group in GROUPS:
        yield f"fast, few rows int8-g{group}", _error(GroupScheme(8, group), Mode.FAST, rows=17), 10 * HALF
        yield f"int8 activations int8-g{group}", _error_of_int8(GroupScheme(8, group), rows=17), EXACT
    yield "int8 activations, many rows", _error_of_int8(GroupScheme(8), rows=70), EXACT


def _case(scheme: Scheme, rows: int, out: int = 67) -> Case:
    case = random_case(scheme, out, 3, rows, torch.float32, padding=5)
    return replace(case, x=(case.x.float() / 256).half())


def _kernels(mode: Mode) -> DeviceKernels:
    return DeviceKernels(HOST, mode, name="triton")


def _error(scheme: Scheme, mode: Mode, rows: int, out: int = 67, has_products: bool = True) -> float:
    case = _case(scheme, rows, out)
    kernels = _kernels(mode)
    kernels._has_products = has_products
    return relative_error(kernels.linear(case.x, case.weight, case.bias), case.exact(), case)


def _error_of_bf16(scheme: Scheme) -> float:
    from triton import language

    from tiered.kernels import triton_kernels

    case = replace(_case(scheme, 3), x=random_case(scheme, 67, 3, 3).x)
    assert isinstance(case.weight, QuantizedWeight) and case.x.dtype == torch.bfloat16
    y = torch.empty(3, 67)
    before = triton_kernels._DTYPES[torch.bfloat16]
    triton_kernels._DTYPES[torch.bfloat16] = language.float32
    triton_kernels.linear(case.x, case.weight, case.bias, y, triton_kernels.LINEAR_FEW)
    triton_kernels._DTYPES[torch.bfloat16] = before
    return relative_error(y, case.exact(), case)


def _error_of_int8(scheme: GroupScheme, rows: int) -> float:
    """Against products of the same rounded activations in float32, which the torch path makes."""
    case = _case(scheme, rows)
    expected = DeviceKernels(HOST, Mode.FAST, name="torch").linear(case.x, case.weight, case.bias)
    return relative_error(_kernels(Mode.FAST).linear(case.x, case.weight, case.bias), expected, case)


def _differing_weights(scheme: Scheme) -> float:
    weight = _case(scheme, 1, out=70).weight
    assert isinstance(weight, QuantizedWeight)
    different = [
        _kernels(Mode.INVARIANT).dequantize(weight, 3, 70, dtype) != weight.rows(3, 70, dtype)
        for dtype in (torch.float16, torch.float32)
    ]
    return float(torch.stack(different).float().mean())


def _differing_rows(scheme: GroupScheme) -> float:
    case = _case(scheme, 70)
    kernels = _kernels(Mode.INVARIANT)
    together = kernels.linear(case.x, case.weight, case.bias)
    parts = [(0, 1), (1, 18), (18, 70)]
    apart = torch.cat([kernels.linear(case.x[a:b], case.weight, case.bias) for a, b in parts])
    return float((apart != together).float().mean())


if __name__ == "__main__":
    main()
