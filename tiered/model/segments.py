"""Segments: consecutive tokens of sequences, side by side in micro-batches without padding, over the paged cache.

    segments -> micro-batches [1, tokens] (`plan/passes.py`) -> layers -> rows that need logits, to the caller

Segments of one token (decoding) and of many (prompts) share micro-batches where they compute in the same place, and the
pass wherever they do. Families with dense attention get rows of equal length instead: single tokens together, padded on
the left, every prompt by itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from tiered.cache import GatheredKV, KVPool, LentBlocks, MicroBatchKV, PackedKV, Part, SequenceKV
from tiered.errors import ConfigError
from tiered.model.seat import Seat, Seats
from tiered.model.waiting import WaitingRoom
from tiered.model.work import Embedded, Group, MicroBatch
from tiered.plan.passes import MicroBatchLimits, plan_micro_batches

OnLogits = Callable[[int, int, torch.Tensor], None]
"""Called in the compute thread with (segment, index among its kept positions, logits [rows, vocab] in the compute
dtype and the host's memory); a segment's rows come in ascending order, in pieces of bounded size."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Tokens of one sequence, from position `kv.length` on."""

    kv: SequenceKV
    input_ids: list[int]
    keep: int = 0
    """How many of its last positions need logits."""
    text_length: int = 0
    """Tokens of the whole text, if it goes on after this segment: rotary frequencies of some families depend on it.
    0: the text ends with this segment."""

    @property
    def part(self) -> Part:
        """All tokens of the segment."""
        return Part(self.kv, self.kv.length, len(self.input_ids), self.text_length > 0)

    @property
    def stop(self) -> int:
        return self.part.stop

    @property
    def tokens(self) -> range:
        """Their positions in the sequence."""
        return range(self.kv.length, self.stop)

    def ids_of(self, part: Part) -> list[int]:
        """The token ids of `part`, which lies within the segment."""
        return self.input_ids[part.start - self.kv.length : part.stop - self.kv.length]


class Segments:
    """A pass over `segments`, each at the seat that `seats` have for it; `on_logits` gets logits."""

    def __init__(
        self,
        segments: Sequence[Segment],
        pool: KVPool,
        limits: MicroBatchLimits,
        head_rows: int,
        seats: Seats,
        on_logits: OnLogits,
    ) -> None:
        for number, segment in enumerate(segments):
            if not segment.input_ids or segment.stop > segment.kv.capacity:
                raise ConfigError(
                    f"segment {number}: tokens {segment.kv.length} to {segment.stop} of a sequence with room for "
                    f"{segment.kv.capacity}; expected at least one, and reserve as many as it will have"
                )
            if not limits.grid.tokens and segment.kv.length and len(segment.input_ids) > 1:
                raise ConfigError(
                    f"segment {number}: several tokens behind {segment.kv.length} others; this family's recurrent "
                    "layers compute prompts whole and all later tokens one by one"
                )
        self._segments, self._pool, self._limits = segments, pool, limits
        self._head_rows, self._on_logits = head_rows, on_logits
        self._seat_of = [seats.of(len(segment.input_ids), segment.text_length > 0) for segment in segments]
        self.seats, self.head = seats.of_pass(self._seat_of), seats.decode
        self._plan: list[dict[int, Part]] = []

    @property
    def ids(self) -> list[int]:
        return sorted({token for segment in self._segments for token in segment.input_ids})

    def record(self, embedded: Embedded, room: WaitingRoom | None = None) -> list[Group]:
        groups = []
        for seat in self.seats:
            mine = [number for number, found in enumerate(self._seat_of) if found is seat]
            cut = plan_micro_batches([self._segments[number].tokens for number in mine], self._limits)
            waiting = room if seat.device is not None else None
            if waiting is not None:
                waiting.begin(sum(map(len, cut)), len(seat.model.layers))
            for found in cut:
                micro_batches = [{mine[i]: tokens for i, tokens in each.items()} for each in found]
                numbers = sorted({number for tokens_of in micro_batches for number in tokens_of})
                blocks = LentBlocks(self._pool, [self._segments[number].part for number in numbers])
                made = [
                    self._record_micro_batch(seat, embedded, blocks, numbers, each, waiting) for each in micro_batches
                ]
                groups.append(Group(seat, tuple(made), blocks))
        return groups

    def _record_micro_batch(
        self,
        seat: Seat,
        embedded: Embedded,
        blocks: LentBlocks,
        numbers: Sequence[int],
        tokens_of: dict[int, range],
        room: WaitingRoom | None,
    ) -> MicroBatch:
        """Record a micro-batch: some tokens of each segment in `tokens_of`. `blocks` are those of `numbers`. It waits
        in `room`, if there is one: before the next one is recorded."""
        segments = [self._segments[number] for number in tokens_of]
        kvs = (segment.kv for segment in segments)
        parts = [Part(kv, tokens.start, len(tokens)) for kv, tokens in zip(kvs, tokens_of.values(), strict=True)]
        ids = [segment.ids_of(part) for segment, part in zip(segments, parts, strict=True)]
        ends = [max(segment.text_length, segment.stop) - 1 for segment in segments]
        part_numbers = [numbers.index(number) for number in tokens_of]
        positions = [list(range(part.start, part.stop)) for part in parts]
        outbox = seat.outbox(self._pool)
        kv: MicroBatchKV
        if self._limits.gathered:
            gathered = kv = GatheredKV(blocks, parts, part_numbers, outbox)
            recording = seat.recorder.record(
                torch.tensor(ends),
                **embedded(seat, torch.tensor(ids)),
                attention_mask=gathered.attention_mask,
                position_ids=torch.tensor(positions).to(seat.where),
                cache=kv,
                use_cache=True,
            )
        else:
            kv = PackedKV(blocks, parts, part_numbers, outbox)
            lasts = [end for part, end in zip(parts, ends, strict=True) for _ in range(part.count)]
            with seat.attention.packing():
                recording = seat.recorder.record(
                    torch.tensor([lasts]),
                    **embedded(seat, torch.tensor([list(chain.from_iterable(ids))])),
                    attention_mask=None,
                    position_ids=torch.tensor([list(chain.from_iterable(positions))]).to(seat.where),
                    cache=kv,
                    use_cache=True,
                )
            kv.is_recorded = True
        self._plan.append(dict(zip(tokens_of, parts, strict=True)))
        made = MicroBatch(recording.hidden, recording.calls, len(self._plan) - 1, kv)
        if room is not None:
            made.wait_in(room)
        return made

    def head_steps(self, groups: Sequence[Group]) -> int:
        return len(self._steps(groups))

    def finish(self, groups: Sequence[Group]) -> tuple[torch.Tensor, ...]:
        """Give all logits to `on_logits`; returns an empty tuple."""
        seat = self.head
        for step in self._steps(groups):
            rows = torch.cat([hidden.to(seat.where, seat.model.dtype) for _, _, hidden in step])
            logits = seat.recorder.replay(rows[None])[0].cpu()
            row = 0
            for number, index, hidden in step:
                self._on_logits(number, index, logits[row : row + len(hidden)])
                row += len(hidden)
        return ()

    def _steps(self, groups: Sequence[Group]) -> list[list[tuple[int, int, torch.Tensor]]]:
        """What `_wanted` finds in all micro-batches, as many rows at a time as get logits at once."""
        wanted = (self._wanted(micro_batch) for group in groups for micro_batch in group.micro_batches)
        return _steps(list(chain.from_iterable(wanted)), self._head_rows)

    def _wanted(self, micro_batch: MicroBatch) -> list[tuple[int, int, torch.Tensor]]:
        """(segment, index among its kept positions, hidden states [rows, hidden]) where logits are needed."""
        found, token = [], 0
        for row, (number, part) in enumerate(self._plan[micro_batch.number].items()):
            segment = self._segments[number]
            hidden = micro_batch.hidden[row] if self._limits.gathered else micro_batch.hidden[0, token:]
            token += part.count
            first = segment.stop - segment.keep
            start = max(part.start, first)
            if start < part.stop:
                found.append((number, start - first, hidden[start - part.start : part.count]))
        return found

    def commit(self) -> None:
        for segment in self._segments:
            segment.kv.length += len(segment.input_ids)


def _steps(wanted: Sequence[tuple[int, int, torch.Tensor]], rows: int) -> list[list[tuple[int, int, torch.Tensor]]]:
    """The rows of `wanted` in the same order, at most `rows` in each step."""
    steps: list[list[tuple[int, int, torch.Tensor]]] = []
    room = 0
    for number, index, hidden in wanted:
        while len(hidden):
            if not room:
                steps.append([])
                room = rows
            piece = hidden[:room]
            steps[-1].append((number, index, piece))
            room -= len(piece)
            hidden, index = hidden[len(piece) :], index + len(piece)
    return steps
