"""Quantizing: the documented arithmetic bit for bit, its bounds, and what cannot be quantized."""

import importlib
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from tiered.errors import CheckpointError, ConfigError
from tiered.quant import GroupScheme, QuantizedTensor, dequantize, quantize, unpack_int4
from tiered.quant.quantize import CLIP_FACTORS

Clip = Literal["mse", "minmax"]

INT4, INT8 = GroupScheme(4), GroupScheme(8)
SCHEMES = [GroupScheme(bits, group_size) for bits in (4, 8) for group_size in (32, 64, 128)]
MODULE = importlib.import_module("tiered.quant.quantize")  # the package's attribute is the function


def weights(rows: int, columns: int, seed: int = 0, magnitude: float = 0.02) -> Tensor:
    """Heavy-tailed random weights: some groups gain from clipping, some do not."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    return values * (1 + values.abs()) * magnitude


def codes_of(quantized: QuantizedTensor, scheme: GroupScheme) -> Tensor:
    return unpack_int4(quantized.q, scheme.group_size) if scheme.bits == 4 else quantized.q


def per_group(tensor: Tensor, scheme: GroupScheme) -> Tensor:
    return tensor.unflatten(1, (-1, scheme.group_size))  # type: ignore[no-any-return]


def naive(group: NDArray[np.float32], scheme: GroupScheme, factors: tuple[float, ...]) -> tuple[list[int], float, int]:
    """Codes, scale and zero of one group, written from the module's docstring, one number at a time."""
    f32, n = np.float32, np.float32(scheme.max_code)
    low, high = min(f32(0), group.min()), max(f32(0), group.max())
    best = None
    for factor in factors:
        lo, hi = low * f32(factor), high * f32(factor)
        scale = f32(np.float16((hi - lo) / n))
        if hi > lo and scale == 0:
            scale = f32(2.0**-24)
        inverse = f32(1) / scale if hi > lo else f32(0)
        zero = min(np.rint(-lo * inverse), n)
        levels = [min(max(np.rint(weight * inverse), -zero), n - zero) for weight in group]
        errors = [
            (weight - level * scale) * (weight - level * scale) for weight, level in zip(group, levels, strict=True)
        ]
        while len(errors) > 1:
            half = len(errors) // 2
            errors = [errors[i] + errors[half + i] for i in range(half)]
        if best is None or errors[0] < best[0]:
            best = errors[0], [int(level + zero) for level in levels], float(scale), int(zero)
    assert best is not None
    return best[1:]


