"""Sampling: the distribution asked for, the same tokens for the same seed whatever else runs, clear refusals."""

import re
from typing import Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.quick import examples, represented
from tiered.errors import ConfigError, ModelError
from tiered.generate import Sampler, SamplingParams

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
DRAWS = 2000


def sampler(request: int = 0, **params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), request)


def draw(found: Sampler, count: int, logits: torch.Tensor = LOGITS) -> list[int]:
    return [found([1, 2], logits, index) for index in range(count)]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draw(sampler(), 3) == [0, 0, 0]
    assert sampler()([1], torch.tensor([0.0, 3.0, 3.0]), 0) == 1


def test_greedy_ignores_seed_and_truncations() -> None:
    for seed in range(5):
        assert draw(sampler(seed=seed, top_k=2, top_p=0.1, min_p=0.9), 1) == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_gives_the_same_tokens(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)
    first, again, other = (draw(sampler(temperature=1.0, seed=seed), 50, logits) for seed in (7, 7, 8))
    assert first == again != other


def test_what_is_drawn_depends_on_request_and_index_alone() -> None:
    first, second = (sampler(request, temperature=1.0) for request in (0, 1))
    alone = draw(first, 50)
    interleaved = []
    for index in range(50):
        second([3], LOGITS, index)
        interleaved.append(first([9, 9, 9], LOGITS, index))
    assert interleaved == alone != draw(second, 50)
    assert first([], LOGITS, 17) == alone[17]


def test_seeds_may_be_as_large_as_they_are_allowed_to_be() -> None:
    assert draw(sampler(temperature=1.0, seed=(1 << 64) - 1), 3)


def expected_distribution(**params: Any) -> torch.Tensor:
    """By the definitions of the truncations, in transformers' order."""
    scores = LOGITS.double() / params.get("temperature", 1.0)
    order = scores.argsort(descending=True)
    keep = torch.ones(len(scores), dtype=torch.bool)
    if k := params.get("top_k"):
        keep[order[k:]] = False
    if "top_p" in params:
        probabilities = scores.masked_fill(~keep, -torch.inf).softmax(-1)[order]
        keep[order[probabilities.cumsum(-1) - probabilities >= params["top_p"]]] = False
    if "min_p" in params:
        probabilities = scores.masked_fill(~keep, -torch.inf).softmax(-1)
        keep &= probabilities >= params["min_p"] * probabilities.max()
    expected: torch.Tensor = scores.masked_fill(~keep, -torch.inf).softmax(-1)
    return expected


@pytest.mark.parametrize(
    "params",
    represented(
        [
            {},
            {"temperature": 0.5},
            {"temperature": 3.0},
            {"top_k": 1},
            {"top_k": 3},
            {"top_k": 50},
            {"top_p": 0.5},
            {"top_p": 0.8},
            {"min_p": 0.2},
            {"min_p": 1.0},
            {"temperature": 2.0, "top_k": 4, "top_p": 0.9, "min_p": 0.3},
        ],
        [{"temperature": 2.0, "top_k": 4, "top_p": 0.9, "min_p": 0.3}],
    ),
    ids=str,
)
def test_tokens_are_drawn_as_often_as_their_probability_says(params: dict[str, Any]) -> None:
    found = torch.bincount(torch.tensor(draw(sampler(**{"temperature": 1.0, **params}), DRAWS)), minlength=5).double()
    expected = expected_distribution(**params) * DRAWS
    assert bool((found[expected == 0] == 0).all())
    possible = expected > 0
    chi_square = float(((found - expected)[possible] ** 2 / expected[possible]).sum())
    assert chi_square < 24  # 4 degrees of freedom at most: chance would pass this once in 10,000 times, and is fixed


def test_probability_of_zero_is_never_drawn() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    assert set(draw(sampler(temperature=1.0), 300, logits)) == {1, 3}


def test_repeated_tokens_are_penalized_greedy_or_not() -> None:
    logits = torch.tensor([1.0, 0.9, 0.0])
    assert sampler(repetition_penalty=1.5)([0], logits, 0) == 1
    assert sampler(repetition_penalty=1.5)([1, 2], logits, 0) == 0
    draws = [sampler(temperature=0.1, repetition_penalty=10.0)([0], logits, index) for index in range(100)]
    assert draws.count(1) > 95


