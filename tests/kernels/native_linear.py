"""Linear layers for tests of the native kernels: random cases, and calls of the C interface without `Kernels`.

The C interface offers what `Kernels.linear` does not ask for: fp32 results, and any level, mode and number of threads
side by side. Used by the tests in this folder and by `guard_pages.py`.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from tiered.kernels import Level, Library, Mode, load_library
from tiered.kernels.library import Dtype, Format, Status, WeightArgument
from tiered.quant import GroupScheme, QuantizedTensor, QuantizedWeight, dequantize

DTYPES = {torch.bfloat16: Dtype.BF16, torch.float32: Dtype.F32}
SCHEMES = [GroupScheme(bits, group) for bits in (4, 8) for group in (32, 64, 128)]
FORMATS: list[GroupScheme | None] = [*SCHEMES, None]
"""How a weight may be stored; None is plain bf16."""


def native() -> Library:
    """The library; skips, saying why, where there is none."""
    library = load_library()
    if isinstance(library, str):
        pytest.skip(library)
    return library


def require(level: Level) -> Library:
    """The library; skips, saying why, where it cannot run `level`."""
    library = native()
    refusal = library.refusal(level)
    if refusal is not None:
        pytest.skip(f"{level.name}: {refusal}")
    return library


@contextmanager
def context(level: Level, threads: int) -> Iterator[int]:
    library = native()
    made = library.tk_create(threads, int(level))
    assert made, f"{level.name} with {threads} threads"
    try:
        yield made
    finally:
        library.tk_destroy(made)


@dataclass(frozen=True)
class Case:
    """A linear layer and what is put through it."""

    scheme: GroupScheme | None
    tensors: tuple[torch.Tensor, ...]  # q, scale, zero; or the bf16 weight alone
    x: torch.Tensor  # bf16 [rows, in], rows contiguous in themselves
    bias: torch.Tensor | None = None

    @property
    def out(self) -> int:
        return self.tensors[0].shape[0]

    @property
    def weight(self) -> torch.Tensor | QuantizedWeight:
        return self.tensors[0] if self.scheme is None else QuantizedWeight(QuantizedTensor(*self.tensors), self.scheme)

    def exact(self) -> torch.Tensor:
        """The result in float64, of the weights that the codes stand for."""
        y = self.x.double() @ self.plain().double().T
        return y if self.bias is None else y + self.bias.double()

    def plain(self) -> torch.Tensor:
        """The weight in fp32."""
        if self.scheme is None:
            return self.tensors[0].float()
        q, scale, zero = self.tensors
        return dequantize(q, scale, zero, self.scheme)


def random_case(
    scheme: GroupScheme | None,
    out: int,
    units: int,
    rows: int,
    bias: torch.dtype | None = None,
    padding: int = 0,
    seed: int = 0,
) -> Case:
    """`in` is `units` groups, or `units` times 32; consecutive rows of x are `padding` numbers apart."""
    generator = torch.Generator().manual_seed(seed)
    in_ = units * (32 if scheme is None else scheme.group_size)
    x = torch.randn(rows, in_ + padding, generator=generator).bfloat16()[:, :in_]
    made = torch.randn(out, generator=generator).to(bias) if bias is not None else None
    if scheme is None:
        return Case(None, (torch.randn(out, in_, generator=generator).bfloat16(),), x, made)
    # Not from `quantize`: every code with every zero, and scales down to the least (which fp16 holds as subnormals).
    q = torch.randint(0, 256, scheme.q_shape(out, in_), generator=generator, dtype=torch.uint8)
    scale = torch.exp2(torch.randint(-18, 4, scheme.scale_shape(out, in_), generator=generator).float())
    scale *= 1 + torch.rand(scale.shape, generator=generator)
    zero = torch.randint(0, scheme.max_code + 1, scheme.zero_shape(out, in_), generator=generator, dtype=torch.uint8)
    return Case(scheme, (q, scale.half(), zero), x, made)


def argument(case: Case) -> WeightArgument:
    in_ = case.x.shape[1]
    pointers = [tensor.data_ptr() for tensor in case.tensors]
    if case.scheme is None:
        return WeightArgument(Format.DENSE_BF16, 0, case.out, in_, pointers[0], None, None)
    return WeightArgument(
        Format.INT4 if case.scheme.bits == 4 else Format.INT8, case.scheme.group_size, case.out, in_, *pointers
    )


def into(made: int, case: Case, y: torch.Tensor, mode: Mode = Mode.INVARIANT, cancel: int | None = None) -> Status:
    """One native call, result into `y`."""
    status: int = native().tk_linear(
        made,
        ctypes.byref(argument(case)),
        case.x.data_ptr(),
        case.x.shape[0],
        case.x.stride(0),
        None if case.bias is None else case.bias.data_ptr(),
        Dtype.BF16 if case.bias is None else DTYPES[case.bias.dtype],
        y.data_ptr(),
        y.stride(0),
        DTYPES[y.dtype],
        0 if mode is Mode.INVARIANT else 1,
        cancel,
    )
    return Status(status)


def run(
    level: Level,
    case: Case,
    mode: Mode = Mode.INVARIANT,
    threads: int = 2,
    dtype: torch.dtype = torch.float32,
    padding: int = 3,
) -> torch.Tensor:
    """[rows, out] from `level`; checks that nothing beyond a row of y is written."""
    rows, out = case.x.shape[0], case.out
    y = torch.full((rows, out + padding), 777.0, dtype=dtype)
    with context(level, threads) as made:
        assert into(made, case, y, mode) == Status.OK
    assert bool((y[:, out:] == 777).all())
    return y[:, :out]


def relative_error(found: torch.Tensor, expected: torch.Tensor, case: Case) -> float:
    """L2 of the difference over that of a result of these magnitudes.

    The latter is |weight row| * |x row|, not the result's own: a few outputs may all but cancel, and then say nothing.
    """
    sizes = case.x.double().norm(dim=1).unsqueeze(1) * case.plain().double().norm(dim=1)
    return float((found.double() - expected.double()).norm() / sizes.norm())
