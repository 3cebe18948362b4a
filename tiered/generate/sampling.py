"""From logits to a token: transformers' own logits processors, and a generator that is a counter.

The random number of a token is a function of (seed, request, choice, token index) alone, so what a sequence samples
does not depend on what else is in the batch (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011:
Philox).
"""

from dataclasses import dataclass
from math import isfinite

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

from tiered.errors import ConfigError, TieredError


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
                0 < self.repetition_penalty < float("inf"),
                "more than 0",
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
        processors = LogitsProcessorList()
        if params.repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        if params.temperature > 0:
            # transformers' own order: temperature, then the truncations.
            if params.temperature != 1.0:
                processors.append(TemperatureLogitsWarper(params.temperature))
            if params.top_k > 0:
                processors.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1.0:
                processors.append(TopPLogitsWarper(params.top_p))
            if params.min_p > 0.0:
                processors.append(MinPLogitsWarper(params.min_p))
        self._processors = processors
        # Lists as long as a text become tensors slowly; only this processor looks at them.
        self.reads_ids = params.repetition_penalty != 1.0
        """Whether what is chosen depends on the tokens so far, and not on the logits alone."""

    def __call__(self, ids: list[int], logits: torch.Tensor, index: int) -> int:
        """Token number `index` of the completion, from logits [vocab] after `ids` (prompt and completion so far).

        `ids` may be empty unless `reads_ids`. Raises TieredError where the logits are no numbers.
        """
        scores = logits.float()[None]
        if not isfinite(float(scores.max())):  # any NaN is the maximum
            raise TieredError(
                f"token {index} of request {self._request}: the model's logits are NaN or infinite; "
                "try --dtype float32, and test the store with 'tiered verify'"
            )
        if self._processors:
            before = torch.tensor([ids if self.reads_ids else []], dtype=torch.long)
            scores = self._processors(before, scores)  # type: ignore[arg-type]
        if self._params.temperature == 0:
            return int(scores.argmax())
        # The lowest word counts what one generator draws; the others are this token's own.
        counter = [0, self._choice, index, self._request]
        generator = np.random.Generator(np.random.Philox(key=self._params.seed, counter=counter))
        cumulative = scores[0].double().softmax(-1).cumsum(-1)
        # The last sum may fall short of 1 by rounding; scaling the draw keeps it inside.
        draw = generator.random() * float(cumulative[-1])
        token = int(torch.searchsorted(cumulative, draw, right=True))
        return min(token, len(cumulative) - 1)