@pytest.mark.parametrize("clip", ["mse", "minmax"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_every_bit_follows_from_the_documented_arithmetic(scheme: GroupScheme, clip: Clip) -> None:
    weight = torch.cat([weights(3, 256, magnitude=m) for m in (0.02, 3e-6, 1e-8, 1e-42, 300.0)])
    weight[0] = weight[0].abs()
    weight[1] = -weight[1].abs()
    quantized = quantize(weight, scheme, clip=clip)
    factors = CLIP_FACTORS if clip == "mse" and scheme.bits == 4 else (1.0,)
    found = zip(
        per_group(weight, scheme).flatten(0, 1).numpy(),
        per_group(codes_of(quantized, scheme), scheme).flatten(0, 1).tolist(),
        quantized.scale.flatten().tolist(),
        quantized.zero.flatten().tolist(),
        strict=True,
    )
    for group, codes, scale, zero in found:
        assert (codes, scale, zero) == naive(group, scheme, factors)


def test_layout_of_a_hand_written_weight() -> None:
    weight = torch.zeros(2, 64)
    weight[0, 0], weight[0, 1], weight[0, 32], weight[0, 63] = -4.0, 3.5, 1.0, -0.5
    weight[1, 2] = 7.5
    quantized = quantize(weight, INT4, clip="minmax")
    assert quantized.scale.tolist() == [[0.5], [0.5]]
    assert quantized.zero.tolist() == [[8], [0]]
    # Byte i holds value i in its low nibble and value 32 + i in its high one.
    assert quantized.q[0].tolist() == [0xA0, 0x8F] + [0x88] * 29 + [0x78]
    assert quantized.q[1].tolist() == [0, 0, 0x0F] + [0] * 29
    assert torch.equal(dequantize(*quantized, INT4), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_shapes_and_dtypes_are_the_schemes(scheme: GroupScheme, dtype: torch.dtype) -> None:
    quantized = quantize(weights(5, 384).to(dtype), scheme)
    assert quantized.q.shape == scheme.q_shape(5, 384)
    assert quantized.scale.shape == quantized.zero.shape == scheme.scale_shape(5, 384)
    assert [tensor.dtype for tensor in quantized] == [torch.uint8, torch.float16, torch.uint8]
    assert sum(tensor.nbytes for tensor in quantized) == scheme.nbytes(5, 384)
    assert codes_of(quantized, scheme).max() <= scheme.max_code
    assert quantized.zero.max() <= scheme.max_code
    assert dequantize(*quantized, scheme, dtype).dtype == dtype


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), exponent=st.integers(-30, 12), scheme=st.sampled_from(SCHEMES))
def test_minmax_errs_by_at_most_half_a_step(seed: int, exponent: int, scheme: GroupScheme) -> None:
    weight = weights(3, 256, seed, magnitude=2.0**exponent)
    quantized = quantize(weight, scheme, clip="minmax")
    error = per_group((weight - dequantize(*quantized, scheme)).abs(), scheme).double()
    groups = per_group(weight, scheme).double()
    scale = quantized.scale.double().unsqueeze(-1)
    exact = (groups.amax(-1, True).clamp(min=0) - groups.amin(-1, True).clamp(max=0)) / scheme.max_code
    # What rounding the scale down to fp16 takes from the range comes on top.
    assert (error <= scale * 0.5001 + scheme.max_code * (exact - scale).clamp(min=0)).all()


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), group_size=st.sampled_from([32, 64, 128]))
def test_clipping_never_loses_to_minmax_in_any_group(seed: int, group_size: int) -> None:
    scheme = GroupScheme(4, group_size)
    weight = weights(8, 256, seed)
    error = {}
    for clip in ("mse", "minmax"):
        approximation = dequantize(*quantize(weight, scheme, clip=clip), scheme)
        error[clip] = per_group((weight.double() - approximation.double()).square(), scheme).sum(-1)
    assert (error["mse"] <= error["minmax"] * (1 + 1e-5)).all()


def test_clipping_pays_on_gaussian_weights() -> None:
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    clipped, full = (
        (weight - dequantize(*quantize(weight, INT4, clip=clip), INT4)).square().sum() for clip in ("mse", "minmax")
    )
    assert clipped < 0.94 * full


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_zero_groups_are_zero_bytes(scheme: GroupScheme) -> None:
    weight = weights(2, 256)
    weight[0] = 0.0
    weight[1, 128:] = -0.0
    quantized = quantize(weight, scheme)
    assert not quantized.q[0].any() and not quantized.scale[0].any() and not quantized.zero[0].any()
    approximation = dequantize(*quantized, scheme)
    assert not approximation[0].any() and not approximation[1, 128:].any()
    assert approximation[1, :128].any()


