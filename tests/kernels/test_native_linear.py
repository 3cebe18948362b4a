"""The native linear kernels, at every level this CPU has: right, invariant, within bounds, and stopped when asked."""

import ctypes
import os
import signal
import time
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import guard_pages
from tests.kernels.native_linear import (
    CODEBOOKS,
    FORMATS,
    SCHEMES,
    Case,
    argument,
    context,
    into,
    native,
    random_case,
    relative_error,
    require,
    run,
    seconds_until_ended,
)
from tests.quick import examples
from tests.waiting import SECONDS
from tests.warm import call_warm
from tiered.errors import InterruptedRun
from tiered.kernels import CancelFlag, Kernels, Level, Mode, packed_row_nbytes, reference, scratch_nbytes
from tiered.kernels.library import Dtype, Status
from tiered.quant import GroupScheme, QuantizedWeight, Scheme, quantize

pytestmark = pytest.mark.inputs("tiered/kernels", "tiered/quant", "tests/kernels")

TOLERANCE = 3e-3
FAST_TOLERANCE = 1e-2
"""Activations in 8 bits, documented at 6e-3 over a whole layer of normal ones; single rows vary."""
OUTLIER_TOLERANCE = 2.5e-2
BIASES = [None, torch.bfloat16, torch.float32]


@pytest.fixture(scope="module", params=list(Level), ids=lambda level: level.name)
def level(request: pytest.FixtureRequest) -> Level:
    found: Level = request.param
    require(found)
    return found


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return random_case(
        draw(st.sampled_from(FORMATS)),
        out=draw(st.integers(1, 100)),
        # Below, at and beyond what the kernels take in one piece, with odd numbers of groups.
        units=draw(st.one_of(st.integers(1, 9), st.integers(15, 37))),
        rows=draw(st.one_of(st.integers(1, 20), st.integers(21, 130))),
        bias=draw(st.sampled_from(BIASES)),
        padding=draw(st.sampled_from([0, 1, 32])),
        seed=draw(st.integers(0, 2**31)),
    )


@examples(40)
@given(case=cases())
def test_the_scalar_level_computes_what_the_weights_stand_for(case: Case) -> None:
    require(Level.SCALAR)
    assert relative_error(run(Level.SCALAR, case), case.exact(), case) < 1e-5


