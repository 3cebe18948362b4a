"""Codebooks: what codes stand for, the nearest ones, and scales that are exponents."""

import pytest
import torch

from tiered.errors import CheckpointError, ConfigError
from tiered.quant import CODEBOOKS, CodebookScheme, QuantizedWeight, Scheme, dequantize, pack_int4, quantize

SCHEMES = [CodebookScheme("mxfp4", 32), CodebookScheme("nf4", 64), CodebookScheme("iq4nl", 32)]
each = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def codes_of(scheme: CodebookScheme) -> torch.Tensor:
    """Two rows of two groups, every code in each."""
    return torch.arange(16, dtype=torch.uint8).repeat(2, 2 * scheme.group_size // 16)


@each
def test_a_weight_is_its_entry_times_its_scale_in_float32(scheme: CodebookScheme) -> None:
    codes = codes_of(scheme)
    scale = torch.tensor([[100, 130], [1, 127]], dtype=torch.uint8)
    expected_scale = torch.tensor([[2.0**-27, 8.0], [2.0**-126, 1.0]])
    if scheme.scale_dtype != torch.uint8:
        scale = expected_scale = torch.tensor([[0.37, -1.5], [2.0**-24, 300.0]]).to(scheme.scale_dtype)
    packed, none = pack_int4(codes, scheme.group_size), torch.empty(2, 0, dtype=torch.uint8)
    values = torch.tensor(CODEBOOKS[scheme.codebook].values)[codes.int()]
    expected = values * expected_scale.float().repeat_interleave(scheme.group_size, 1)
    assert torch.equal(dequantize(packed, scale, none, scheme), expected)
    out = torch.empty(2, codes.shape[1], dtype=torch.bfloat16)
    assert torch.equal(dequantize(packed, scale, none, scheme, out=out), expected.bfloat16())


def test_scales_that_are_exponents_reach_from_subnormal_numbers_to_no_number() -> None:
    scheme = SCHEMES[0]
    one = pack_int4(torch.full((3, 32), 2, dtype=torch.uint8), 32)
    scale = torch.tensor([[0], [254], [255]], dtype=torch.uint8)
    found = dequantize(one, scale, torch.empty(3, 0, dtype=torch.uint8), scheme)[:, 0]
    assert found[:2].tolist() == [2.0**-127, 2.0**127] and bool(found[2].isnan())


@each
def test_quantizing_takes_the_nearest_entry_and_keeps_what_a_codebook_can_hold(scheme: CodebookScheme) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 4 * scheme.group_size, generator=generator)
    weight[2, : scheme.group_size] = 0
    packed = quantize(weight, scheme)
    held = QuantizedWeight(packed, scheme).rows(0, 7, torch.float32)
    wide = torch.tensor(scheme.values.values)
    step = float((wide.sort().values.diff().max() / wide.abs().max()) / 2)
    largest = weight.unflatten(1, (-1, scheme.group_size)).abs().amax(-1).repeat_interleave(scheme.group_size, 1)
    # MXFP4 cuts off up to a quarter of the largest magnitude, and iq4nl's positive end is at 113 of 127.
    assert bool(((held - weight).abs() <= max(step, 0.25) * largest).all())
    assert 0.05 < float((held - weight).norm() / weight.norm()) < 0.15
    again = quantize(held, scheme)
    if scheme.codebook != "mxfp4":  # where the largest entry may not have been taken, scales differ
        assert torch.equal(QuantizedWeight(again, scheme).rows(0, 7, torch.float32), held)
    assert packed.zero.shape == (7, 0) and packed.scale.dtype == scheme.scale_dtype


@each
def test_weights_that_are_no_numbers_and_parts_of_other_shapes_are_refused(scheme: CodebookScheme) -> None:
    weight = torch.ones(2, 2 * scheme.group_size)
    q, scale, zero = quantize(weight, scheme)
    for bad in (torch.inf, torch.nan):
        weight[1, 3] = bad
        with pytest.raises(CheckpointError, match="finite"):
            quantize(weight, scheme)
    with pytest.raises(ConfigError, match="scales of"):
        dequantize(q, scale.double(), zero, scheme)
    with pytest.raises(ConfigError, match="expected shapes"):
        dequantize(q, scale, scale.to(torch.uint8), scheme)


def test_an_unknown_codebook_is_refused() -> None:
    with pytest.raises(ConfigError, match="nf4"):
        CodebookScheme("nf5", 64)
    assert Scheme.parse("nf4-g64") is Scheme.parse("nf4-g64")
