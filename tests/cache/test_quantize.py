"""Pages in 8 and 4 bits: how far what codes stand for may be from what was given, and what cannot be told in codes."""

from collections.abc import Callable
from typing import Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.attention_cases import scatter
from tests.quick import examples
from tiered.cache.quantize import QuantizedPages, group_size, quantize_keys, quantize_values
from tiered.kernels import CacheFormat
from tiered.kernels.attention import PAGE_TOKENS

Quantize = Callable[[torch.Tensor, int], QuantizedPages]
FORMATS: Final[dict[tuple[Quantize, int], CacheFormat]] = {
    (quantize_keys, 8): CacheFormat.INT8_CHANNEL,
    (quantize_keys, 4): CacheFormat.INT4_CHANNEL,
    (quantize_values, 8): CacheFormat.INT8,
    (quantize_values, 4): CacheFormat.INT4,
}
BITS: Final = pytest.mark.parametrize("bits", [8, 4])
BOTH: Final = pytest.mark.parametrize("quantize", [quantize_keys, quantize_values])
WIDTHS: Final = (8, 64, 72, 80, 96, 128, 256)
FP16_SPACING: Final = 2.0**-10
SMALLEST: Final = 2.0**-24


def widened(pages: QuantizedPages, kind: CacheFormat, head_dim: int) -> torch.Tensor:
    """[pages, heads, 64, head_dim] float64: what attention takes the codes for."""
    view = scatter(kind, [part[None] for part in (pages.codes, pages.scale, pages.zero)], torch.Generator())
    shape = (pages.codes.shape[1], PAGE_TOKENS, head_dim)
    return torch.stack([view.widen(0, page, shape, False, torch.float64) for page in range(len(pages.codes))])


def roundtrip(quantize: Quantize, states: torch.Tensor, bits: int) -> torch.Tensor:
    """What `states` come back as, float64."""
    return widened(quantize(states, bits), FORMATS[quantize, bits], states.shape[-1])


def least_steps(quantize: Quantize, states: torch.Tensor, bits: int) -> torch.Tensor:
    """For each element, the least step between codes that cover all it shares a scale with.

    There are 2^bits codes, and none of them is more than 255 steps away from 0.
    """
    grouped, axis = states.double(), -2
    if quantize is quantize_values:
        grouped, axis = grouped.unflatten(-1, (-1, group_size(states.shape[-1]))), -1
    low, high = grouped.amin(axis, keepdim=True), grouped.amax(axis, keepdim=True)
    least = torch.maximum((high - low) / (2**bits - 1), torch.maximum(low.abs(), high.abs()) / 255)
    return least.expand(grouped.shape).reshape(states.shape)


