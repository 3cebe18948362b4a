"""The pool: no block has two owners, what is given back can be had again, and the plan holds what it says."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.plans import LATENT, MIXED, SHAPE, UNEQUAL, plan_of, pool_of
from tiered.cache import CachePlan, KVPool, Part, SequenceKV, layer_groups
from tiered.errors import ConfigError
from tiered.kernels.attention import PAGE_TOKENS
from tiered.plan.kv import GROUPS_AT_ONCE

PLANS = st.builds(
    plan_of,
    st.sampled_from([(0, 0, 0, 0), (8, 0, 8, 8), (100, 8, 100, 0)]),
    st.sampled_from([SHAPE, MIXED, (None,) * 4]),
    bits=st.sampled_from([16, 8]),
    on_disk=st.booleans(),
    sequences=st.integers(1, 5),
    context=st.integers(1, 700),
    tokens_at_once=st.integers(1, 200),
)


def bytes_of(pool: KVPool, kv: SequenceKV) -> list[tuple[int, int]]:
    """Where all of a sequence's blocks lie, as (start, stop) from the first block of the first layer."""
    found = []
    for layer in range(pool.plan.layers):
        group = pool.group_of[layer]
        if group is None:
            continue
        for page in range(kv.pages[group]):
            start = pool.file_offset(layer, kv.block(group, page))
            found.append((start, start + pool.layouts[group].block_nbytes))
    return found


def assert_apart(pool: KVPool, held: list[SequenceKV]) -> None:
    """No byte is in two blocks, none lies outside, and no two sequences share a tail."""
    spans = sorted(span for kv in held for span in bytes_of(pool, kv))
    position = 0
    for start, stop in spans:
        assert start >= position
        position = stop
    assert position <= pool.plan.blocks_nbytes
    tails = [kv.tail for kv in held]
    assert len(set(tails)) == len(tails) and all(0 <= tail < pool.plan.sequences for tail in tails)


@settings(deadline=None)
@given(plan=PLANS, data=st.data())
def test_sequences_come_and_go_and_never_share_memory(plan: CachePlan, data: st.DataObject) -> None:
    pool = pool_of(plan)
    held: list[SequenceKV] = []
    for _ in range(data.draw(st.integers(1, 25), "steps")):
        leaves = data.draw(st.booleans(), "leaves")
        if held and leaves:
            who = data.draw(st.integers(0, len(held) - 1), "who")
            pool.release(held.pop(who))
        elif (kv := pool.reserve(data.draw(st.integers(1, plan.context), "tokens"))) is not None:
            held.append(kv)
        assert_apart(pool, held)
        assert pool.is_empty == (not held)
    for kv in held:
        pool.release(kv)
    assert pool.is_empty
    # Nothing has been lost on the way: as many of the longest fit as into a new pool.
    assert fill(pool) == fill(pool_of(plan)) == plan.sequences


def fill(pool: KVPool) -> int:
    """How many of the longest sequences find room."""
    count = 0
    while pool.reserve(pool.plan.context) is not None:
        count += 1
    return count


@settings(deadline=None)
@given(plan=PLANS, share=st.floats(0.05, 1), data=st.data())
def test_any_mix_within_the_plan_finds_room_one_by_one(plan: CachePlan, share: float, data: st.DataObject) -> None:
    plan = replace(plan, tokens=max(plan.context, int(plan.tokens * share)))
    pool, left = pool_of(plan), plan.tokens
    for _ in range(plan.sequences):
        if not left:
            break
        tokens = data.draw(st.integers(1, min(left, plan.context)), "tokens")
        assert pool.reserve(tokens) is not None
        left -= tokens


def test_a_full_pool_says_so_and_takes_others_once_somebody_leaves() -> None:
    pool = pool_of(plan_of(sequences=2))
    first, second = pool.reserve(320), pool.reserve(1)
    assert first is not None and second is not None
    assert pool.reserve(1) is None
    pool.release(first)
    assert pool.reserve(320) is not None


def test_blocks_may_run_out_before_sequences_do() -> None:
    pool = pool_of(plan_of(sequences=8, context=640, tokens=640))
    long = pool.reserve(640)
    assert long is not None
    held = []
    while (kv := pool.reserve(PAGE_TOKENS)) is not None:
        held.append(kv)
    assert len(held) == 7
    for kv in held:
        pool.release(kv)
    assert pool.reserve(640) is None
    pool.release(long)
    assert pool.reserve(640) is not None


@settings(deadline=None)
@given(
    window=st.integers(1, 300),
    most=st.integers(1, 300),
    start=st.integers(0, 2000),
    chunked=st.booleans(),
    data=st.data(),
)
def test_a_ring_holds_all_that_a_micro_batch_reads_and_adds(
    window: int, most: int, start: int, chunked: bool, data: st.DataObject
) -> None:
    pool = pool_of(plan_of((window,), chunked=[0] if chunked else (), context=2400, tokens_at_once=most, sequences=1))
    kv = pool.reserve(2400)
    assert kv is not None
    part = Part(kv, start, data.draw(st.integers(1, most)))
    pages = range(part.oldest_page(pool.plan.groups[0]), (part.stop - 1) // PAGE_TOKENS + 1)
    assert len({kv.block(0, page) for page in pages}) == len(pages)


def test_layers_with_a_window_take_no_more_for_longer_contexts() -> None:
    def nbytes(context: int, windows: tuple[int, ...]) -> int:
        return plan_of(windows, context=context, sequences=4).memory_nbytes

    assert nbytes(100_000, (128, 128)) == nbytes(1_000, (128, 128))
    full, mixed = nbytes(100_000, (0, 0)), nbytes(100_000, (128, 0))
    assert full / 2 < mixed < full * 0.51


def test_on_disk_only_tails_and_the_ring_are_in_memory() -> None:
    there, here = plan_of(on_disk=True, lent_pages=5, context=6400), plan_of(context=6400)
    assert there.blocks_nbytes == here.blocks_nbytes == here.pool_nbytes
    assert there.pool_nbytes == 3 * there.exact_nbytes(there.groups[0])
    assert there.memory_nbytes == there.pool_nbytes + GROUPS_AT_ONCE * 5 * there.block_nbytes(there.groups[0])


@pytest.mark.parametrize("tokens", [0, -1, 321])
def test_a_sequence_that_fits_no_empty_cache_is_refused(tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"sequence of {tokens} tokens, planned for 1 to 320"):
        pool_of(plan_of()).reserve(tokens)


def test_layers_are_grouped_by_their_window_and_by_what_they_keep() -> None:
    groups = layer_groups((8, 0, 8, 100), SHAPE)
    assert {group.window: group.layers for group in groups} == {0: (1,), 8: (0, 2), 100: (3,)}
    found = layer_groups((0, 0, 0, 0), MIXED)
    assert [(group.layers, group.shape) for group in found] == [((2,), LATENT), ((0,), UNEQUAL), ((3,), SHAPE)]
