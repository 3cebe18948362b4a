"""What a model makes of prompts, in one form for transformers and the engine, so that they can be compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from transformers import PreTrainedModel

STEPS: Final = 9
"""More than the windows and chunks of tiny models: what repeats with them comes round while decoding."""
TOLERANCE: Final = 1e-4
"""Relative error of float32 logits that still counts as the same."""

Tokens = Sequence[int]


@dataclass(frozen=True)
class Answers:
    """Per prompt: the tokens chosen greedily, and logits [prompt + tokens - 1, vocab] at every position."""

    tokens: tuple[Tokens, ...]
    logits: tuple[torch.Tensor, ...]

    def first(self, steps: int) -> "Answers":
        """The answers after only `steps` tokens."""
        dropped = len(self.tokens[0]) - steps
        return Answers(tuple(t[:steps] for t in self.tokens), tuple(x[: len(x) - dropped] for x in self.logits))


def relative_error(found: Answers, expected: Answers) -> float:
    """The largest difference of any logit, relative to the largest logit of the same text."""
    errors = []
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert a.shape == b.shape
        errors.append(float((a - b).abs().max() / b.abs().max()))
    # max() of a list would pass over NaN.
    return float(torch.tensor(errors).max())


def assert_same(found: Answers, expected: Answers) -> None:
    """Same greedy tokens, and logits within TOLERANCE; `found` may have stopped earlier."""
    expected = expected.first(len(found.tokens[0]))
    error = relative_error(found, expected)
    assert error <= TOLERANCE, f"relative error of logits {error:.2e}"
    assert found.tokens == expected.tokens


def reference_logits(model: PreTrainedModel, ids: Tokens) -> torch.Tensor:
    """What transformers computes without cache, padding or neighbours: [tokens, vocab]."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits
    return logits[0]


def reference_answers(model: PreTrainedModel, prompts: Sequence[Tokens], steps: int) -> Answers:
    """Greedy continuations by transformers' own `generate`, and the logits of each whole text in one forward."""
    tokens, logits = [], []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        # `generate` only exists on classes that mix it in, which `PreTrainedModel` itself does not.
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False)  # type: ignore[operator]
        new = output[0, len(prompt) :].tolist()
        tokens.append(new)
        logits.append(reference_logits(model, [*prompt, *new[:-1]]))
    return Answers(tuple(tokens), tuple(logits))


def cached_answers(make_model: Callable[[], PreTrainedModel], prompt: Tokens, steps: int) -> Answers:
    """transformers' answer, token by token with its own cache, by models that have seen no other text."""
    ids = torch.tensor([list(prompt)])
    output = make_model().generate(  # type: ignore[operator]  # only exists on classes that mix it in
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat([reference_logits(make_model(), prompt), *output.logits[1:]])
    return Answers((output.sequences[0, len(prompt) :].tolist(),), (logits,))