def test_the_logits_given_are_left_as_they_are() -> None:
    logits = LOGITS.clone()
    sampler(temperature=0.5, top_k=2, top_p=0.5, min_p=0.1, repetition_penalty=2.0)([0, 1], logits, 0)
    sampler(repetition_penalty=2.0)([0, 1], logits, 0)
    assert torch.equal(logits, LOGITS)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "params", [{}, {"repetition_penalty": 1.5}, {"temperature": 1.0}, {"temperature": 1e-40, "top_k": 2}], ids=str
)
def test_logits_that_are_not_numbers_are_an_error_and_no_token(bad: float, params: dict[str, Any]) -> None:
    logits = LOGITS.clone()
    logits[3] = bad
    with pytest.raises(ModelError, match=r"token 4 .*NaN or infinite.*--dtype float32"):
        sampler(**params)([1], logits, 4)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1: expected 0 (greedy) or more"),
        ({"temperature": float("nan")}, "temperature nan: expected 0 (greedy) or more"),
        ({"temperature": float("inf")}, "temperature inf: expected 0 (greedy) or more"),
        ({"top_k": -1}, "top-k -1: expected 0 (off) or more"),
        ({"top_p": 0.0}, "top-p 0.0: expected more than 0, at most 1"),
        ({"top_p": 1.1}, "top-p 1.1: expected more than 0, at most 1"),
        ({"top_p": float("nan")}, "top-p nan: expected more than 0, at most 1"),
        ({"min_p": -0.1}, "min-p -0.1: expected between 0 and 1"),
        ({"min_p": 1.1}, "min-p 1.1: expected between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition-penalty 0.0: expected 1e-30 to 1e+30"),
        ({"repetition_penalty": 1e-45}, "repetition-penalty 1e-45: expected 1e-30 to 1e+30"),
        ({"repetition_penalty": 1e31}, "repetition-penalty 1e+31: expected 1e-30 to 1e+30"),
        ({"repetition_penalty": float("nan")}, "repetition-penalty nan: expected 1e-30 to 1e+30"),
        ({"repetition_penalty": float("inf")}, "repetition-penalty inf: expected 1e-30 to 1e+30"),
        ({"seed": -1}, "seed -1: expected 0 or more, below 2**64"),
        ({"seed": 1 << 64}, "seed 18446744073709551616: expected 0 or more, below 2**64"),
    ],
)
def test_parameters_that_cannot_be_are_explained(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        SamplingParams(**params)
    assert caught.value.exit_code == 2


def test_choices_of_a_request_draw_independently_and_repeatably() -> None:
    params = SamplingParams(temperature=1.0, seed=7)
    first, again, second, other = (
        draw(Sampler(params, request, choice), 50) for request, choice in ((3, 0), (3, 0), (3, 1), (1, 3))
    )
    assert first == again
    assert len({tuple(tokens) for tokens in (first, second, other)}) == 3


@pytest.mark.parametrize("params", [{"temperature": 1.0, "top_p": 0.8}, {"temperature": 0.5, "top_k": 3}], ids=str)
def test_only_a_repetition_penalty_looks_at_the_tokens_so_far(params: dict[str, Any]) -> None:
    found = sampler(**params)
    assert not found.reads_ids
    assert [found([], LOGITS, index) for index in range(50)] == draw(found, 50)
    assert sampler(**params, repetition_penalty=1.1).reads_ids


LEAST: Final = (1e-30, 1e-38, 1e-45, 1e-46, 1e-300, 5e-324)
"""Temperatures; most of them take ordinary scores out of float32's range."""


@pytest.mark.parametrize("temperature", LEAST)
@pytest.mark.parametrize(
    "more", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.3}], ids=str
)
def test_the_least_temperatures_are_greedy(temperature: float, more: dict[str, Any]) -> None:
    for logits in (LOGITS, LOGITS - 5, LOGITS * 1e30, LOGITS - LOGITS.max(), LOGITS.bfloat16()):
        assert set(draw(sampler(temperature=temperature, **more), 20, logits)) == {0}
    hidden = torch.tensor([-torch.inf, -3.0, -torch.inf, -2.0])
    assert set(draw(sampler(temperature=temperature, **more), 20, hidden)) == {3}


def test_the_highest_temperatures_make_all_tokens_alike() -> None:
    for temperature in (1e30, 1e38, 1e300):
        assert set(draw(sampler(temperature=temperature), 200)) == set(range(5))


def distributions(params: SamplingParams, ids: list[int], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Before and after truncations, by transformers' own processors, in float64 and relative to the largest score."""
    before: Any = torch.tensor([ids])
    scores: Any = logits.double()[None]
    scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(before, scores)
    scores = TemperatureLogitsWarper(params.temperature)(before, scores - scores.max())
    whole = scores[0].softmax(-1)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(before, scores)
    scores = TopPLogitsWarper(params.top_p)(before, scores)
    scores = MinPLogitsWarper(params.min_p)(before, scores)
    return whole, scores[0].softmax(-1)


@examples(300)
@given(
    seed=st.integers(0, 1 << 30),
    size=st.sampled_from([1e-30, 1.0, 30.0, 1e5, 1e37]),
    temperature=st.sampled_from([*LEAST, 0.3, 1.0, 2.0, 1e30]),
    top_k=st.sampled_from([0, 1, 5, 1 << 40]),
    top_p=st.sampled_from([1.0, 0.7, 1e-45, 5e-324]),
    min_p=st.sampled_from([0.0, 1e-45, 0.3, 1.0]),
    penalty=st.sampled_from([1e-30, 0.5, 1.0, 1.7, 1e30]),
)
def test_at_every_edge_a_token_is_one_that_transformers_could_draw(
    seed: int, size: float, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    logits = size * torch.randn(20, generator=torch.Generator().manual_seed(seed))
    params = SamplingParams(temperature, top_k, top_p, min_p, penalty, seed)
    ids = [seed % 20, 3, 11, 3]
    whole, left = distributions(params, ids, logits)
    # Of tokens that are all but equally likely, truncations may leave these or those.
    assert float(whole[Sampler(params, 0)(ids, logits, 0)]) > (1 - 1e-5) * float(whole[left > 1e-12].min())
    greedy = SamplingParams(repetition_penalty=penalty)
    scores: Any = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits.double()[None])
    assert Sampler(greedy, 0)(ids, logits, 0) == int(scores.argmax())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_first_of_many_equal_ones(dtype: torch.dtype) -> None:
    logits = torch.zeros(70000, dtype=dtype)
    logits[[500, 1000, 69999]] = 2.0
    assert sampler()([], logits, 0) == 500
