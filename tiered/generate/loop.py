"""The generation loop: passes over all running sequences until every one has ended.

Sequences are gathered into micro-batches of similar length, padded on the left; each micro-batch has its own cache.
Sequences that end leave their micro-batch.
"""

import contextlib
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from tiered.cache import KVCache
from tiered.generate.sequence import Sequence
from tiered.model import MicroBatch, OnBlock, Pass

T = TypeVar("T")


class PassRunner(Protocol):
    """What generation needs of a runtime."""

    @property
    def bytes_read(self) -> int: ...

    @property
    def disk_idle_seconds(self) -> float: ...

    def new_cache(self, sequences: int, capacity: int) -> AbstractContextManager[KVCache]: ...

    def forward(self, batch: Items[MicroBatch], on_block: OnBlock | None = None, is_last: bool = False) -> Pass: ...

    def compute(self, work: Callable[[], T]) -> T: ...


@dataclass
class Generation:
    """What a generation cost."""

    passes: list[Pass] = field(default_factory=list)
    first_token_seconds: float = 0.0
    decode_bytes: int = 0
    """Bytes read during the decode passes."""
    decode_seconds: float = 0.0
    decode_disk_idle_seconds: float = 0.0
    generated_tokens: int = 0
    prompt_tokens: int = 0


class _Group:
    """A micro-batch over its lifetime: some sequences, their cache, what they are fed next."""

    def __init__(self, sequences: list[Sequence], cache: KVCache) -> None:
        self.sequences, self.cache = sequences, cache
        length = max(len(s.prompt_ids) for s in sequences)
        self._ids = torch.zeros(len(sequences), length, dtype=torch.long)
        self._mask = torch.zeros(len(sequences), length, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            self._ids[row, length - len(sequence.prompt_ids) :] = torch.tensor(sequence.prompt_ids)
            self._mask[row, length - len(sequence.prompt_ids) :] = 1

    def micro_batch(self) -> MicroBatch:
        """What the next pass computes for this group."""
        padded = bool((self._mask == 0).any())
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -self._ids.shape[1] :]
        return MicroBatch(self._ids, self.cache, self._mask if padded else None, positions)

    def advance(self, logits: torch.Tensor) -> None:
        """Sample a token for every sequence from logits [rows, 1, vocab], and drop the sequences that end."""
        for row, sequence in enumerate(self.sequences):
            ids = sequence.prompt_ids + sequence.token_ids
            sequence.append(sequence.sampler(ids, logits[row, -1], len(sequence.token_ids)))
        keep = [row for row, sequence in enumerate(self.sequences) if sequence.finish_reason is None]
        if keep and len(keep) < len(self.sequences):
            index = torch.tensor(keep)
            self.cache.batch_select_indices(index)
            self._mask = self._mask[index]
        self.sequences = [self.sequences[row] for row in keep]
        if keep:
            self._ids = torch.tensor([[s.token_ids[-1]] for s in self.sequences])
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(keep), 1)], dim=1)


def generate(
    runner: PassRunner,
    sequences: Items[Sequence],
    rows: int,
    on_tokens: Callable[[], None] = lambda: None,
    on_block: OnBlock | None = None,
) -> Generation:
    """Run `sequences` to their ends on `runner`, at most `rows` of them per micro-batch.

    `on_tokens` is called after every pass, when each running sequence has one token more.
    """
    result = Generation(prompt_tokens=sum(len(s.prompt_ids) for s in sequences))
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        groups = []
        for members in micro_batches(sequences, rows):
            capacity = max(len(s.prompt_ids) for s in members) + max(s.max_new_tokens for s in members)
            groups.append(_Group(members, stack.enter_context(runner.new_cache(len(members), capacity))))
        while groups:
            began, bytes_before, idle_before = time.perf_counter(), runner.bytes_read, runner.disk_idle_seconds
            remaining = max(s.max_new_tokens - len(s.token_ids) for group in groups for s in group.sequences)
            pass_ = runner.forward([g.micro_batch() for g in groups], on_block, is_last=remaining == 1)
            running = list(groups)
            runner.compute(lambda: _advance(running, pass_))  # noqa: B023
            result.generated_tokens += pass_.logits_rows
            groups = [group for group in groups if group.sequences]
            on_tokens()
            if result.passes:
                result.decode_bytes += runner.bytes_read - bytes_before
                result.decode_seconds += time.perf_counter() - began
                result.decode_disk_idle_seconds += runner.disk_idle_seconds - idle_before
            else:
                result.first_token_seconds = time.perf_counter() - start
            result.passes.append(pass_)
    return result


def micro_batches(sequences: Items[Sequence], rows: int) -> list[list[Sequence]]:
    """Sequences in groups of at most `rows`, neighbours in length together so that little is padded."""
    ordered = sorted(sequences, key=lambda s: len(s.prompt_ids))
    return [ordered[start : start + rows] for start in range(0, len(ordered), rows)]


def _advance(groups: list[_Group], pass_: Pass) -> None:
    for group, logits in zip(groups, pass_.logits, strict=True):
        group.advance(logits)