def random_states(seed: int, head_dim: int, spread: float = 1.0, shift: float = 0.0, pages: int = 2) -> torch.Tensor:
    """Keys or values about `spread` apart, whose channels lie `shift` from 0."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(pages, 3, PAGE_TOKENS, head_dim, generator=generator) * spread
    states += torch.randn(1, 3, 1, head_dim, generator=generator) * shift
    return states.bfloat16()


@BITS
@BOTH
@examples(40)
@given(
    seed=st.integers(0, 1000),
    head_dim=st.sampled_from(WIDTHS),
    spread=st.sampled_from([0.0, 1e-30, 1e-7, 1e-4, 1.0, 300.0, 3e4]),
    shift=st.sampled_from([0.0, 1e-6, 1.0, 50.0, 3e4]),
)
def test_no_element_is_off_by_more_than_half_the_least_step(
    quantize: Quantize, bits: int, seed: int, head_dim: int, spread: float, shift: float
) -> None:
    states = random_states(seed, head_dim, spread, shift)
    allowed = least_steps(quantize, states, bits) * (1 + FP16_SPACING) + SMALLEST
    error = (roundtrip(quantize, states, bits) - states.double()).abs()
    assert bool((error <= 0.501 * allowed).all())


@BITS
@BOTH
@pytest.mark.parametrize("head_dim", WIDTHS)
def test_random_states_lose_what_so_many_bits_must_lose(quantize: Quantize, bits: int, head_dim: int) -> None:
    states = random_states(7, head_dim)
    error = (roundtrip(quantize, states, bits) - states.double()).norm() / states.double().norm()
    assert error < {8: 0.008, 4: 0.12}[bits]


@BITS
@pytest.mark.parametrize("sign", [1, -1])
def test_a_channel_far_from_zero_keeps_its_resolution(bits: int, sign: int) -> None:
    keys = sign * (5 + torch.rand(1, 1, PAGE_TOKENS, 8, generator=torch.Generator().manual_seed(0)))
    error = (roundtrip(quantize_keys, keys, bits) - keys.double()).abs().max()
    # In 4 bits a range of 1 has steps of 1 / 15; in 8 bits the zero is at most 255 steps away from 6.
    assert error <= {4: 0.51 / 15, 8: 0.51 * 6 / 255}[bits]


@BITS
@BOTH
@pytest.mark.parametrize("constant", [5.0, -3.1e-4, 250.0, -1e5])
def test_equal_states_come_back_within_a_500th(quantize: Quantize, bits: int, constant: float) -> None:
    states = torch.full((1, 2, PAGE_TOKENS, 16), constant)
    found = roundtrip(quantize, states, bits)
    assert torch.allclose(found, states.double(), rtol=0.002, atol=SMALLEST)


@BITS
@BOTH
def test_zeros_come_back_as_zeros(quantize: Quantize, bits: int) -> None:
    assert not roundtrip(quantize, torch.zeros(1, 2, PAGE_TOKENS, 16), bits).any()


@BITS
@BOTH
def test_a_large_state_leaves_those_that_do_not_share_its_scale_alone(quantize: Quantize, bits: int) -> None:
    states = random_states(3, 128, pages=1)
    before = roundtrip(quantize, states, bits)
    states[0, 0, 5, 9] = 1000.0
    after = roundtrip(quantize, states, bits)
    alone = torch.ones_like(states, dtype=torch.bool)
    if quantize is quantize_keys:
        alone[0, 0, :, 9] = False
    else:
        alone[0, 0, 5, :64] = False
    assert torch.equal(after[alone], before[alone])
    assert abs(float(after[0, 0, 5, 9]) - 1000) < 1000 / (2**bits - 1)


@BITS
@BOTH
@pytest.mark.parametrize("huge", [3e38, -3e38, float("inf"), float("-inf")])
def test_states_too_large_for_any_scale_become_very_large(quantize: Quantize, bits: int, huge: float) -> None:
    states = random_states(4, 64, pages=1)
    states[0, 1, 7, 3] = huge
    found = roundtrip(quantize, states, bits)
    assert bool(found.isfinite().all())
    assert abs(float(found[0, 1, 7, 3])) > 1e5
    assert (found[0, 1, 7, 3] > 0) == (huge > 0)


@BITS
@BOTH
def test_a_state_that_is_no_number_shows_and_does_not_spread(quantize: Quantize, bits: int) -> None:
    states = random_states(5, 64)
    before = roundtrip(quantize, states, bits)
    states[0, 1, 7, 3] = float("nan")
    after = roundtrip(quantize, states, bits)
    assert bool(after[0, 1, 7, 3].isnan())
    assert torch.equal(after[0, 0], before[0, 0]) and torch.equal(after[1], before[1])


@BITS
@BOTH
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_a_page_is_the_same_bits_alone_and_among_others(quantize: Quantize, bits: int, head_dim: int) -> None:
    states = random_states(6, head_dim, 2.0, 3.0, pages=9)
    together = quantize(states, bits)
    # Strided, as slices of a sequence are: [heads, 9 * 64, head_dim] in every second place.
    sequence = states.transpose(0, 1).flatten(1, 2).repeat_interleave(2, 1)[:, ::2]
    for page in range(9):
        alone = quantize(sequence[None, :, page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS], bits)
        for name in ("codes", "scale", "zero"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[page])
