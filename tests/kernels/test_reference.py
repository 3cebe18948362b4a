"""The reference kernel: what torch computes on the dequantized weight, in any panel size, and a place to stop."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from tests.quick import examples
from tests.store.make import random_quantized
from tiered.errors import InterruptedRun
from tiered.kernels import CancelFlag, reference
from tiered.kernels.reference import linear, scratch_nbytes
from tiered.quant import GroupScheme, QuantizedWeight, dequantize

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of a few rows, so that small weights have many."""
    monkeypatch.setattr(reference, "PANEL_WEIGHTS", 1000)
    monkeypatch.setattr(reference, "DENSE_PANEL_NBYTES", 4000)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of additions, whose error is a share of what is added: of the largest results."""
    tolerance = 1e-5 if expected.dtype == torch.float32 else 2e-2
    atol = tolerance * max([1.0, *expected.abs().flatten().tolist()])
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=atol)


@examples(40)
@given(
    rows=st.integers(1, 37),
    groups=st.integers(1, 5),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(1, 5),
    with_bias=st.booleans(),
    panel=st.sampled_from([1, 300, 1 << 20]),
)
def test_quantized_weights_count_as_what_they_stand_for(
    rows: int, groups: int, bits: int, group_size: int, dtype: torch.dtype, tokens: int, with_bias: bool, panel: int
) -> None:
    scheme = GroupScheme(bits, group_size)
    codes = random_quantized(rows, groups * group_size, scheme)
    x = torch.randn(tokens, groups * group_size).to(dtype)
    bias = torch.randn(rows).to(dtype) if with_bias else None
    expected = functional.linear(x, dequantize(*codes, scheme, dtype), bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "PANEL_WEIGHTS", panel)
        found = linear(x, QuantizedWeight(codes, scheme), bias)
    assert found.dtype == dtype and found.shape == expected.shape
    assert_close(found, expected)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 13), (129, 65), (50, 2001)])
@pytest.mark.usefixtures("small_panels")
def test_plain_weights_of_any_dtype_are_widened_or_used_as_they_are(
    rows: int, columns: int, weight_dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    x, weight = torch.randn(3, columns).to(x_dtype), (torch.randn(rows, columns) / columns**0.5).to(weight_dtype)
    found = linear(x, weight)
    assert found.dtype == x_dtype
    assert_close(found, functional.linear(x, weight.to(x_dtype)))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.usefixtures("small_panels")
def test_x_may_have_any_number_of_dimensions(shape: tuple[int, ...], bits: int) -> None:
    x = torch.randn(*shape, 128)
    if bits == 16:
        weight: torch.Tensor | QuantizedWeight = torch.randn(30, 128)
        plain = weight
    else:
        scheme = GroupScheme(bits)
        codes = random_quantized(30, 128, scheme)
        weight, plain = QuantizedWeight(codes, scheme), dequantize(*codes, scheme)
    assert isinstance(plain, torch.Tensor)
    assert_close(linear(x, weight), functional.linear(x, plain))


def test_a_dense_weight_is_not_copied() -> None:
    weight = torch.randn(64, 64)
    x = torch.eye(64)
    assert torch.equal(linear(x, weight), functional.linear(x, weight))


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.usefixtures("small_panels")
def test_a_set_flag_stops_between_panels(quantized: bool) -> None:
    scheme = GroupScheme(4)
    weight = QuantizedWeight(random_quantized(64, 128, scheme), scheme) if quantized else torch.randn(64, 128)
    cancel = CancelFlag()
    x = torch.randn(2, 128)
    expected = linear(x, weight)
    assert torch.equal(linear(x, weight, cancel=cancel), expected)
    cancel.set()
    with pytest.raises(InterruptedRun):
        linear(x, weight, cancel=cancel)
    cancel.clear()
    assert torch.equal(linear(x, weight, cancel=cancel), expected)


@pytest.mark.usefixtures("small_panels")
def test_a_flag_set_while_computing_stops_within_a_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    cancel, panels = CancelFlag(), 0
    real = functional.linear

    def counted(*args: torch.Tensor) -> torch.Tensor:
        nonlocal panels
        panels += 1
        if panels == 2:
            thread = threading.Thread(target=cancel.set)
            thread.start()
            thread.join()
        return real(*args)

    monkeypatch.setattr(functional, "linear", counted)
    with pytest.raises(InterruptedRun):
        linear(torch.randn(2, 128), torch.randn(640, 128), cancel=cancel)
    assert panels == 2


def test_scratch_covers_what_a_panel_takes() -> None:
    assert scratch_nbytes() >= 4 * 4 * (1 << 20)
