"""What a plan is made from: the model, the machine, the work and the budgets, all of them numbers.

`model/shape.py` makes a ModelShape of a store and a graph, `bench/rates.py` measures a Machine, commands say their
Workload, and the runtime adds to the Budgets what the process itself takes. `make.py` turns the four into a Plan.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

from tiered.errors import ConfigError
from tiered.plan.kv import Bits, KVShape, LayerGroup
from tiered.units import PAGE_TOKENS

MAX_BATCHED_TOKENS: Final = 4096
"""Tokens in a pass that take any processor far longer than any disk takes for the weights."""
_SPARE: Final = 1.1
"""Room in the cache beyond what sequences take on average: where long ones meet, fewer run."""

KVTier = Literal["auto", "cpu", "disk"]


class Tier(Enum):
    """A place where weights can be, slowest first."""

    DISK = "disk"
    CPU = "cpu"
    GPU = "gpu"


def parse_tiers(text: str) -> tuple[Tier, ...]:
    """The tiers named by `text`, such as "disk,cpu"; the order is from slowest to fastest.

    Raises ConfigError that explains unknown names and combinations that cannot work.
    """
    names = [name.strip().lower() for name in text.split(",")]
    known = {tier.value: tier for tier in Tier}
    for name in names:
        if name not in known:
            raise ConfigError(f"--tiers {text!r}: unknown tier {name!r}; known tiers are disk, cpu and gpu")
    tiers = tuple(known[name] for name in names)
    order = list(Tier)
    if [order.index(tier) for tier in tiers] != sorted({order.index(tier) for tier in tiers}):
        right = ",".join(tier.value for tier in order if tier in tiers)
        raise ConfigError(f"--tiers {text!r}: name each tier once, slowest first: {right}")
    if Tier.GPU in tiers:
        raise ConfigError(
            f"--tiers {text!r}: this version computes on the CPU only; use disk,cpu (stream what does not fit) "
            "or cpu (load everything)"
        )
    if Tier.CPU not in tiers:
        raise ConfigError(f"--tiers {text!r}: weights on disk need a tier that computes; use disk,cpu")
    return tiers


@dataclass(frozen=True)
class ModelShape:
    """A model in numbers, from a store's manifest and headers and from the model's graph."""

    tape_nbytes: tuple[int, ...]
    """Of each block of the tape, in memory."""
    file_nbytes: tuple[int, ...]
    """The same as they lie on disk, which is less where they are compressed."""
    weights: int
    """Of all blocks of the tape together."""
    side_nbytes: int
    """Scales and zeros of the embedding."""
    tables_nbytes: int
    """All that stays in memory beside blocks: outer tensors in the compute dtype with the block they are read through,
    the embedding's scales and zeros, staging for its rows."""
    hidden: int
    widest: int
    """The largest `out` of any linear layer or expert in a decoder layer."""
    vocab: int
    heads: int
    """Of queries."""
    kv: KVShape
    groups: tuple[LayerGroup, ...]
    """Layers by how far they look back."""
    eager_attention: bool
    """The family materializes attention scores."""
    dense_attention: bool
    """The family wants keys and values in one piece, padded to equal length."""
    packed_nbytes: int
    """Of one row of activations, while a linear kernel holds it in the order it needs."""
    quantization: str | None = None
    """The scheme of the layers' linear weights."""

    @property
    def itemsize(self) -> int:
        """Bytes of the compute dtype."""
        return self.kv.itemsize

    @property
    def gathered_nbytes(self) -> int:
        """Of keys and values that one token of a context adds where they are wanted in one piece, all copies: as they
        are, and repeated for every query head."""
        return 2 * (self.kv.heads + self.heads) * self.kv.head_dim * self.itemsize if self.dense_attention else 0