@examples(40)
@given(data=st.data(), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_every_level_is_close_to_the_scalar_one(level: Level, data: st.DataObject, dtype: torch.dtype) -> None:
    case = data.draw(cases())
    assert relative_error(run(level, case, dtype=dtype), run(Level.SCALAR, case, dtype=dtype), case) <= TOLERANCE


@examples(40)
@given(data=st.data())
def test_fast_mode_stays_within_its_documented_error(level: Level, data: st.DataObject) -> None:
    case = data.draw(cases())
    assert relative_error(run(level, case, Mode.FAST), run(Level.SCALAR, case), case) <= FAST_TOLERANCE


@examples(30)
@given(data=st.data())
def test_a_row_is_the_same_bits_alone_in_any_batch_and_at_any_number_of_threads(
    level: Level, data: st.DataObject
) -> None:
    case = data.draw(cases())
    whole = run(level, case, threads=1)
    for threads in (2, 3):
        assert torch.equal(run(level, case, threads=threads), whole)
    rows = case.x.shape[0]
    start = data.draw(st.integers(0, rows - 1))
    for count in {1, 2, 5, 7, 17, 33, data.draw(st.integers(1, rows))}:
        part = Case(case.scheme, case.tensors, case.x[start : start + count], case.bias)
        assert torch.equal(run(level, part), whole[start : start + count])


@examples(20)
@given(data=st.data(), mode=st.sampled_from(Mode))
def test_ranges_of_a_weight_s_rows_give_the_bits_of_the_whole(level: Level, data: st.DataObject, mode: Mode) -> None:
    case = data.draw(cases())
    whole = run(level, case, mode)
    cuts = sorted({0, case.out, *data.draw(st.lists(st.integers(0, case.out // 16).map(lambda n: 16 * n), max_size=3))})
    for start, stop in pairwise(cuts):
        bias = None if case.bias is None else case.bias[start:stop]
        part = Case(case.scheme, tuple(tensor[start:stop] for tensor in case.tensors), case.x, bias)
        assert torch.equal(run(level, part, mode), whole[:, start:stop])


@pytest.mark.parametrize("rows", [255, 256, 257, 513])
def test_blocks_of_rows_leave_no_trace(level: Level, rows: int) -> None:
    case = random_case(GroupScheme(4), out=9, units=17, rows=rows)
    whole = run(level, case)
    for at in (0, 127, 128, 254, rows - 1):
        alone = Case(case.scheme, case.tensors, case.x[at : at + 1])
        assert torch.equal(run(level, alone)[0], whole[at])


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_outliers_among_the_channels_do_no_harm(level: Level, scheme: Scheme) -> None:
    case = with_outliers(scheme)
    exact = case.exact()
    assert error(run(level, case), exact) <= TOLERANCE
    assert error(run(level, case, Mode.FAST), exact) <= OUTLIER_TOLERANCE
    # What one scale per token makes of the same activations: the outliers leave a few steps for all the others.
    step = case.x.float().abs().amax(dim=1, keepdim=True) / 127
    naive = (case.x.float() / step).round() * step
    assert error(naive.double() @ case.plain().double().T, exact) > 5e-2


def test_one_row_with_outliers_is_no_worse(level: Level) -> None:
    many = with_outliers(GroupScheme(4))
    case = Case(many.scheme, many.tensors, many.x[:1])
    assert error(run(level, case), case.exact()) <= TOLERANCE
    assert error(run(level, case, Mode.FAST), case.exact()) <= OUTLIER_TOLERANCE


@pytest.mark.parametrize("mode", Mode)
def test_zeros_of_4_bits_may_be_16_as_in_gptq(level: Level, mode: Mode) -> None:
    for rows in (1, 9):
        case = random_case(GroupScheme(4, 32), out=40, units=9, rows=rows)
        case.tensors[2].fill_(16)
        assert (
            relative_error(run(level, case, mode), case.exact(), case)
            <= (FAST_TOLERANCE, TOLERANCE)[mode is Mode.INVARIANT]
        )


def with_outliers(scheme: Scheme) -> Case:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(192, 4096, generator=generator)
    x = torch.randn(16, 4096, generator=generator)
    x[:, torch.randperm(4096, generator=generator)[:6]] *= 60
    return Case(scheme, tuple(quantize(weight, scheme)), x.bfloat16())


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.timeout(300)
def test_nothing_beyond_a_buffer_is_touched(level: Level, tmp_path: Path) -> None:
    """In a process of its own, because what this test finds is a segmentation fault."""
    done = call_warm(tmp_path, guard_pages.main, level, seconds=280)
    assert done.code == 0, f"exit status {done.code}: {(done.out + done.err)[-2000:]}"
    assert done.out.strip().endswith("calls"), done.out


@pytest.mark.parametrize("mode", Mode)
def test_a_flag_set_beforehand_stops_before_the_first_item(level: Level, mode: Mode) -> None:
    case = random_case(GroupScheme(4), out=64, units=4, rows=3)
    cancel = CancelFlag()
    with Kernels(2, cancel, mode, level.name.lower()) as kernels:
        expected = kernels.linear(case.x, case.weight)
        cancel.set()
        with pytest.raises(InterruptedRun):
            kernels.linear(case.x, case.weight)
        cancel.clear()
        assert torch.equal(kernels.linear(case.x, case.weight), expected)


def test_a_flag_set_during_a_long_call_ends_it_soon(level: Level) -> None:
    case = random_case(GroupScheme(4), out=4096, units=64, rows=1536)
    cancel = CancelFlag()
    with Kernels(2, cancel, name=level.name.lower()) as kernels:
        assert seconds_until_ended(lambda: kernels.linear(case.x, case.weight), cancel) < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@examples(15)
@given(data=st.data())
def test_dequantized_rows_have_the_bits_of_the_reference(level: Level, data: st.DataObject, dtype: torch.dtype) -> None:
    scheme = data.draw(st.sampled_from(SCHEMES))
    case = random_case(scheme, data.draw(st.integers(1, 40)), data.draw(st.integers(1, 20)), 1)
    case.tensors[1][0] = 0  # where a code is below its zero, this makes a negative zero
    assert isinstance(case.weight, QuantizedWeight)
    start = data.draw(st.integers(0, case.out - 1))
    stop = data.draw(st.integers(start + 1, case.out))
    with Kernels(2, name=level.name.lower()) as kernels:
        found = kernels.dequantize(case.weight, start, stop, dtype)
    expected = case.weight.rows(start, stop, dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert found.dtype == dtype and torch.equal(found.view(bits), expected.view(bits))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_other_dtypes_of_x_get_what_the_reference_computes(
    level: Level, scheme: Scheme, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PANEL_WEIGHTS", 4000)  # several panels, with a tail
    case = random_case(scheme, out=31, units=5, rows=rows, bias=torch.float32)
    assert case.bias is not None
    x, bias = case.x.to(dtype), case.bias.to(dtype)
    with Kernels(2, name=level.name.lower()) as kernels:
        assert torch.equal(kernels.linear(x, case.weight, bias), reference.linear(x, case.weight, bias))


def test_x_of_any_shape_and_stride_is_taken(level: Level) -> None:
    case = random_case(GroupScheme(8), out=11, units=3, rows=24, bias=torch.bfloat16)
    with Kernels(2, name=level.name.lower()) as kernels:
        expected = kernels.linear(case.x, case.weight, case.bias)
        shaped = kernels.linear(case.x.reshape(2, 3, 4, -1), case.weight, case.bias)
        assert torch.equal(shaped, expected.reshape(2, 3, 4, 11))
        transposed = case.x.t().contiguous().t()
        assert torch.equal(kernels.linear(transposed, case.weight, case.bias), expected)
        assert torch.equal(kernels.linear(case.x[::5], case.weight, case.bias), expected[::5])
        assert torch.equal(kernels.linear(case.x[:1].expand(3, -1), case.weight, case.bias), expected[:1].expand(3, -1))
        assert kernels.linear(case.x[:0], case.weight, case.bias).shape == (0, 11)


def test_a_forked_child_computes_the_same_bits(level: Level) -> None:
    case = random_case(GroupScheme(4), out=70, units=9, rows=8)
    expected, found = torch.empty(8, 70), torch.zeros(8, 70)
    with context(level, 3) as made:
        assert into(made, case, expected) == Status.OK
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: that is the point
            child = os.fork()
        if child == 0:
            status = into(made, case, found)
            size = found.numel() * 4
            same = ctypes.string_at(found.data_ptr(), size) == ctypes.string_at(expected.data_ptr(), size)
            os._exit(0 if status == Status.OK and same else 1)
        assert waited(child) == 0
        found.zero_()
        assert into(made, case, found) == Status.OK  # and the parent's threads still serve
        assert torch.equal(found, expected)


def waited(child: int) -> int:
    """The child's exit status; kills it if it hangs."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("rows", [1, 5, 64, 300])
def test_scratch_stays_within_its_announced_bounds_and_can_be_given_back(level: Level, mode: Mode, rows: int) -> None:
    case = random_case(GroupScheme(4), out=130, units=65, rows=rows)
    library, y = native(), torch.empty(rows, 130)
    with context(level, 2) as made:
        for _ in range(2):
            assert into(made, case, y, mode) == Status.OK
            held = library.tk_scratch_nbytes(made)
            assert held <= scratch_nbytes(2) + rows * packed_row_nbytes(case.x.shape[1])
            library.tk_trim(made)
            assert library.tk_scratch_nbytes(made) == 0


def test_arguments_that_make_no_sense_are_refused() -> None:
    require(Level.SCALAR)
    case = random_case(GroupScheme(4), out=4, units=2, rows=2)
    with context(Level.SCALAR, 1) as made:
        assert into(made, case, torch.empty(2, 4)) == Status.OK
        assert into(made, case, torch.empty(2, 3)) == Status.BAD_ARGUMENT  # rows of y that overlap
        odd = Case(GroupScheme(4, 128), case.tensors, case.x[:, :64])  # half a group
        assert into(made, odd, torch.empty(2, 4)) == Status.BAD_ARGUMENT
        library, out = native(), torch.empty(4, 128)
        for first, rows in ((-1, 1), (0, 5), (4, 1), (2, -1)):
            weight = ctypes.byref(argument(case))
            status = library.tk_dequantize(made, weight, first, rows, out.data_ptr(), Dtype.F32)
            assert status == Status.BAD_ARGUMENT, (first, rows)


@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("scheme", [GroupScheme(4), GroupScheme(8), *CODEBOOKS[:2], None], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none_and_in_its_own_row(
    level: Level, scheme: Scheme | None, mode: Mode, bad: float
) -> None:
    for rows in (1, 3, 9, 40):
        case = random_case(scheme, out=40, units=5, rows=rows)
        clean = run(level, case, mode)
        case.x[rows // 2, 17] = bad
        found = run(level, case, mode)
        assert not bool(found[rows // 2].isfinite().any())
        others = [row for row in range(rows) if row != rows // 2]
        assert torch.equal(found[others], clean[others])
