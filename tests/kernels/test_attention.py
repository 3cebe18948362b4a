"""Attention over a paged cache: the numbers, of the reference and of every native level, beside float64."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels import guard_attention
from tests.kernels.attention_cases import (
    TOLERANCE,
    Shape,
    attend,
    dense,
    random_call,
    random_pages,
    relative_error,
    scatter,
    truth,
    without,
)
from tests.kernels.native_linear import require, seconds_until_ended
from tests.warm import call_warm
from tiered.errors import ConfigError
from tiered.kernels import (
    AttentionCall,
    CacheFormat,
    CancelFlag,
    Kernels,
    Level,
    Pages,
    attention_reference,
    contiguous_pages,
)
from tiered.quant import GroupScheme, dequantize

pytestmark = pytest.mark.inputs("tiered/kernels", "tiered/quant", "tests/kernels")

NAMES = ("torch", *(level.name.lower() for level in Level))
SHAPES = (
    Shape(1, 1, 4, 4, 1, 8),
    Shape(3, 1, 4, 2, 65, 64),
    Shape(2, 3, 3, 3, 130, 80),
    Shape(1, 70, 6, 2, 200, 128),
    Shape(2, 2, 9, 1, 64, 96),
    Shape(1, 35, 4, 4, 333, 72),
    Shape(1, 5, 2, 1, 300, 256),
    Shape(1, 7, 2, 2, 70, 512),
    Shape(1, 1, 71, 1, 100, 64),
)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Every implementation that this machine can run."""
    named: str = request.param
    if named != "torch":
        require(Level[named.upper()])
    return named


def random_mask(call: AttentionCall, share: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*call.query.shape[:2], int(call.count.max()), generator=generator) < share


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_is_within_rounding_of_the_truth(name: str, shape: Shape) -> None:
    call = random_call(shape)
    found = attend(name, call)
    assert found.dtype == torch.bfloat16 and found.shape == call.query.shape
    assert relative_error(found, truth(call)) < TOLERANCE


@pytest.mark.parametrize(("keys", "values"), dict.fromkeys((k, v) for k in CacheFormat for v in (CacheFormat(0), k)))
def test_every_format_counts_as_what_it_stands_for(name: str, keys: CacheFormat, values: CacheFormat) -> None:
    values = CacheFormat(values - 2) if values.per_channel else values
    for queries, head_dim in itertools.product((1, 9), (8, 72, 80, 96, 128)):
        call = random_call(Shape(2, queries, 4, 2, 150, head_dim), keys, values)
        assert relative_error(attend(name, call), truth(call)) < TOLERANCE


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_of_a_cache_are_laid_out_like_those_of_weights(bits: int) -> None:
    kind = CacheFormat.INT8 if bits == 8 else CacheFormat.INT4
    pages = random_pages(kind, 1, 1, 64, 128, torch.Generator().manual_seed(0))
    planes = [plane for plane in (pages.codes, pages.scale, pages.zero) if plane is not None]
    offset = int(pages.table.offsets[0, 0])
    q, scale, zero = (plane.of(pages.table.memory, offset, 1, 64)[0].contiguous() for plane in planes)
    assert torch.equal(dense(pages, 0, 64, 1, 128)[0].float(), dequantize(q, scale, zero, GroupScheme(bits, 64)))


RESTRICTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": 37},
    "window of one": {"window": 1},
    "cap": {"softcap": 2.0},
    "not causal": {"causal": False},
    "padding": {"first": torch.tensor([7, 64])},
    "ragged": {"first": torch.tensor([3, 0]), "count": torch.tensor([150, 66])},
    "fewer keys than queries": {"first": torch.tensor([0, 140]), "count": torch.tensor([5, 150])},
    "sinks": {"sinks": torch.tensor([0.5, 3.0, -20.0, 200.0])},
    "scale": {"scaling": 1.5},
}


