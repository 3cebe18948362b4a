"""Passes and their micro-batches: prompts share what room there is; every token once and in order, none too large."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final

from hypothesis import given
from hypothesis import strategies as st

from tests.plan.plans import CACHE, plan_of
from tiered.plan import Plan
from tiered.plan.pace import LEAST, Pace
from tiered.plan.passes import MicroBatchLimits, plan_micro_batches, share_pass
from tiered.plan.state import Grid, StateShape
from tiered.units import PAGE_TOKENS

LENGTHS: Final = st.sampled_from([1, 1, 1, 2, 6, 7, 8, 63, 64, 65, 200])
SEGMENTS: Final = st.lists(st.tuples(st.integers(0, 300), LENGTHS), min_size=1, max_size=12)
"""Tokens that the cache holds already, and new ones."""
LENT: Final = 10
"""Pages: enough for any of these segments."""


def tokens_of(past: int, tokens: int) -> range:
    return range(past, past + tokens)


def plan_on(grid: Grid, **fields: Any) -> Plan:
    """A plan of a model whose prompts are cut on `grid`."""
    return plan_of(cache=replace(CACHE, state=StateShape((), grid, 0, 0, 0)), **fields)


def is_within_a_page(tokens: range) -> bool:
    return tokens.start // PAGE_TOKENS == (tokens.stop - 1) // PAGE_TOKENS


def limits_of(**fields: Any) -> MicroBatchLimits:
    return MicroBatchLimits(**({"rows": 64} | fields))


LIMITS: Final = st.builds(
    MicroBatchLimits,
    rows=st.sampled_from([1, 7, 64, 512]),
    gathered=st.booleans(),
    gathered_rows=st.integers(1, 4),
    within_pages=st.booleans(),
    lent_pages=st.sampled_from([0, LENT, 25]),
)


@given(texts=SEGMENTS, limits=LIMITS)
def test_every_token_is_computed_once_and_after_those_before_it(
    texts: list[tuple[int, int]], limits: MicroBatchLimits
) -> None:
    segments = [tokens_of(*text) for text in texts]
    plan = plan_micro_batches(segments, limits)
    parts = [(number, part) for group in plan for micro_batch in group for number, part in micro_batch.items()]
    for number, segment in enumerate(segments):
        mine = [part for its_number, part in parts if its_number == number]
        assert mine[0].start == segment.start and mine[-1].stop == segment.stop
        assert all(mine)
        assert all(first.stop == second.start for first, second in pairwise(mine))
    assert sum(len(part) for _, part in parts) == sum(tokens for _, tokens in texts)


@given(texts=SEGMENTS, limits=LIMITS)
def test_a_segment_is_in_one_group_and_only_a_long_one_in_several_micro_batches(
    texts: list[tuple[int, int]], limits: MicroBatchLimits
) -> None:
    plan = plan_micro_batches([tokens_of(*text) for text in texts], limits)
    assert all(micro_batch for group in plan for micro_batch in group) and all(plan)
    groups = Counter(number for group in plan for number in set().union(*group))
    assert set(groups.values()) == {1}
    for group in plan:
        members = set().union(*group)
        assert len(group) == 1 or len(members) == 1


@given(texts=SEGMENTS, limits=LIMITS)
def test_no_micro_batch_has_more_rows_than_allowed(texts: list[tuple[int, int]], limits: MicroBatchLimits) -> None:
    for group in plan_micro_batches([tokens_of(*text) for text in texts], limits):
        for micro_batch in group:
            rows = sum(len(part) for part in micro_batch.values())
            if limits.gathered and len(micro_batch) > 1:
                assert rows <= limits.gathered_rows
            else:
                assert rows <= limits.rows


@given(texts=SEGMENTS, limits=LIMITS)
def test_no_group_has_more_pages_in_memory_than_allowed(texts: list[tuple[int, int]], limits: MicroBatchLimits) -> None:
    segments = [tokens_of(*text) for text in texts]
    for group in plan_micro_batches(segments, limits):
        members = set().union(*group)
        pages = sum(segments[number].stop // PAGE_TOKENS for number in members)
        assert not limits.lent_pages or pages <= limits.lent_pages


@given(texts=SEGMENTS, limits=LIMITS)
def test_single_tokens_come_first_in_a_micro_batch(texts: list[tuple[int, int]], limits: MicroBatchLimits) -> None:
    for group in plan_micro_batches([tokens_of(*text) for text in texts], limits):
        for micro_batch in group:
            counts = [len(part) for part in micro_batch.values()]
            assert counts == sorted(counts, key=lambda count: count > 1)


@given(texts=SEGMENTS, rows=st.sampled_from([1, 7, 64]), together=st.integers(1, 4), within_pages=st.booleans())
def test_gathered_micro_batches_have_rows_of_equal_length(
    texts: list[tuple[int, int]], rows: int, together: int, within_pages: bool
) -> None:
    segments = [tokens_of(*text) for text in texts]
    limits = limits_of(rows=rows, gathered=True, gathered_rows=together, within_pages=within_pages)
    for group in plan_micro_batches(segments, limits):
        for micro_batch in group:
            counts = {len(part) for part in micro_batch.values()}
            assert len(counts) == 1 and (len(micro_batch) == 1 or counts == {1})
            assert not within_pages or all(is_within_a_page(part) for part in micro_batch.values())


def test_gathered_single_tokens_go_with_others_of_like_length() -> None:
    segments = [tokens_of(past, 1) for past in (300, 5, 290, 6)]
    plan = plan_micro_batches(segments, limits_of(gathered=True, gathered_rows=2))
    assert [set(micro_batch) for (micro_batch,) in plan] == [{1, 3}, {0, 2}]


def test_decoding_and_short_prompts_share_a_micro_batch() -> None:
    segments = [tokens_of(0, 20), tokens_of(100, 1), tokens_of(0, 30), tokens_of(50, 1)]
    ((micro_batch,),) = plan_micro_batches(segments, limits_of(rows=64))
    assert [(number, part.start, len(part)) for number, part in micro_batch.items()] == [
        (1, 100, 1),
        (3, 50, 1),
        (0, 0, 20),
        (2, 0, 30),
    ]


def test_a_segment_longer_than_a_micro_batch_is_cut() -> None:
    (group,) = plan_micro_batches([tokens_of(10, 150)], limits_of(rows=64))
    assert [(part.start, part.stop) for (part,) in (each.values() for each in group)] == [
        (10, 74),
        (74, 138),
        (138, 160),
    ]


def test_nothing_makes_no_micro_batch() -> None:
    assert plan_micro_batches([], limits_of()) == []


def test_prompts_share_a_pass_the_oldest_first_then_the_shortest() -> None:
    plan = plan_of(max_batched_tokens=100, objective="throughput")
    assert share_pass(plan, Pace(), 4, [90, 30, 10, 30]) == [48, 30, 10, 8]
    assert share_pass(plan, Pace(), 0, [90, 5]) == [90, 5]
    assert share_pass(plan, Pace(), 100, [90, 5]) == [0, 0]
    assert share_pass(plan, Pace(), 4, []) == []


def test_where_latency_counts_prompts_keep_to_the_pace_while_others_decode() -> None:
    plan = plan_of(max_batched_tokens=1000, objective="latency")
    assert share_pass(plan, Pace(), 1, [500]) == [LEAST]
    assert share_pass(plan, Pace(), 0, [500]) == [500]


@given(
    text=st.integers(2, 400), rows=st.integers(1, 300), tokens=st.sampled_from([0, 1, 8, 64]), one_cell=st.booleans()
)
def test_on_a_grid_parts_begin_on_its_lines_however_a_prompt_is_cut(
    text: int, rows: int, tokens: int, one_cell: bool
) -> None:
    grid = Grid(tokens, one_cell and tokens > 1)
    plan = plan_on(grid, max_batched_tokens=max(rows, grid.cell(text)), objective="throughput")
    limits, done, parts = limits_of(rows=rows, grid=grid), 0, list[range]()
    while done < text:
        (share,) = share_pass(plan, Pace(), 0, [text - done])
        assert share, "a prompt must get on"
        groups = plan_micro_batches([range(done, done + share)], limits)
        parts += [part for group in groups for micro_batch in group for part in micro_batch.values()]
        done += share
    assert [token for part in parts for token in part] == list(range(text))
    if not tokens:
        assert parts == [range(text)]
    elif tokens > 1:
        assert all(part.start % tokens == 0 for part in parts)
        assert all(len(part) == 1 for part in parts if part.stop % tokens == 1)
        assert max(map(len, parts)) <= (tokens if grid.one_cell else max(rows, tokens))


def test_where_latency_counts_a_prompt_takes_at_least_a_cell_of_its_grid() -> None:
    plan = plan_on(Grid(256), max_batched_tokens=1000, objective="latency")
    assert share_pass(plan, Pace(), 1, [500]) == [256]
    assert share_pass(plan, Pace(), 900, [500]) == [0]
    assert share_pass(plan, Pace(), 0, [300, 90]) == [300, 90]
    assert share_pass(plan, Pace(), 0, [900, 300]) == [512, 300]
