"""What a query reads is a function of positions alone: earlier complete pages as stored, its own page as computed.

Sequences go through a cache in random pieces, alone and side by side, in memory and over a file; `Passes` compares
what is read with what was put in.
"""

from dataclasses import replace
from typing import Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cache.passes import LONGEST, Passes
from tests.cache.plans import MIXED, SHAPE, plan_of, pool_of
from tests.quick import examples, represented
from tiered.cache import GatheredKV, KVShape, LentBlocks, PackedKV, PageLayout, Part
from tiered.errors import ConfigError
from tiered.kernels.attention import PAGE_TOKENS
from tiered.plan.passes import MicroBatchLimits

WINDOW: Final = 70
COUNTS: Final = st.sampled_from([1, 1, 1, 2, 30, 63, 64, 65, 130])
TEXTS: Final = st.lists(st.tuples(st.integers(0, 2), st.lists(COUNTS, min_size=1, max_size=6)), min_size=1, max_size=3)
"""Of each sequence: the pass it enters in, and the tokens it has in each pass from then on."""


def passes_of(
    bits: int,
    on_disk: bool,
    windows: tuple[int, ...] = (0, 0, WINDOW, WINDOW, WINDOW),
    outbox_rows: int = 0,
    **limits: Any,
) -> Passes:
    """A cache of layers of several shapes, the fifth of which has chunks, with room for three of the longest, and
    passes in micro-batches of at most 100 tokens."""
    found = MicroBatchLimits(**({"rows": 100} | limits))
    fields = {"context": LONGEST, "tokens_at_once": found.rows, "lent_pages": 12 if on_disk else 0}
    plan = plan_of(windows, (*MIXED, SHAPE)[: len(windows)], [4], bits=bits, on_disk=on_disk, **fields)
    return Passes(plan, replace(found, lent_pages=plan.lent_pages), outbox_rows)


BITS: Final = pytest.mark.parametrize("bits", [16, 8, 4])
ON_DISK: Final = pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])


@BITS
@ON_DISK
@examples(12)
@given(texts=TEXTS, rows=st.sampled_from([7, 64, 100, 512]))
def test_packed_micro_batches_read_what_was_put_in(
    bits: int, on_disk: bool, texts: list[tuple[int, list[int]]], rows: int
) -> None:
    passes_of(bits, on_disk, rows=rows).run_texts(texts)


@BITS
@ON_DISK
@examples(8)
@given(texts=TEXTS, rows=st.sampled_from([7, 100]), together=st.integers(1, 3))
def test_gathered_micro_batches_read_what_was_put_in(
    bits: int, on_disk: bool, texts: list[tuple[int, list[int]]], rows: int, together: int
) -> None:
    passes = passes_of(bits, on_disk, (0,), rows=rows, gathered=True, gathered_rows=together, within_pages=bits != 16)
    passes.run_texts(texts)


@BITS
@ON_DISK
@pytest.mark.parametrize(
    "counts", represented([[LONGEST], [64] * 10, [1] * 650, [50, *[1] * 300, 350]], [[50, *[1] * 300, 350]]), ids=len
)
def test_a_ring_goes_round_several_times(bits: int, on_disk: bool, counts: list[int]) -> None:
    passes = passes_of(bits, on_disk, (WINDOW,), rows=20)
    passes.run_texts([(0, counts)])
    (kv,) = passes.kvs.values()
    assert sum(counts) // PAGE_TOKENS > 2 * kv.pages[0]


@BITS
@ON_DISK
def test_after_a_failed_pass_a_sequence_can_begin_again_elsewhere(bits: int, on_disk: bool) -> None:
    passes = passes_of(bits, on_disk, (0,))
    passes.enter(0, LONGEST)
    passes.run_pass({0: 60})
    passes.run_pass({0: 70}, commit=False)
    passes.leave(0)
    passes.enter(1, LONGEST)
    passes.run_pass({1: 130})
    passes.run_pass({1: 1})


def test_a_sequence_that_takes_over_blocks_does_not_see_its_predecessor() -> None:
    passes = passes_of(8, False, (0,))
    passes.run_texts([(0, [200, 1]), (2, [130, 1, 1]), (3, [64, 1])])


def test_masks_of_a_packed_micro_batch_know_of_no_past_and_those_of_a_gathered_one_do() -> None:
    plan = plan_of(context=LONGEST)
    pool = pool_of(plan)
    kv = pool.reserve(LONGEST)
    assert kv is not None
    parts = [Part(kv, 100, 3)]
    blocks = LentBlocks(pool, parts)
    assert PackedKV(blocks, parts, [0]).get_seq_length() == 0
    assert GatheredKV(blocks, parts, [0]).get_seq_length() == 100


