"""A process that calls native kernels on buffers beside pages that must not be touched; dies of the first that is.

`main` is called by test_native_linear.py, in a process of its own. Every buffer ends where such a page begins, and
in a second round begins where one ends. Results must be those on ordinary memory.
"""

import ctypes
import itertools
import mmap
from dataclasses import replace
from typing import Final

import torch

from tests.kernels.native_linear import FORMATS, Case, argument, context, into, native, random_case
from tiered.kernels import Level, Mode
from tiered.kernels.library import Dtype, Status

PAGE: Final = mmap.PAGESIZE
PROT_NONE: Final = 0


class Guarded:
    """Memory between two forbidden pages."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = -(-nbytes // PAGE) * PAGE
        self._mapped = mmap.mmap(-1, self.nbytes + 2 * PAGE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self._mapped)) + PAGE
        libc = ctypes.CDLL(None, use_errno=True)
        for page in (self.start - PAGE, self.start + self.nbytes):
            assert libc.mprotect(ctypes.c_void_p(page), PAGE, PROT_NONE) == 0, ctypes.get_errno()

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, at_end: bool) -> torch.Tensor:
        """A tensor that ends, or else begins, at a forbidden page."""
        count = torch.Size(shape).numel()
        nbytes = count * dtype.itemsize
        if not nbytes:
            return torch.empty(shape, dtype=dtype)
        assert nbytes <= self.nbytes
        start = self.start + (self.nbytes - nbytes if at_end else 0)
        buffer = (ctypes.c_char * nbytes).from_address(start)
        return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)


class Places:
    """One guarded buffer per role, used again for every case."""

    def __init__(self) -> None:
        self._of: dict[str, Guarded] = {}

    def __call__(self, role: str, value: torch.Tensor, at_end: bool) -> torch.Tensor:
        guarded = self._of.setdefault(role, Guarded(1 << 20))
        tensor = guarded.tensor(tuple(value.shape), value.dtype, at_end)
        tensor.copy_(value)
        return tensor


def check(made: int, case: Case, mode: Mode, dtype: torch.dtype, at_end: bool, place: Places) -> None:
    expected = torch.zeros(case.x.shape[0], case.out, dtype=dtype)
    assert into(made, case, expected, mode) == Status.OK
    guarded = replace(
        case,
        tensors=tuple(place(str(index), tensor, at_end) for index, tensor in enumerate(case.tensors)),
        x=place("x", case.x, at_end),
        bias=None if case.bias is None else place("bias", case.bias, at_end),
    )
    y = place("y", torch.zeros_like(expected), at_end)
    assert into(made, guarded, y, mode) == Status.OK
    assert torch.equal(y, expected), (case.scheme, case.x.shape, case.out, mode)
    if case.scheme is not None:
        rows = place("y", case.plain().to(dtype), at_end).zero_()
        kind = Dtype.F32 if dtype == torch.float32 else Dtype.BF16
        weight = ctypes.byref(argument(guarded))
        assert native().tk_dequantize(made, weight, 0, case.out, rows.data_ptr(), kind) == Status.OK
        assert torch.equal(rows, case.plain().to(dtype))


def main(level: Level) -> int:
    calls = 0
    place = Places()
    # (rows of weights, groups of a row, rows of x): tails of every kind, and a block of 1024 weights with a rest.
    shapes = [(1, 1, 1), (5, 3, 2), (18, 17, 7), (33, 2, 13), (3, 37, 1), (67, 5, 40)]
    biases = itertools.cycle([torch.bfloat16, torch.float32, None])
    dtypes = itertools.cycle([torch.float32, torch.bfloat16])
    with context(level, 2) as made:
        for scheme, (out, units, rows) in itertools.product(FORMATS, shapes):
            case = random_case(scheme, out, units, rows, next(biases))
            for mode, at_end in itertools.product(Mode, (True, False)):
                check(made, case, mode, next(dtypes), at_end, place)
                calls += 1
            next(dtypes)  # so that each way meets both
    print(f"{level.name}: {calls} calls")
    return 0
