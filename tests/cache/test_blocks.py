"""Blocks on their way from disk and back: a pass reads the pages its queries see, and writes those it completes."""

from itertools import accumulate, pairwise
from typing import Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cache.plans import SHAPE, FakeFile, plan_of, pool_of
from tests.quick import examples
from tiered.cache import Extent, KVPool, LentBlocks, Part, SequenceKV
from tiered.kernels.attention import PAGE_TOKENS
from tiered.plan.kv import LayerGroup
from tiered.store import PAGE

WINDOWS: Final = (0, 70, 200)
COUNTS: Final = st.sampled_from([1, 1, 2, 63, 64, 65, 130, 300])


def disk_pool(windows: tuple[int, ...] = WINDOWS, **fields: Any) -> KVPool:
    return pool_of(plan_of(windows, on_disk=True, lent_pages=100, **fields))


def reserved(pool: KVPool, tokens: int) -> SequenceKV:
    kv = pool.reserve(tokens)
    assert kv is not None
    return kv


def part_of(start: int, count: int) -> Part:
    return Part(reserved(pool_of(plan_of(context=1000)), 1000), start, count)


def test_a_part_knows_which_pages_it_touches_and_which_it_completes() -> None:
    inside, across, end = part_of(10, 5), part_of(60, 140), part_of(63, 1)
    assert inside.is_within_a_page and not inside.complete_pages
    assert not across.is_within_a_page and across.complete_pages == range(3)
    assert end.is_within_a_page and end.complete_pages == range(1)
    assert (across.first_page, part_of(64, 1).first_page) == (0, 1)


@pytest.mark.parametrize(
    ("start", "window", "oldest"),
    [(500, 0, 0), (127, 64, 1), (126, 64, 0), (128, 64, 1), (128, 65, 1), (128, 66, 0), (3, 64, 0), (64, 1, 1)],
)
def test_the_oldest_page_read_is_the_one_the_window_begins_in(start: int, window: int, oldest: int) -> None:
    assert part_of(start, 1).oldest_page(LayerGroup((0,), window, SHAPE)) == oldest


@pytest.mark.parametrize(("start", "oldest"), [(99, 0), (100, 1), (199, 1), (200, 3), (299, 3)])
def test_a_chunk_begins_at_a_multiple_of_its_length_wherever_a_query_is(start: int, oldest: int) -> None:
    assert part_of(start, 1).oldest_page(LayerGroup((0,), 100, SHAPE, chunked=True)) == oldest


def marker(layer: int, sequence: int, page: int) -> int:
    """What the tests write into a block, to know it again."""
    return 1 + layer * 10_000 + sequence * 1_000 + page


