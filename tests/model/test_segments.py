"""Micro-batches of segments: every token once and in order, none too large, and what does not fit is refused."""

from collections import Counter
from contextlib import ExitStack, nullcontext
from itertools import pairwise
from typing import Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import (
    LENGTH_DEPENDENT,
    SHORT_TEXT,
    Tiny,
    open_runtime,
    prompts_for,
    reference_logits,
    reserved,
    run_segments,
)
from tiered.cache import CachePlan, KVPool, KVShape, SequenceKV, layer_groups
from tiered.errors import ConfigError
from tiered.kernels.attention import PAGE_TOKENS
from tiered.model import MicroBatchLimits, Segment, Segments
from tiered.model.segments import plan_micro_batches

LENGTHS: Final = st.sampled_from([1, 1, 1, 2, 6, 7, 8, 63, 64, 65, 200])
SEGMENTS: Final = st.lists(st.tuples(st.integers(0, 300), LENGTHS), min_size=1, max_size=12)
"""Tokens that the cache holds already, and new ones."""
LENT: Final = 10
"""Pages: enough for any of these segments."""


def segment_of(past: int, tokens: int) -> Segment:
    return Segment(SequenceKV(past + tokens, (0,), (1,), 0, past), [3] * tokens)


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
    segments = [segment_of(*text) for text in texts]
    plan = plan_micro_batches(segments, limits)
    parts = [(number, part) for group in plan for micro_batch in group for number, part in micro_batch.items()]
    for number, segment in enumerate(segments):
        mine = [part for its_number, part in parts if its_number == number]
        assert mine[0].start == segment.kv.length and mine[-1].stop == segment.stop
        assert all(part.kv is segment.kv and part.count for part in mine)
        assert all(first.stop == second.start for first, second in pairwise(mine))
    assert sum(part.count for _, part in parts) == sum(tokens for _, tokens in texts)


@given(texts=SEGMENTS, limits=LIMITS)
def test_a_segment_is_in_one_group_and_only_a_long_one_in_several_micro_batches(
    texts: list[tuple[int, int]], limits: MicroBatchLimits
) -> None:
    plan = plan_micro_batches([segment_of(*text) for text in texts], limits)
    assert all(micro_batch for group in plan for micro_batch in group) and all(plan)
    groups = Counter(number for group in plan for number in set().union(*group))
    assert set(groups.values()) == {1}
    for group in plan:
        members = set().union(*group)
        assert len(group) == 1 or len(members) == 1


@given(texts=SEGMENTS, limits=LIMITS)
def test_no_micro_batch_has_more_rows_than_allowed(texts: list[tuple[int, int]], limits: MicroBatchLimits) -> None:
    for group in plan_micro_batches([segment_of(*text) for text in texts], limits):
        for micro_batch in group:
            rows = sum(part.count for part in micro_batch.values())
            if limits.gathered and len(micro_batch) > 1:
                assert rows <= limits.gathered_rows
            else:
                assert rows <= limits.rows


