"""From logits to a token: transformers' own logits processors, and a generator that is a counter.

The random number of a token is a function of (seed, request, choice, token index) alone, so what a sequence samples
does not depend on what else is in the batch (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011:
Philox).
"""

from dataclasses import dataclass
from math import isfinite
from typing import Any, Final

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tiered.errors import ConfigError, ModelError

_PENALTIES: Final = (1e-30, 1e30)
"""The least and the largest repetition penalty. Beyond them a penalized score would leave float32's range, or lose its
precision, whatever the model's scores."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top-k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("min-p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1"),
            (
                "repetition-penalty",
                self.repetition_penalty,
                _PENALTIES[0] <= self.repetition_penalty <= _PENALTIES[1],
                f"{_PENALTIES[0]} to {_PENALTIES[1]}",
            ),
            ("seed", self.seed, 0 <= self.seed < 1 << 64, "0 or more, below 2**64"),
        )
        for name, value, good, expected in checks:
            if not good:
                raise ConfigError(f"{name} {value}: expected {expected}")


class Sampler:
    """Chooses the tokens of one sequence: choice number `choice` among the completions of request `request`."""

    def __init__(self, params: SamplingParams, request: int, choice: int = 0) -> None:
        self._params, self._request, self._choice = params, request, choice
        # transformers' own order: penalties, temperature, then the truncations.
        self._penalties, self._warpers = LogitsProcessorList(), LogitsProcessorList()
        if params.repetition_penalty != 1.0:
            self._penalties.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        if params.temperature > 0:
            if params.temperature != 1.0:
                self._warpers.append(TemperatureLogitsWarper(params.temperature))
            if params.top_k > 0:
                self._warpers.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1.0:
                self._warpers.append(TopPLogitsWarper(params.top_p))
            if params.min_p > 0.0:
                self._warpers.append(MinPLogitsWarper(params.min_p))
        # Lists as long as a text become tensors slowly; only this processor looks at them.
        self.reads_ids = params.repetition_penalty != 1.0
        """Whether the choice depends on the tokens so far, and not on the logits alone."""

    def __call__(self, ids: list[int], logits: torch.Tensor, index: int) -> int:
        """Token number `index` of the completion, from logits [vocab] after `ids` (prompt and completion so far).

        `ids` may be empty unless `reads_ids`. Raises ModelError where the largest logit is NaN or infinite.
        """
        scores = logits.float()[None]
        if self._penalties or self._params.temperature > 0:
            _check_finite(scores.max(), index)
            scores = self._processed(ids if self.reads_ids else [], scores)
        if self._params.temperature == 0:
            largest, token = scores[0].max(-1)  # of equal ones the first; both in one pass over the vocabulary
            _check_finite(largest, index)
            return int(token)
        # The generator counts its draws in the lowest word; the other words identify this token.
        counter = [0, self._choice, index, self._request]
        generator = np.random.Generator(np.random.Philox(key=self._params.seed, counter=counter))
        cumulative = scores[0].double().softmax(-1).cumsum(-1)
        # The last sum may fall short of 1 by rounding; scaling the draw keeps it inside.
        draw = generator.random() * float(cumulative[-1])
        drawn = int(torch.searchsorted(cumulative, draw, right=True))
        return min(drawn, len(cumulative) - 1)

    def _processed(self, ids: list[int], scores: torch.Tensor) -> torch.Tensor:
        """Scores [1, vocab] after penalties, temperature and truncations; the largest is finite."""
        if not self._penalties and not self._warpers:
            return scores
        before: Any = torch.tensor([ids], dtype=torch.long)
        found = self._warpers(before, self._penalties(before, scores))
        if isfinite(float(found.max())):
            return found
        # The least temperatures take scores out of float32's range. Relative to the largest they all have a limit.
        penalized: Any = self._penalties(before, scores.double())
        return self._warpers(before, penalized - penalized.max())


def _check_finite(largest: torch.Tensor, index: int) -> None:
    """Raises ModelError unless the largest score is finite; where any score is NaN, so is the largest."""
    if not isfinite(float(largest)):
        raise ModelError(
            f"token {index} of the completion: the model's logits are NaN or infinite; the compute dtype or the "
            "store's weights are to blame: try --dtype float32, and test the store with 'tiered verify'"
        )