class Sequences:
    """Sequences whose blocks hold nothing but markers."""

    def __init__(self, pool: KVPool, texts: list[list[int]]) -> None:
        self.pool, self.texts = pool, texts
        self.kvs = [reserved(pool, sum(text)) for text in texts]
        self.file = FakeFile(pool.plan.blocks_nbytes)
        self.seen = 0

    def run_pass(self, number: int) -> None:
        """The tokens that each text has in pass `number`, through every layer."""
        members = [i for i, text in enumerate(self.texts) if number < len(text)]
        parts = [Part(self.kvs[i], self.kvs[i].length, self.texts[i][number]) for i in members]
        blocks = LentBlocks(self.pool, parts)
        for layer in range(self.pool.plan.layers):
            places = blocks.map_of(layer)
            memory = torch.zeros(places.lent_nbytes, dtype=torch.uint8)
            self.file.read(places.reads(layer), memory)
            blocks.lend(layer, memory)
            for position, (sequence, part) in enumerate(zip(members, parts, strict=True)):
                self._check_and_fill(blocks, layer, position, sequence, part)
            blocks.take_back(layer)
            self.file.write(places.writes(layer), memory)
        for part in parts:
            part.kv.length = part.stop

    def _check_and_fill(self, blocks: LentBlocks, layer: int, position: int, sequence: int, part: Part) -> None:
        places, nbytes = blocks.map_of(layer), self.pool.layouts[0].block_nbytes
        numbers = blocks.memory(layer).view(torch.int64)
        for page in range(part.oldest_page(places.kept), part.first_page):
            block = numbers[places.offset(position, page) // 8 :][: nbytes // 8]
            assert (block == marker(layer, sequence, page)).all()
            self.seen += 1
        for page in part.complete_pages:
            start = places.offset(position, page)
            assert start >= 0
            numbers[start // 8 :][: nbytes // 8] = marker(layer, sequence, page)


@examples(40)
@given(texts=st.lists(st.lists(COUNTS, min_size=1, max_size=9), min_size=1, max_size=3))
def test_every_page_a_query_sees_comes_back_as_it_was_completed(texts: list[list[int]]) -> None:
    sequences = Sequences(disk_pool(context=2700, tokens_at_once=300), texts)
    for number in range(max(map(len, texts))):
        sequences.run_pass(number)
    crossed = [stop > PAGE_TOKENS for text in texts for stop in list(accumulate(text))[:-1]]
    assert sequences.seen or not any(crossed)


@examples(40)
@given(start=st.integers(0, 1200), count=st.integers(1, 300), window=st.sampled_from(WINDOWS), many=st.booleans())
def test_extents_are_apart_aligned_and_within_what_is_lent(start: int, count: int, window: int, many: bool) -> None:
    pool = disk_pool((window,), context=1500, tokens_at_once=300)
    parts = [Part(reserved(pool, 1500), start, count) for _ in range(1 + many)]
    places = LentBlocks(pool, parts).map_of(0)
    for extents in (places.reads(0), places.writes(0)):
        assert all(x.offset % PAGE == x.memory_offset % PAGE == x.nbytes % PAGE == 0 for x in extents)
        assert_apart([(x.offset, x.offset + x.nbytes) for x in extents], pool.plan.blocks_nbytes)
    extents = places.reads(0) + places.writes(0)
    assert_apart([(x.memory_offset, x.memory_offset + x.nbytes) for x in extents], places.lent_nbytes)


def assert_apart(spans: list[tuple[int, int]], nbytes: int) -> None:
    spans.sort()
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    assert not spans or (spans[0][0] >= 0 and spans[-1][1] <= nbytes)


def test_what_a_layer_needs_of_a_sequence_is_one_extent() -> None:
    pool = disk_pool((0,), context=1000)
    other, kv = reserved(pool, 100), reserved(pool, 1000)
    nbytes = pool.layouts[0].block_nbytes
    (found,) = LentBlocks(pool, [Part(kv, 640, 200)]).map_of(0).reads(0)
    assert found == Extent(pool.file_offset(0, kv.block(0, 0)), 0, 10 * nbytes)
    assert found.offset >= pool.file_offset(0, other.block(0, 1)) + nbytes


def test_a_ring_is_parted_only_where_it_ends() -> None:
    pool = disk_pool((128,), context=2000, tokens_at_once=1)
    kv = reserved(pool, 2000)
    assert kv.pages == (4,)
    # Pages 5 and 6 lie in blocks 1 and 2; page 7 in block 3, page 8 in block 0.
    straight = LentBlocks(pool, [Part(kv, 500, 1)]).map_of(0).reads(0)
    parted = LentBlocks(pool, [Part(kv, 576 + 60, 1)]).map_of(0).reads(0)
    assert [extent.nbytes // pool.layouts[0].block_nbytes for extent in straight] == [2]
    assert [pool.file_offset(0, kv.block(0, page)) for page in (7, 8)] == [extent.offset for extent in parted]


def test_of_a_prompt_longer_than_the_ring_only_what_stays_is_written() -> None:
    pool = disk_pool((64, 0), context=2000, tokens_at_once=64)
    kv = reserved(pool, 2000)
    blocks = LentBlocks(pool, [Part(kv, 0, 1999)])
    written = [sum(x.nbytes for x in blocks.map_of(n).writes(n)) // pool.layouts[0].block_nbytes for n in (0, 1)]
    assert written == [kv.pages[pool.group(0)], 1999 // PAGE_TOKENS] and written[0] < 5


def test_a_token_inside_a_page_writes_nothing_and_reads_all_before_it() -> None:
    pool = disk_pool((0,), context=1000)
    places = LentBlocks(pool, [Part(reserved(pool, 1000), 200, 1)]).map_of(0)
    assert places.writes(0) == []
    assert places.lent_nbytes == places.reads(0)[0].nbytes == 3 * pool.layouts[0].block_nbytes


def test_a_first_short_prompt_moves_nothing() -> None:
    pool = disk_pool((0,), context=1000)
    places = LentBlocks(pool, [Part(reserved(pool, 1000), 0, 63)]).map_of(0)
    assert (places.lent_nbytes, places.reads(0), places.writes(0)) == (0, [], [])
