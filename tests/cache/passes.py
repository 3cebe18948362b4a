"""Sequences on their way through the paged cache without a model: what micro-batches store and their queries may read.

`Passes` does what an engine does with segments: plans micro-batches, lends blocks, stores, reads, writes to the
file. After every micro-batch, all that its queries may read is compared with what was put in.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Final

import torch

from tests.cache.plans import FakeFile, pool_of
from tests.late_device import LateDevice
from tiered.cache import (
    CachePlan,
    GatheredKV,
    KVShape,
    LentBlocks,
    MicroBatchKV,
    Outbox,
    PackedKV,
    PagedRead,
    PageLayout,
    Part,
    SequenceKV,
)
from tiered.device import Lease
from tiered.kernels.attention import PAGE_TOKENS, BlockTable, Pages
from tiered.model import Segment
from tiered.plan.kv import outbox_nbytes
from tiered.plan.passes import MicroBatchLimits, plan_micro_batches

LONGEST: Final = 700
LATENT_RANK: Final = 16
States = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, [heads, tokens, width]."""


@cache
def truth(layer: int, sequence: int, shape: KVShape) -> States:
    """All keys and values that a sequence will ever have in a layer."""
    generator = torch.Generator().manual_seed(1000 * layer + sequence)
    keys, values = (torch.randn(shape.heads, LONGEST, width, generator=generator).bfloat16() for width in shape.widths)
    return keys, values if shape.value_dim else keys


@cache
def as_stored(layer: int, sequence: int, layout: PageLayout) -> States:
    """The same, every complete page as one block gives it back. float64."""
    whole = LONGEST // PAGE_TOKENS
    found = []
    shape = layout.shape
    states = truth(layer, sequence, shape)
    paged = [x[:, : whole * PAGE_TOKENS].unflatten(1, (whole, PAGE_TOKENS)).transpose(0, 1) for x in states]
    offsets = torch.arange(whole) * layout.block_nbytes
    memory = torch.zeros(whole * layout.block_nbytes, dtype=torch.uint8)
    layout.store(memory, offsets, paged[0], paged[1] if shape.value_dim else paged[1][..., :0])
    for pages, width in zip(layout.pages(BlockTable(memory, offsets[None])), shape.widths, strict=True):
        size = (shape.heads, PAGE_TOKENS, width)
        found.append(torch.cat([pages.widen(0, page, size, False, torch.float64) for page in range(whole)], dim=1))
    return found[0], found[1]


