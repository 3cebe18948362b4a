"""Linear layers for tests of the native kernels: random cases, and calls of the C interface without `Kernels`.

The C interface offers what `Kernels.linear` does not ask for: fp32 results, and any level, mode and number of threads
side by side. Used by the tests in this folder and by `guard_pages.py`.
"""

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from tiered.errors import InterruptedRun
from tiered.kernels import CancelFlag, Level, Library, Mode, load_library
from tiered.kernels.kernels import quantized_argument
from tiered.kernels.library import Dtype, Format, Status, WeightArgument
from tiered.quant import E8M0, CodebookScheme, GroupScheme, QuantizedTensor, QuantizedWeight, Scheme, dequantize

DTYPES = {torch.bfloat16: Dtype.BF16, torch.float32: Dtype.F32}
CODEBOOKS = [CodebookScheme("mxfp4", 32), CodebookScheme("nf4", 64), CodebookScheme("iq4nl", 32)]
INTEGERS = [GroupScheme(bits, group) for bits in (4, 8) for group in (32, 64, 128)]
SCHEMES: list[Scheme] = [*INTEGERS, *CODEBOOKS]
FORMATS: list[Scheme | None] = [*SCHEMES, CodebookScheme("nf4", 32), CodebookScheme("iq4nl", 128), None]
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


def seconds_until_ended(call: Callable[[], object], flag: CancelFlag) -> float:
    """How many seconds of this process's processors the `call` in which `flag` is set goes on for.

    `call` is repeated until then: a fast machine ends one before the other thread gets to set the flag. Other
    processes that run beside this one make it wait, which is not counted.
    """
    set_at: list[float] = []

    def interrupt() -> None:
        flag.set()
        # Only now: the others compute on while this thread is kept from the processor between the two.
        set_at.append(time.process_time())

    timer = threading.Timer(0.05, interrupt)
    timer.start()
    with pytest.raises(InterruptedRun):
        while True:
            call()
    ended = time.process_time()
    timer.join()
    return ended - set_at[0]


@dataclass(frozen=True)
class Case:
    """A linear layer and what is put through it."""

    scheme: Scheme | None
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
    scheme: Scheme | None,
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
    # GPTQ's zeros reach 16 at 4 bits.
    q = torch.randint(0, 256, scheme.q_shape(out, in_), generator=generator, dtype=torch.uint8)
    exponent = torch.randint(-18, 4, scheme.scale_shape(out, in_), generator=generator)
    scale = torch.exp2(exponent.float()) * (1 + torch.rand(exponent.shape, generator=generator))
    zero_shape, most = scheme.zero_shape(out, in_), 16 if scheme.bits == 4 else 255
    zero = torch.randint(0, most + 1, zero_shape, generator=generator, dtype=torch.uint8)
    if isinstance(scheme, CodebookScheme):
        scale *= torch.randint(0, 2, scale.shape, generator=generator) * 2 - 1
    stored = (exponent + 127).to(E8M0) if scheme.scale_dtype == E8M0 else scale.to(scheme.scale_dtype)
    return Case(scheme, (q, stored, zero), x, made)


def argument(case: Case) -> WeightArgument:
    weight = case.weight
    if isinstance(weight, QuantizedWeight):
        argument = quantized_argument(weight)
        argument.in_ = case.x.shape[1]
        return argument
    return WeightArgument(Format.DENSE_BF16, 0, case.out, case.x.shape[1], weight.data_ptr())


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

    The latter is |weight row| * |x row| and the bias, not the result's own: a few outputs may all but cancel, and then
    say nothing.
    """
    sizes = case.x.double().norm(dim=1).unsqueeze(1) * case.plain().double().norm(dim=1)
    if case.bias is not None:
        sizes = sizes + case.bias.double().abs()
    return float((found.double() - expected.double()).norm() / sizes.norm())