@BITS
@ON_DISK
@examples(12)
@given(texts=TEXTS, rows=st.sampled_from([7, 64, 100, 512]), room=st.sampled_from([1, 3]))
def test_what_a_device_computes_is_put_in_and_read_as_if_it_had_been_computed_beside_the_cache(
    bits: int, on_disk: bool, texts: list[tuple[int, list[int]]], rows: int, room: int
) -> None:
    # Half of `room` micro-batches find room on their way at once.
    passes = passes_of(bits, on_disk, rows=rows, outbox_rows=-(-rows * room // 2))
    passes.run_texts(texts)
    assert passes.device is not None
    assert passes.device.copied_out


@BITS
@examples(8)
@given(texts=TEXTS, rows=st.sampled_from([7, 100]), together=st.integers(1, 3))
def test_what_a_device_computes_with_dense_attention_is_put_in_and_read_too(
    bits: int, texts: list[tuple[int, list[int]]], rows: int, together: int
) -> None:
    limits = {"gathered": True, "gathered_rows": together, "within_pages": bits != 16}
    passes_of(bits, False, (0,), outbox_rows=rows, rows=rows, **limits).run_texts(texts)


def test_attention_that_does_not_come_back_for_the_pages_is_found_out() -> None:
    pool = pool_of(plan_of())
    kv = pool.reserve(10)
    assert kv is not None
    parts = [Part(kv, 0, 4)]
    packed = PackedKV(LentBlocks(pool, parts), parts, [0])
    states = torch.zeros(1, 2, 4, 16, dtype=torch.bfloat16)
    packed.update(states, states, 0)
    with pytest.raises(ConfigError, match=r"layer 0: .* does not ask for its keys by pages; list it in"):
        packed.check(0)
    packed.reads(0)
    packed.check(0)


def test_states_that_are_not_what_the_cache_was_planned_for_are_refused() -> None:
    pool = pool_of(plan_of((0,), [MIXED[2]]))
    kv = pool.reserve(10)
    assert kv is not None
    parts = [Part(kv, 0, 4)]
    expanded = torch.zeros(1, 2, 4, 16, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"layer 0: .* are \(2, 32, 0\), the cache was planned for \(1, 24, 0\)"):
        PackedKV(LentBlocks(pool, parts), parts, [0]).update(expanded, expanded, 0)


def test_scratch_memory_stays_within_what_is_planned() -> None:
    passes = passes_of(8, True, (0,), rows=512)
    passes.run_texts([(0, [63, 600])])
    # The memory that all micro-batches put pages together in.
    assert passes.pool.scratch(0).untyped_storage().nbytes() <= passes.plan.scratch_nbytes(512, 512)


class Watched(PageLayout):
    """A layout that notes how many pages it is given at a time."""

    def __init__(self, shape: KVShape, bits: int) -> None:
        super().__init__(shape, bits)
        self.given: list[int] = []

    def store(self, memory: torch.Tensor, offsets: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.given.append(len(offsets))
        super().store(memory, offsets, keys, values)


def test_pages_that_many_sequences_complete_together_take_no_more_than_is_planned() -> None:
    plan = plan_of((0,), bits=8, sequences=40, context=64)
    passes = Passes(plan, MicroBatchLimits(rows=40))
    passes.pool.layouts[0] = watched = Watched(SHAPE, 8)
    passes.run_texts([(0, [63, 1])] * 40)
    assert sum(watched.given) == 40
    assert max(watched.given) * plan.exact_nbytes(plan.groups[0]) <= plan.scratch_nbytes(40, 40)


@BITS
@ON_DISK
def test_sequences_shorter_than_a_page_take_no_more_than_they_fill(bits: int, on_disk: bool) -> None:
    heads, head_dim = 8, 64
    short = plan_of((0,), KVShape(heads, head_dim, head_dim, "bfloat16"), bits=bits, on_disk=on_disk, context=20)
    whole = replace(short, context=PAGE_TOKENS)
    assert short.pool_nbytes == 3 * 2 * heads * head_dim * 24 * 2 < whole.pool_nbytes
    passes = Passes(plan_of(bits=bits, on_disk=on_disk, context=20), MicroBatchLimits(rows=16))
    passes.run_texts([(0, [13, 1, 6]), (1, [1, 1, 1]), (1, [20])])