@pytest.mark.parametrize("more", RESTRICTIONS.values(), ids=RESTRICTIONS)
def test_restrictions_hide_what_they_should(name: str, more: dict[str, Any]) -> None:
    call = random_call(Shape(2, 20, 4, 2, 150, 64), **more)
    assert relative_error(attend(name, call), truth(call)) < TOLERANCE


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("causal", [True, False])
def test_a_mask_hides_keys_one_by_one(name: str, causal: bool, share: float) -> None:
    call = random_call(Shape(2, 20, 4, 2, 150, 64), causal=causal)
    call = replace(call, mask=random_mask(call, share))
    expected = truth(call)
    assert float((attend(name, call).double() - expected).norm()) <= TOLERANCE * float(expected.norm())


@pytest.mark.parametrize("shape", list(itertools.product((1, 2), (1, 4), (1, 20))), ids=str)
def test_a_bias_is_added_wherever_it_is_shared(name: str, shape: tuple[int, int, int]) -> None:
    bias = torch.randn(*shape, 150, generator=torch.Generator().manual_seed(1)) * 3
    bias[..., 40:45] = torch.finfo(torch.bfloat16).min
    call = random_call(Shape(2, 20, 4, 2, 150, 64), bias=bias)
    assert relative_error(attend(name, call), truth(call)) < TOLERANCE


def test_the_least_number_as_bias_is_a_mask(name: str) -> None:
    call = random_call(Shape(2, 20, 4, 2, 150, 64))
    mask = random_mask(call, 0.3)
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.bfloat16).min)[:, None]
    assert torch.equal(attend(name, replace(call, bias=bias)), attend(name, replace(call, mask=mask)))


def test_scores_far_apart_neither_overflow_nor_vanish(name: str) -> None:
    # Ascending, so that every key is larger than all before it by more than a float32 exponent holds.
    call = random_call(Shape(1, 3, 2, 2, 200, 64), scaling=1.0)
    ascending = torch.arange(200.0)[None, None, :, None] * 100 * torch.ones(1, 2, 200, 64)
    call = replace(call, query=torch.full_like(call.query, 1 / 64), keys=contiguous_pages(ascending.bfloat16()))
    assert relative_error(attend(name, call), truth(call)) < TOLERANCE


def test_a_query_that_sees_nothing_gets_zeros(name: str) -> None:
    call = random_call(Shape(2, 20, 4, 2, 150, 64))
    mask = torch.ones(1, 20, 150, dtype=torch.bool)
    mask[0, 3] = False
    found = attend(name, replace(call, mask=mask))
    assert not found[:, 3].any() and found[:, 2].any() and found[:, 4].any()


@pytest.mark.parametrize("keys", list(CacheFormat))
def test_a_query_reads_its_own_page_as_computed_and_earlier_ones_as_stored(name: str, keys: CacheFormat) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = Shape(2, 90, 4, 2, 150, 64)
    values = CacheFormat(keys - 2) if keys.per_channel else keys
    call = random_call(shape, keys, values)
    recent = torch.randn(2, 3, 2, 64, 64, generator=generator).bfloat16()
    # The last page has not been stored yet; the first is not at hand as computed any more.
    computed = without(scatter(CacheFormat.BF16, [recent], generator), 0)
    stored = [replace(without(pages, 2), recent=computed) for pages in (call.keys, call.values)]
    found = attend(name, replace(call, keys=stored[0], values=stored[1]))
    for start, stop, own in ((0, 4, 0), (4, 68, 1), (68, 90, 2)):
        parts = []
        for pages in (call.keys, call.values):
            whole = [dense(pages, s, 192, 2, 64) for s in range(2)]
            for s in range(2):
                if own > 0:
                    whole[s][:, own * 64 : own * 64 + 64] = recent[s, own].double()
            parts.append(contiguous_pages(torch.stack(whole)))
        piece = replace(
            call, query=call.query[:, start:stop], count=call.count - (90 - stop), keys=parts[0], values=parts[1]
        )
        assert relative_error(found[:, start:stop], truth(piece)) < TOLERANCE


