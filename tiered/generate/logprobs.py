"""Log-probabilities of a completion's tokens, in the model's own distribution: before temperature and truncations.

`Sequence` records one entry per token; `jobs/` turns them into a result. They are kept as plain arrays: a long
completion with twenty alternatives per token would otherwise take megabytes of Python objects.
"""

from array import array

import torch


class Logprobs:
    """For each token of one completion: its log-probability and the `count` likeliest tokens with theirs."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._chosen = array("f")
        self._top_ids = array("i")
        self._top_values = array("f")

    def __len__(self) -> int:
        return len(self._chosen)

    def record(self, logits: torch.Tensor, token: int) -> None:
        """Add the entry of `token`, which has been chosen from logits [vocab]."""
        logprobs = logits.float().log_softmax(-1)
        self._chosen.append(float(logprobs[token]))
        # The same count for every token, so that entry i begins at i * count.
        self.count = min(self.count, len(logprobs))
        if self.count:
            values, ids = logprobs.topk(self.count)
            self._top_ids.extend(ids.tolist())
            self._top_values.extend(values.tolist())

    def chosen(self, index: int) -> float:
        """Natural logarithm of the probability of token number `index`."""
        return self._chosen[index]

    def top(self, index: int) -> list[tuple[int, float]]:
        """The likeliest tokens in place of token number `index`, with their log-probabilities, likeliest first."""
        part = slice(index * self.count, (index + 1) * self.count)
        return list(zip(self._top_ids[part], self._top_values[part], strict=True))
