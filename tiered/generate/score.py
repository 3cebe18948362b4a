"""How likely a model finds a text: windows of its tokens, many in a pass, log-probabilities out.

In: the tokens of texts and a runtime. Out: for every window a log-probability per scored token, and what it cost.
`tiered score` calls it, and `tools/quality.py`, which measures what quantizing weights or cache costs.

A window is what the model sees at once. Logits are computed only at positions where something is scored. Each row of
them becomes one number at once, so the logits of a whole window never exist together.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Final

import torch

from tiered.errors import ConfigError, ModelError, TieredError
from tiered.generate.costs import Generation
from tiered.generate.loop import generate
from tiered.generate.scheduler import PassRunner
from tiered.model import OnBlock
from tiered.units import MIB

_PIECE_NBYTES: Final = 4 * MIB
"""Bytes of logits that are widened to float32 at once."""
_LARGEST_EXPONENT: Final = 700.0
"""Beyond it exp() leaves the range of a float."""


@dataclass(frozen=True)
class Window:
    """Tokens that are computed as one sequence, and those of the text that they are to predict."""

    input_ids: list[int]
    targets: list[int]
    """The tokens that follow each of the last len(targets) input tokens."""
    position: int = 0
    """Of the first target in its text; tokens that the tokenizer puts in front of a text are not counted."""
    text: int = 0
    """Number of the text."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.targets) <= len(self.input_ids):
            raise ConfigError(
                f"window: {len(self.targets)} targets for {len(self.input_ids)} input tokens; "
                "expected at least one, and none without a token before it"
            )


@dataclass
class Tally:
    """Sums over scored tokens."""

    tokens: int = 0
    nats: float = 0.0
    """Negative log-likelihood."""

    def add(self, logprobs: torch.Tensor) -> None:
        """Count log-probabilities [tokens]."""
        self.tokens += len(logprobs)
        self.nats -= float(logprobs.double().sum())

    @property
    def nats_per_token(self) -> float:
        """Cross entropy; NaN where nothing has been scored."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the nats per token; infinite where that exceeds a float."""
        return math.inf if self.nats_per_token > _LARGEST_EXPONENT else math.exp(self.nats_per_token)

    def bits_per_byte(self, nbytes: int) -> float:
        """Bits of all scored tokens over `nbytes` of text: comparable between tokenizers, which perplexity is not.

        NaN where nothing has been scored, or `nbytes` is 0."""
        return self.nats / math.log(2) / nbytes if self.tokens and nbytes else math.nan


@dataclass
class Scoring:
    """What was scored and what it cost."""

    total: Tally = field(default_factory=Tally)
    costs: Generation = field(default_factory=Generation)
    """All passes are prefill: each window is a sequence, and tokens of overlaps count in each window."""


def window_targets(context: int, begins: int) -> int:
    """The most tokens that a window of `context` tokens can score if its first `begins` tokens only begin the text."""
    return context - max(begins - 1, 0)