def test_the_reference_is_far_more_exact_in_float32() -> None:
    call = random_call(Shape(2, 20, 4, 2, 1500, 64), window=1200, softcap=3.0)
    found = attention_reference(replace(call, query=call.query.float()))
    assert found.dtype == torch.float32 and relative_error(found, truth(call)) < 1e-6


@pytest.mark.parametrize("level", [level for level in Level if level is not Level.AMX], ids=lambda level: level.name)
def test_no_byte_outside_the_buffers_is_touched(level: Level, tmp_path: Path) -> None:
    require(level)
    done = call_warm(tmp_path, guard_attention.main, level)
    assert done.code == 0, done.out + done.err


def test_a_call_ends_soon_after_the_flag_is_set(name: str) -> None:
    call = random_call(Shape(1, 500, 32, 32, 4000, 128))
    flag = CancelFlag()
    with Kernels(2, flag, name=name) as kernels:
        assert seconds_until_ended(lambda: kernels.attention(call), flag) < 0.9
        flag.clear()
        small = random_call(SHAPES[1])
        assert relative_error(kernels.attention(small), truth(small)) < TOLERANCE


def test_arguments_that_do_not_fit_are_named() -> None:
    call = random_call(Shape(2, 3, 4, 2, 70, 64))
    for wrong in (
        {"mask": torch.ones(2, 3, 69, dtype=torch.bool)},
        {"mask": torch.ones(3, 3, 70, dtype=torch.bool)},
        {"bias": torch.ones(2, 3, 3, 70)},
        {"first": torch.zeros(3, dtype=torch.int64)},
        {"sinks": torch.zeros(2)},
        {"kv_heads": 3},
        {"values": replace(call.values, format=CacheFormat.INT8_CHANNEL)},
    ):
        with pytest.raises(ConfigError, match="attention: "):
            replace(call, **wrong)


def test_tables_that_are_too_short_are_refused(name: str) -> None:
    if name == "torch":
        pytest.skip("the reference fails on its own when it looks a page up")
    call = random_call(Shape(1, 1, 2, 2, 70, 64))
    table = replace(call.keys.table, offsets=call.keys.table.offsets[:, :1])
    with pytest.raises(AssertionError, match="BAD_ARGUMENT"):
        attend(name, replace(call, keys=replace(call.keys, table=table)))


def test_a_page_that_is_in_no_block_is_refused(name: str) -> None:
    call = random_call(Shape(2, 1, 2, 2, 70, 64))
    with pytest.raises(AssertionError, match=r"BAD_ARGUMENT|page 0 is missing"):
        attend(name, replace(call, values=without(call.values, 0)))


def page_of(pages: Pages, sequence: int, page: int) -> torch.Tensor:
    """[heads, 64, head_dim] of one page of two heads, in place."""
    return pages.codes.of(pages.table.memory, int(pages.table.offsets[sequence, page]), 2, 64)


@pytest.mark.parametrize("place", [0, 99])
@pytest.mark.parametrize("q_len", [1, 7])
def test_what_is_no_number_stays_none_and_in_its_own_sequence(name: str, q_len: int, place: int) -> None:
    call = random_call(Shape(3, q_len, 4, 2, 100, 64))
    with Kernels(1, name=name) as kernels:
        clean = kernels.attention(call)
        for pages in (call.keys, call.values):
            page_of(pages, 1, place // 64)[:, place % 64] = torch.nan
            found = kernels.attention(replace(call, causal=False))[1]
            assert bool(found.isnan().all())
        found = kernels.attention(call)
    # The last query sees every key. Others' bits are what they were.
    assert bool(found[1, -1].isnan().all())
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_slots_that_are_not_filled_yet_may_hold_anything(name: str) -> None:
    call = random_call(Shape(2, 3, 4, 2, 100, 64))
    with Kernels(1, name=name) as kernels:
        clean = kernels.attention(call)
        for pages in (call.keys, call.values):
            for sequence in range(2):
                page_of(pages, sequence, 1)[:, 100 % 64 :] = torch.nan
        assert torch.equal(kernels.attention(call), clean)