@pytest.mark.parametrize("value", [0.37, -0.37, 1e-6, -2e4])
@pytest.mark.parametrize("scheme", [INT4, INT8], ids=lambda scheme: scheme.name)
def test_a_constant_group_keeps_its_value(scheme: GroupScheme, value: float) -> None:
    approximation = dequantize(*quantize(torch.full((1, 64), value), scheme), scheme)
    # As closely as fp16 holds the scale, which is coarse where fp16 is subnormal.
    tolerance = scheme.max_code * 2.0**-25
    assert torch.allclose(approximation, torch.full((1, 64), value), rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("magnitude", [1e-7, 1e-10, 1e-40, 1e-45])
@pytest.mark.parametrize("scheme", [INT4, INT8], ids=lambda scheme: scheme.name)
def test_groups_below_fp16_stay_finite_and_tiny(scheme: GroupScheme, magnitude: float) -> None:
    weight = weights(4, 64, magnitude=magnitude)
    quantized = quantize(weight, scheme)
    approximation = dequantize(*quantized, scheme)
    assert approximation.isfinite().all()
    # Half a step of the least scale, or what rounding a subnormal scale takes from the range.
    assert (approximation - weight).abs().max() <= (scheme.max_code + 1) * 2.0**-25


@pytest.mark.parametrize(("scheme", "largest"), [(INT4, 65504 * 15), (INT8, 65504 * 255)])
def test_a_scale_beyond_fp16_is_refused_by_name(scheme: GroupScheme, largest: int) -> None:
    weight = torch.zeros(2, 64)
    weight[1, 5] = largest
    assert torch.equal(dequantize(*quantize(weight, scheme), scheme), weight)
    for too_large in (largest * 1.001, 3e38):
        weight[1, 5], weight[1, 6] = too_large, -too_large
        with pytest.raises(CheckpointError, match=r"fc1\.weight: .*scales fit fp16"):
            quantize(weight, scheme, name="fc1.weight")


@pytest.mark.parametrize("clip", ["mse", "minmax"])
@pytest.mark.parametrize("scheme", [INT4, INT8], ids=lambda scheme: scheme.name)
def test_weights_that_are_not_finite_are_counted(scheme: GroupScheme, clip: Clip) -> None:
    weight = weights(4, 128).to(torch.bfloat16)
    weight[0, 3], weight[2, 7], weight[3, 127] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(CheckpointError, match="found 3 of 512 that are NaN or infinite"):
        quantize(weight, scheme, clip=clip)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="median"):
        quantize(weights(2, 64), INT4, clip="median")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"\[2, 100\]"):
        quantize(weights(2, 100), INT4)
    with pytest.raises(ConfigError, match=r"torch\.int64"):
        quantize(torch.zeros(2, 64, dtype=torch.int64), INT4)
    with pytest.raises(ConfigError, match="expected shapes"):
        dequantize(*quantize(weights(2, 64), INT4), INT8)


@pytest.mark.parametrize("panel_bytes", [1, 3 * 256 * 4, 1 << 30])
@pytest.mark.parametrize("scheme", [INT4, INT8], ids=lambda scheme: scheme.name)
def test_results_do_not_depend_on_the_panel(
    scheme: GroupScheme, panel_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weights(50, 256)
    expected = quantize(weight, scheme)
    approximation = dequantize(*expected, scheme)
    monkeypatch.setattr(MODULE, "PANEL_BYTES", panel_bytes)
    assert all(map(torch.equal, quantize(weight, scheme), expected))
    assert torch.equal(dequantize(*expected, scheme), approximation)


def test_results_do_not_depend_on_threads() -> None:
    weight = weights(512, 2048)
    expected = quantize(weight, INT4)
    torch.set_num_threads(2)
    assert all(map(torch.equal, quantize(weight, INT4), expected))


def test_a_transposed_weight_is_quantized_as_its_copy() -> None:
    weight = weights(128, 192).t()  # as Conv1D stores it
    scheme = GroupScheme(4, 32)
    assert all(map(torch.equal, quantize(weight, scheme), quantize(weight.contiguous(), scheme)))


def test_results_do_not_depend_on_torchs_default_dtype() -> None:
    weight = weights(4, 128)
    expected = quantize(weight, INT4)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)  # as transformers does while it loads
        assert all(map(torch.equal, quantize(weight, INT4), expected))
    finally:
        torch.set_default_dtype(default)


def test_a_parameter_is_quantized_as_its_data() -> None:
    weight = torch.nn.Parameter(weights(4, 128))
    assert all(map(torch.equal, quantize(weight, INT4), quantize(weight.data, INT4)))


@pytest.mark.parametrize("scheme", [INT4, INT8], ids=lambda scheme: scheme.name)
def test_row_panels_dequantize_on_their_own(scheme: GroupScheme) -> None:
    q, scale, zero = quantize(weights(20, 256), scheme)
    whole = dequantize(q, scale, zero, scheme)
    assert torch.equal(dequantize(q[3:11], scale[3:11], zero[3:11], scheme), whole[3:11])


def test_dequantizing_rounds_once() -> None:
    quantized = quantize(weights(20, 256), INT8)
    whole = dequantize(*quantized, INT8)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(*quantized, INT8, dtype), whole.to(dtype))
