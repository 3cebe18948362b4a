"""Log-probabilities: those of the model's own distribution, one entry per token, little memory."""

import math

import pytest
import torch

from tiered.generate.logprobs import Logprobs

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -torch.inf])


def test_the_chosen_token_has_its_log_probability_likely_or_not() -> None:
    found = Logprobs(2)
    for token in (0, 3, 4):
        found.record(LOGITS, token)
    expected = LOGITS.log_softmax(-1).tolist()
    assert [found.chosen(index) for index in range(3)] == pytest.approx([expected[0], expected[3], -math.inf])
    assert len(found) == 3


def test_the_likeliest_tokens_come_first_and_belong_to_their_place() -> None:
    found = Logprobs(2)
    found.record(LOGITS, 3)
    found.record(LOGITS.flip(0), 3)
    assert [token for token, _ in found.top(0)] == [0, 1]
    assert [token for token, _ in found.top(1)] == [4, 3]
    assert found.top(1)[1][1] == pytest.approx(float(LOGITS.log_softmax(-1)[1]))


def test_none_of_the_likeliest_may_be_asked_for() -> None:
    found = Logprobs(0)
    found.record(LOGITS, 1)
    assert found.top(0) == []
    assert found.chosen(0) < 0


def test_a_vocabulary_smaller_than_what_is_asked_for_is_reported_whole() -> None:
    found = Logprobs(20)
    found.record(LOGITS, 1)
    found.record(LOGITS, 2)
    assert len(found.top(1)) == 5


def test_bfloat16_logits_are_normalized_in_float32() -> None:
    found = Logprobs(5)
    logits = (torch.arange(5) / 4).to(torch.bfloat16)
    found.record(logits, 0)
    assert sum(math.exp(logprob) for _, logprob in found.top(0)) == pytest.approx(1, abs=1e-6)