class Passes:
    """Runs texts through a cache as an engine would, and checks what every micro-batch reads."""

    def __init__(self, plan: CachePlan, limits: MicroBatchLimits, outbox_rows: int = 0) -> None:
        """`outbox_rows`: tokens whose states find room on their way from a device to the cache; 0: there is none."""
        self.plan, self.limits, self.pool = plan, limits, pool_of(plan)
        self.device: LateDevice | None = None
        if outbox_rows:
            self.device = LateDevice()
            nbytes = outbox_nbytes(plan.groups, outbox_rows)
            memory = torch.full((nbytes,), 255, dtype=torch.uint8)
            self.pool.outbox = Outbox(Lease(self.device, nbytes, "kv"), memory)
        self.file = FakeFile(plan.blocks_nbytes if plan.on_disk else 0)
        self.kvs: dict[int, SequenceKV] = {}

    def run_texts(self, texts: Sequence[tuple[int, Sequence[int]]]) -> None:
        """All passes of `texts`; each sequence has its place only while it has tokens left."""
        for number in range(max(begin + len(counts) for begin, counts in texts)):
            tokens = {
                i: counts[number - begin]
                for i, (begin, counts) in enumerate(texts)
                if begin <= number < begin + len(counts)
            }
            for i in list(self.kvs):
                if i not in tokens:
                    self.leave(i)
            for i in tokens:
                if i not in self.kvs:
                    self.enter(i, sum(texts[i][1]))
            self.run_pass(tokens)

    def enter(self, sequence: int, tokens: int) -> None:
        kv = self.pool.reserve(min(LONGEST, tokens))
        assert kv is not None
        self.kvs[sequence] = kv

    def leave(self, sequence: int) -> None:
        self.pool.release(self.kvs.pop(sequence))

    def run_pass(self, tokens: dict[int, int], commit: bool = True) -> None:
        """So many tokens of each sequence, through every layer."""
        members = list(tokens)
        segments = [Segment(self.kvs[i], [0] * tokens[i]) for i in members]
        cut = plan_micro_batches([segment.tokens for segment in segments], self.limits)
        groups = [self._group(members, segments, micro_batches) for micro_batches in cut]
        for layer in (layer for layer, group in enumerate(self.pool.group_of) if group is not None):
            for blocks, micro_batches in groups:
                self._lend(blocks, layer)
                for kv, sequences in micro_batches:
                    self._compute(kv, sequences, layer)
                if self.pool.outbox is not None:
                    self.pool.outbox.flush()
                self._take_back(blocks, layer)
        for segment in segments if commit else ():
            segment.kv.length = segment.stop

    def _group(
        self, members: list[int], segments: list[Segment], micro_batches: list[dict[int, range]]
    ) -> tuple[LentBlocks, list[tuple[MicroBatchKV, list[int]]]]:
        numbers = sorted({number for tokens_of in micro_batches for number in tokens_of})
        blocks = LentBlocks(self.pool, [segments[number].part for number in numbers])
        made: list[tuple[MicroBatchKV, list[int]]] = []
        kind: Callable[..., MicroBatchKV] = GatheredKV if self.limits.gathered else PackedKV
        for tokens_of in micro_batches:
            rows = [numbers.index(number) for number in tokens_of]
            parts = [Part(segments[i].kv, tokens.start, len(tokens)) for i, tokens in tokens_of.items()]
            made.append((kind(blocks, parts, rows, self.pool.outbox), [members[number] for number in tokens_of]))
        return blocks, made

    def _lend(self, blocks: LentBlocks, layer: int) -> None:
        if self.plan.on_disk:
            memory = torch.full((blocks.map_of(layer).lent_nbytes,), 255, dtype=torch.uint8)
            self.file.read(blocks.map_of(layer).reads(layer), memory)
            blocks.lend(layer, memory)

    def _take_back(self, blocks: LentBlocks, layer: int) -> None:
        if self.plan.on_disk:
            self.file.write(blocks.map_of(layer).writes(layer), blocks.memory(layer))
            blocks.take_back(layer)

    def _compute(self, kv: MicroBatchKV, sequences: list[int], layer: int) -> None:
        states = [
            [x[:, part.start : part.stop] for x in truth(layer, sequence, self._shape(layer))]
            for part, sequence in zip(kv.parts, sequences, strict=True)
        ]
        if isinstance(kv, GatheredKV):
            rows = kv.update(torch.stack([k for k, _ in states]), torch.stack([v for _, v in states]), layer)
            self._check_rows(kv, sequences, layer, rows)
            return
        assert isinstance(kv, PackedKV)
        keys, values = (torch.cat([part[i] for part in states], dim=1)[None] for i in (0, 1))
        if not self._shape(layer).value_dim:
            # As a family hands them over: what has no positions, and what has.
            keys, values = keys[..., :LATENT_RANK], keys[..., LATENT_RANK:]
        kv.update(keys, values, layer)
        token = member = position = 0
        for read in kv.reads(layer):
            assert read.start == token
            count, tokens = len(read.count), read.stop - read.start
            parts = kv.parts[member : member + count]
            if count == 1:
                # Where a chunk ends in a part, there is a call for the tokens up to there.
                position = max(position, parts[0].start)
                parts = (Part(parts[0].kv, position, tokens),)
                position += tokens
            if self.device is not None:
                # Prompts attend at the device, whatever this pass has of them: here, what has no single token.
                wholes = [kv.blocks.parts[n] for n in kv.numbers[member : member + count]]
                assert [(read.away is None)] * count == [not (part.start and part.count == 1) for part in wholes]
            self._check_read(read, parts, sequences[member : member + count], layer)
            token = read.stop
            if parts[-1].stop == kv.parts[member + count - 1].stop:
                member, position = member + count, 0
        assert (token, member) == (sum(part.count for part in kv.parts), len(kv.parts))

    def _check_read(self, read: PagedRead, parts: Sequence[Part], sequences: Sequence[int], layer: int) -> None:
        kept = self.plan.groups[self.pool.group(layer)]
        assert read.window == kept.window
        states = read.pages()
        for row, (part, sequence) in enumerate(zip(parts, sequences, strict=True)):
            assert part.count * len(parts) == read.stop - read.start
            first = kept.first_seen(part.start)
            assert not kept.chunked or first == kept.first_seen(part.stop - 1)
            assert (int(read.first[row]), int(read.count[row])) == (first, part.stop)
            for page in range(first // PAGE_TOKENS, (part.stop - 1) // PAGE_TOKENS + 1):
                begin, end = page * PAGE_TOKENS, min(part.stop, (page + 1) * PAGE_TOKENS)
                # Queries with their own slot in the page, and those in later ones.
                readers = [own for own, there in ((True, end > part.start), (False, end < part.stop)) if there]
                for own in readers:
                    found = self._widened(layer, states, row, page, end - begin, own)
                    expected = self._expected(layer, sequence, slice(begin, end), own)
                    for x, y in zip(found, expected, strict=True):
                        assert torch.equal(x, y)

    def _check_rows(self, kv: GatheredKV, sequences: list[int], layer: int, rows: States) -> None:
        """Keys and values in one piece: own page as computed, earlier ones as stored, padded on the left."""
        longest = max(part.stop for part in kv.parts)
        for row, (part, sequence) in enumerate(zip(kv.parts, sequences, strict=True)):
            if kv.attention_mask is not None:
                assert kv.attention_mask[row].tolist() == [0] * (longest - part.stop) + [1] * part.stop
            own = slice(part.first_page * PAGE_TOKENS, part.stop)
            earlier = slice(0, own.start)
            for where, is_own in ((earlier, False), (own, True)):
                expected = self._expected(layer, sequence, where, is_own)
                for found, y in zip(rows, expected, strict=True):
                    padding = longest - part.stop
                    assert torch.equal(found[row, :, padding + where.start : padding + where.stop], y.bfloat16())

    def _widened(
        self, layer: int, states: tuple[Pages, Pages], row: int, page: int, tokens: int, own: bool
    ) -> Iterator[torch.Tensor]:
        shape = self._shape(layer)
        for pages, width in zip(states, shape.widths, strict=True):
            yield pages.widen(row, page, (shape.heads, tokens, width), own, torch.float64)

    def _expected(self, layer: int, sequence: int, slots: slice, own: bool) -> list[torch.Tensor]:
        shape = self._shape(layer)
        states = truth(layer, sequence, shape)
        if not own:
            states = as_stored(layer, sequence, layout_of(shape, self.plan.bits))
        return [x[:, slots].double() for x in states]

    def _shape(self, layer: int) -> KVShape:
        return self.plan.groups[self.pool.group(layer)].shape


@cache
def layout_of(shape: KVShape, bits: int) -> PageLayout:
    """The same object for equal arguments: `as_stored` remembers by it."""
    return PageLayout(shape, bits)