def count_windows(tokens: int, context: int, stride: int, begins: int = 0) -> int:
    """How many windows `cut_windows` makes of a text of `tokens` tokens."""
    most = window_targets(context, begins)
    scored = tokens - (0 if begins else 1)
    return 0 if scored < 1 else 1 + max(0, -(-(scored - most) // min(stride, most)))


def cut_windows(
    ids: torch.Tensor, context: int, stride: int, begin_ids: Items[int] = (), text: int = 0
) -> Iterator[Window]:
    """Windows of at most `context` tokens over ids [tokens], made one at a time, that score each token once.

    Every window begins with `begin_ids`, what the tokenizer puts in front of a text. The first window scores all its
    tokens. Each one after it scores `stride` new tokens (or as many as fit, if that is less), behind as many old ones
    as fit. Without `begin_ids` the text's first token has nothing before it, so it is not scored. What a token's
    window holds depends on its position alone, never on how the text goes on.

    Raises ConfigError where a window has room for no token to score, or `stride` is below 1.
    """
    most = window_targets(context, len(begin_ids))
    if most < 1 or stride < 1:
        raise ConfigError(f"windows of {context} tokens, {stride} scored anew: expected room for at least one")
    room = context - len(begin_ids)
    start, end = (0 if begin_ids else 1), (0 if begin_ids else 1) + most
    while start < len(ids):
        stop = min(end, len(ids))
        first = max(0, end - 1 - room)
        yield Window([*begin_ids, *ids[first : stop - 1].tolist()], ids[start:stop].tolist(), start, text)
        start, end = end, end + min(stride, most)


def score(
    runner: PassRunner,
    windows: Iterable[Window],
    per_pass: int,
    on_scored: Callable[[Window, torch.Tensor], None],
    on_block: OnBlock | None = None,
    on_failed: Callable[[Window, TieredError], None] | None = None,
) -> Scoring:
    """Score `windows`, taken as they are needed, at most `per_pass` of them in one pass.

    `on_scored` is called once per window, in the caller's thread, with the log-probabilities of its targets: float32
    [targets]. It is called in the order of `windows` if the plan lets each begin and end in the same pass
    (`Workload.one_pass`); else a short window may end before a longer one. If a window cannot be scored, as its logits
    are NaN or infinite or the cache has no room for it, `on_failed` is called instead; without it the error is raised.
    """
    total = Tally()

    def on_finished(scored: _Scored) -> None:
        if scored.error is None:
            total.add(scored.logprobs)
            on_scored(scored.window, scored.logprobs)
        elif on_failed is not None:
            on_failed(scored.window, scored.error)
        else:
            raise scored.error

    costs = generate(runner, map(_Scored, windows), per_pass, on_finished=on_finished, on_block=on_block)
    return Scoring(total, costs)


class _Scored:
    """A window as the scheduler runs it: its logits become log-probabilities at once, and no token is sampled."""

    max_new_tokens: Final = 1
    """No token is generated; 1 makes the cache reserve room for exactly the prompt."""

    def __init__(self, window: Window) -> None:
        self.window, self.prompt_ids = window, window.input_ids
        self.token_ids: list[int] = []
        self.kept = len(window.targets)
        self.logprobs = torch.full((self.kept,), math.nan)
        """float32 [targets]; NaN until computed."""
        self._targets, self._left = torch.tensor(window.targets), self.kept
        self.finish_reason: str | None = None
        self.error: TieredError | None = None

    def take(self, index: int, logits: torch.Tensor) -> None:
        rows = slice(index, index + len(logits))
        self.logprobs[rows] = log_probabilities(logits, self._targets[rows])
        self._left -= len(logits)
        if not self._left:
            self.finish_reason = "scored"

    def fail(self, error: TieredError) -> None:
        self.error, self.finish_reason = error, "error"


def log_probabilities(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32 [rows]: log-softmax of logits [rows, vocab], of any dtype, at targets [rows].

    Widens a few MiB at a time. A row's result has the same bits alone and among others.
    """
    rows = max(1, _PIECE_NBYTES // (4 * logits.shape[-1]))
    pieces = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.cat([_log_probabilities(part, of) for part, of in pieces])


def _log_probabilities(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    wide = logits.to(torch.float32, copy=True)
    largest = wide.amax(-1)
    if not bool(largest.isfinite().all()):  # any NaN is the maximum
        raise ModelError(
            "the model's logits are NaN or infinite; the compute dtype or the store's weights are to blame: "
            "try --dtype float32, and test the store with 'tiered verify'"
        )
    chosen = wide.gather(1, targets[:, None])[:, 0] - largest
    return chosen - _sum_in_pairs(wide.sub_(largest[:, None]).exp_()).log()


def _sum_in_pairs(values: torch.Tensor) -> torch.Tensor:
    """[rows]: sums over the last dimension, in an order that its size alone decides; `values` are overwritten.

    torch's own sum divides a single long row among threads, but not many rows, so it rounds them differently.
    """
    while (size := values.shape[-1]) > 1:
        half = size // 2
        values[:, :half] += values[:, size - half :]
        values = values[:, : size - half]
    return values[:, 0]