@given(texts=SEGMENTS, limits=LIMITS)
def test_no_group_has_more_pages_in_memory_than_allowed(texts: list[tuple[int, int]], limits: MicroBatchLimits) -> None:
    segments = [segment_of(*text) for text in texts]
    for group in plan_micro_batches(segments, limits):
        members = set().union(*group)
        pages = sum(segments[number].stop // PAGE_TOKENS for number in members)
        assert not limits.lent_pages or pages <= limits.lent_pages


@given(texts=SEGMENTS, limits=LIMITS)
def test_single_tokens_come_first_in_a_micro_batch(texts: list[tuple[int, int]], limits: MicroBatchLimits) -> None:
    for group in plan_micro_batches([segment_of(*text) for text in texts], limits):
        for micro_batch in group:
            counts = [part.count for part in micro_batch.values()]
            assert counts == sorted(counts, key=lambda count: count > 1)


@given(texts=SEGMENTS, rows=st.sampled_from([1, 7, 64]), together=st.integers(1, 4), within_pages=st.booleans())
def test_gathered_micro_batches_have_rows_of_equal_length(
    texts: list[tuple[int, int]], rows: int, together: int, within_pages: bool
) -> None:
    segments = [segment_of(*text) for text in texts]
    limits = limits_of(rows=rows, gathered=True, gathered_rows=together, within_pages=within_pages)
    for group in plan_micro_batches(segments, limits):
        for micro_batch in group:
            counts = {part.count for part in micro_batch.values()}
            assert len(counts) == 1 and (len(micro_batch) == 1 or counts == {1})
            assert not within_pages or all(part.is_within_a_page for part in micro_batch.values())


def test_gathered_single_tokens_go_with_others_of_like_length() -> None:
    segments = [segment_of(past, 1) for past in (300, 5, 290, 6)]
    plan = plan_micro_batches(segments, limits_of(gathered=True, gathered_rows=2))
    assert [set(micro_batch) for (micro_batch,) in plan] == [{1, 3}, {0, 2}]


def test_decoding_and_short_prompts_share_a_micro_batch() -> None:
    segments = [segment_of(0, 20), segment_of(100, 1), segment_of(0, 30), segment_of(50, 1)]
    ((micro_batch,),) = plan_micro_batches(segments, limits_of(rows=64))
    assert [(number, part.start, part.count) for number, part in micro_batch.items()] == [
        (1, 100, 1),
        (3, 50, 1),
        (0, 0, 20),
        (2, 0, 30),
    ]


def test_a_segment_longer_than_a_micro_batch_is_cut() -> None:
    (group,) = plan_micro_batches([segment_of(10, 150)], limits_of(rows=64))
    assert [(part.start, part.stop) for (part,) in (each.values() for each in group)] == [
        (10, 74),
        (74, 138),
        (138, 160),
    ]


def test_nothing_makes_no_micro_batch() -> None:
    assert plan_micro_batches([], limits_of()) == []


def pool_of(sequences: int = 2, context: int = 100) -> KVPool:
    plan = CachePlan(KVShape(1, 2, 1, "bfloat16"), 16, False, layer_groups((0,)), sequences, context, 200, context)
    return KVPool(plan, torch.zeros(plan.pool_nbytes, dtype=torch.uint8))


def refused(segment: Segment, pool: KVPool) -> str:
    with pytest.raises(ConfigError) as caught:
        Segments([segment], pool, limits_of(), 1, nullcontext, lambda number, index, logits: None)
    return str(caught.value)


def test_a_segment_beyond_what_was_reserved_is_refused() -> None:
    pool = pool_of()
    kv = pool.reserve(10)
    assert kv is not None
    kv.length = 4
    message = "segment 0: tokens 4 to 11 of a sequence with room for 10; expected at least one, and reserve as many"
    assert message in refused(Segment(kv, [1] * 7), pool)


def test_a_segment_without_tokens_is_refused() -> None:
    pool = pool_of()
    kv = pool.reserve(10)
    assert kv is not None
    assert "expected at least one" in refused(Segment(kv, []), pool)


@pytest.mark.parametrize("micro_batch", [None, 1, 4])
@pytest.mark.parametrize("keeps", [(0, 0), (1, 5), (6, 0)])
def test_logits_come_for_the_last_positions_asked_for_and_no_others(
    tiny: Tiny, keeps: tuple[int, int], micro_batch: int | None
) -> None:
    prompts = prompts_for("llama")
    with open_runtime(tiny.store("llama"), micro_batch_rows=micro_batch) as runtime, ExitStack() as stack:
        kvs = [reserved(stack, runtime, len(prompt)) for prompt in prompts]
        found = run_segments(runtime, [Segment(*each) for each in zip(kvs, map(list, prompts), keeps, strict=True)])
        assert [kv.length for kv in kvs] == [len(prompt) for prompt in prompts]
    for rows, keep, prompt, logits in zip(found, keeps, prompts, tiny.reference("llama").logits, strict=True):
        assert len(rows) == keep
        if keep:
            expected = logits[len(prompt) - keep : len(prompt)]
            torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


def test_logits_come_in_pieces_of_bounded_size(tiny: Tiny) -> None:
    (prompt, _), pieces = prompts_for("llama"), list[tuple[int, int, int]]()
    with open_runtime(tiny.store("llama")) as runtime, ExitStack() as stack:
        kv = reserved(stack, runtime, len(prompt))
        segment = Segment(kv, list(prompt), len(prompt))
        runtime.run([segment], lambda number, index, rows: pieces.append((number, index, len(rows))))
        most = runtime.plan.head_rows
    assert most < len(prompt)
    assert [index for _, index, _ in pieces] == list(range(0, len(prompt), most))
    assert max(rows for _, _, rows in pieces) == most


def test_a_pass_that_fails_leaves_lengths_as_they_were(tiny: Tiny) -> None:
    def fail(*_: object) -> None:
        raise ValueError("of the caller's own")

    (prompt, _) = prompts_for("llama")
    with open_runtime(tiny.store("llama")) as runtime, ExitStack() as stack:
        kv = reserved(stack, runtime, len(prompt))
        with pytest.raises(ValueError, match="of the caller's own"):
            runtime.run([Segment(kv, list(prompt), 1)], fail)
        assert kv.length == 0
        (found,) = run_segments(runtime, [Segment(kv, list(prompt), 1)])
    torch.testing.assert_close(found[0], tiny.reference("llama").logits[0][len(prompt) - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LENGTH_DEPENDENT)
def test_pieces_of_a_prompt_are_turned_as_the_whole_of_it_is(tiny: Tiny, name: str) -> None:
    (prompt, _) = prompts_for(name)
    assert 5 < SHORT_TEXT < len(prompt)
    found = []
    with open_runtime(tiny.store(name)) as runtime, ExitStack() as stack:
        kv = reserved(stack, runtime, len(prompt))
        for ids in (prompt[:5], prompt[5:]):
            found += run_segments(runtime, [Segment(kv, list(ids), len(ids), text_length=len(prompt))])
    expected = reference_logits(tiny.model(name), prompt)
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-4)