@dataclass(frozen=True)
class ComputeRate:
    """Measured times of linear layers by rows, between which others are interpolated."""

    rows: tuple[int, ...]
    seconds_per_weight: tuple[float, ...]

    def seconds(self, rows: int, weights: int) -> float:
        """For `rows` rows through `weights` weights; beyond what was measured time grows with the rows."""
        if rows >= self.rows[-1]:
            return self.seconds_per_weight[-1] * weights * rows / self.rows[-1]
        at = bisect.bisect_right(self.rows, rows)
        low, high = self.rows[at - 1], self.rows[at]
        share = (rows - low) / (high - low)
        per_weight = self.seconds_per_weight[at - 1] * (1 - share) + self.seconds_per_weight[at] * share
        return per_weight * weights


@dataclass(frozen=True)
class Machine:
    """How fast this machine is, where that has been measured, and what its kernels take."""

    scratch_nbytes: int
    """Of a linear kernel, besides its result and its packed input, with all threads."""
    disk_bytes_per_second: float | None = None
    """Sustained, of plain reads."""
    linear: ComputeRate | None = None
    attention_seconds: float | None = None
    """Per token of context, for one query of one sequence in one layer."""


@dataclass(frozen=True)
class Workload:
    """What is to be run."""

    sequences: int = 1
    """In all."""
    max_context: int = 2048
    """Tokens of the longest, prompt and completion together."""
    max_prompt: int = 0
    """Tokens of the longest prompt; 0: as long as the context."""
    tokens: int = 0
    """Of all sequences together, prompts and completions; 0: each may be as long as the longest."""
    max_batched_tokens: int = 0
    """Tokens that pass together at most, longer prompts in several passes; 0: all prompts at once."""
    batch_size: int | None = None
    """Sequences at once, if that is asked for."""
    choose_batch_size: bool = False
    """If it is not: as many at once as make most of disk, memory and processor; else all of them."""
    one_pass: bool = False
    """Sequences begin and end in the same pass, as those that are only scored do."""
    all_logits: bool = False
    """Every position gets logits, not the last of each sequence alone."""
    least_context: int = 0
    """Where not 0, `max_context` is what would be useful: it is lowered to what the budget holds, at most to this."""

    def __post_init__(self) -> None:
        for name, value in (("sequences", self.sequences), ("context", self.max_context)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} {value!r}: expected a whole number above 0")

    @property
    def mean_context(self) -> float:
        """Tokens of a sequence on average."""
        return self.tokens / self.sequences if self.tokens else float(self.max_context)

    def tokens_in_flight(self, batch_size: int, context: int) -> int:
        """Tokens of a pass at most, with `batch_size` sequences of up to `context` tokens at once."""
        tokens = batch_size * (self.max_prompt or context)
        return min(tokens, max(self.max_batched_tokens, batch_size)) if self.max_batched_tokens else tokens

    def kv_tokens(self, batch_size: int, context: int) -> int:
        """Tokens in the KV cache at most, of `batch_size` sequences of up to `context` tokens together."""
        if not self.tokens:
            return batch_size * context
        room = int(batch_size * self.mean_context * _SPARE) + PAGE_TOKENS
        return min(batch_size * context, max(context, room))

    def contexts(self, modest: int) -> Iterator[int]:
        """Longest contexts to try, each half as long as the one before; `modest` is the first where there are more."""
        least = min(self.least_context, self.max_context)
        context = min(self.max_context, max(least, modest)) if least else self.max_context
        yield context
        while 0 < least < context:
            context = max(context // 2, least)
            yield context


@dataclass(frozen=True)
class Budgets:
    """What may be used, and how."""

    ram: int
    """Bytes for the whole process."""
    baseline: int
    """Of these, what the process takes by itself: interpreter, torch, transformers, tokenizer, graph, kernels."""
    tiers: tuple[Tier, ...] = (Tier.DISK, Tier.CPU)
    kv: KVTier = "cpu"
    """Where the KV cache is; auto: in memory if it fits there."""
    kv_bits: Bits = 16
    micro_batch: int | None = None
    """Tokens computed together at most; None: as many as memory allows and are useful."""
