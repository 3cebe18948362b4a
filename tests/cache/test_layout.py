"""Blocks of the KV cache: what is written is what attention reads, wherever the blocks lie."""

from dataclasses import replace
from typing import Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.attention_cases import TOLERANCE, attend, relative_error, truth
from tests.kernels.native_linear import require
from tests.quick import examples
from tiered.cache import KVShape, PageLayout
from tiered.errors import ConfigError
from tiered.kernels import AttentionCall, BlockTable, CacheFormat, Level, Pages, contiguous_pages
from tiered.kernels.attention import PAGE_TOKENS
from tiered.store import PAGE

NAMES: Final = ("torch", *(level.name.lower() for level in Level))
BITS: Final = pytest.mark.parametrize("bits", [16, 8, 4])
UNTOUCHED: Final = 171
States = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Every implementation of attention that this machine can run."""
    named: str = request.param
    if named != "torch":
        require(Level[named.upper()])
    return named


def shape_of(heads: int = 2, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> KVShape:
    return KVShape(heads, head_dim, head_dim, str(dtype).removeprefix("torch."))


def dtype_of(shape: KVShape) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, shape.dtype)
    return dtype


def memory_of(layout: PageLayout, blocks: int) -> torch.Tensor:
    """Blocks full of what no test writes, at an address that is no multiple of their size."""
    return torch.full((PAGE + blocks * layout.block_nbytes,), UNTOUCHED, dtype=torch.uint8)[PAGE:]


def random_pages(layout: PageLayout, pages: int, seed: int = 0) -> States:
    """Keys and values [pages, heads, 64, head_dim]; keys with channels far from 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = layout.shape
    size = (pages, shape.heads, PAGE_TOKENS, shape.head_dim)
    shift = torch.randn(shape.heads, 1, shape.head_dim, generator=generator) * 2
    keys, values = torch.randn(size, generator=generator) + shift, torch.randn(size, generator=generator)
    return keys.to(dtype_of(shape)), values.to(dtype_of(shape))


def scattered(layout: PageLayout, count: int, blocks: int, seed: int = 0) -> torch.Tensor:
    """Offsets of `count` of `blocks` blocks, in any order."""
    return torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))[:count] * layout.block_nbytes


def widened(pages: Pages, shape: KVShape, sequence: int = 0) -> torch.Tensor:
    """[pages, heads, 64, head_dim] float64."""
    size = (shape.heads, PAGE_TOKENS, shape.head_dim)
    count = pages.table.offsets.shape[1]
    return torch.stack([pages.widen(sequence, page, size, False, torch.float64) for page in range(count)])


def as_sequence(pages: torch.Tensor) -> torch.Tensor:
    """[1, heads, pages * 64, head_dim] of [pages, heads, 64, head_dim]."""
    return pages.transpose(0, 1).flatten(1, 2)[None]


def call_of(keys: Pages, values: Pages, shape: KVShape, tokens: int, queries: int, **more: Any) -> AttentionCall:
    """Two queries' heads per key head, at the end of sequences of `tokens` tokens."""
    sequences = keys.table.offsets.shape[0]
    generator = torch.Generator().manual_seed(9)
    fields: dict[str, Any] = {
        "query": torch.randn(sequences, queries, 2 * shape.heads, shape.head_dim, generator=generator).to(
            dtype_of(shape)
        ),
        "kv_heads": shape.heads,
        "keys": keys,
        "values": values,
        "first": torch.zeros(sequences, dtype=torch.int64),
        "count": torch.full((sequences,), tokens),
        "scaling": shape.head_dim**-0.5,
    }
    return AttentionCall(**(fields | more))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_16_bits_pages_come_back_as_they_were(dtype: torch.dtype) -> None:
    layout = PageLayout(shape_of(dtype=dtype), 16)
    memory, offsets = memory_of(layout, 7), scattered(layout, 5, 7)
    keys, values = random_pages(layout, 5)
    layout.store(memory, offsets, keys, values)
    found_keys, found_values = layout.pages(BlockTable(memory, offsets[None]))
    assert torch.equal(widened(found_keys, layout.shape), keys.double())
    assert torch.equal(widened(found_values, layout.shape), values.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_written_one_by_one_are_read_as_if_they_lay_together(name: str, dtype: torch.dtype) -> None:
    layout = PageLayout(shape_of(heads=3, head_dim=72, dtype=dtype), 16)
    memory, offsets, tokens = memory_of(layout, 9), scattered(layout, 3, 9), 150
    pages = random_pages(layout, 3)
    for target, states in zip(layout.dense(memory), pages, strict=True):
        position = torch.arange(tokens)
        blocks = offsets[position // PAGE_TOKENS] // layout.block_nbytes
        target[blocks, :, position % PAGE_TOKENS] = as_sequence(states)[0, :, :tokens].transpose(0, 1)
    found = call_of(*layout.pages(BlockTable(memory, offsets[None])), layout.shape, tokens, 40)
    keys, values = (contiguous_pages(as_sequence(states)) for states in pages)
    assert torch.equal(attend(name, found), attend(name, replace(found, keys=keys, values=values)))


@BITS
@examples(40)
@given(
    heads=st.integers(1, 5),
    head_dim=st.sampled_from([2, 8, 16, 64, 72, 80, 96, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_a_block_is_whole_disk_pages_and_touches_no_other(
    bits: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int
) -> None:
    layout = PageLayout(shape_of(heads, head_dim, dtype), bits)
    assert layout.block_nbytes % PAGE == 0
    memory, offsets = memory_of(layout, 5), scattered(layout, 3, 5, seed)
    layout.store(memory, offsets, *random_pages(layout, 3, seed))
    kept = torch.ones(5, dtype=torch.bool)
    kept[offsets // layout.block_nbytes] = False
    blocks = memory.view(5, -1)
    assert bool((blocks[kept] == UNTOUCHED).all())
    written = (blocks[~kept] != UNTOUCHED).sum(1)
    payload = 2 * heads * PAGE_TOKENS * head_dim * bits // (8 if dtype is torch.bfloat16 or bits < 16 else 4)
    assert bool((written > payload * 0.9).all())


@BITS
def test_parts_of_a_block_start_at_multiples_of_64_bytes(bits: int) -> None:
    layout = PageLayout(shape_of(heads=1, head_dim=24), bits)
    memory = memory_of(layout, 1)
    for pages in layout.pages(BlockTable(memory, torch.zeros(1, 1, dtype=torch.int64))):
        for plane in (pages.codes, pages.scale, pages.zero):
            assert plane is None or plane.start % 64 == 0


def test_fewer_bits_take_less_memory() -> None:
    shape = shape_of(heads=40, head_dim=128)
    sizes = [PageLayout(shape, bits).block_nbytes for bits in (16, 8, 4)]
    assert sizes[0] == 2 * 40 * 64 * 128 * 2
    assert sizes[1] < 0.53 * sizes[0] and sizes[2] < 0.28 * sizes[0]


@BITS
def test_the_same_offsets_serve_every_layer(bits: int) -> None:
    layout = PageLayout(shape_of(), bits)
    offsets = scattered(layout, 2, 4)
    expected, memory = [], memory_of(layout, 8)
    layers = memory.view(2, -1)
    for layer in (0, 1):
        layout.store(layers[layer], offsets, *random_pages(layout, 2, layer))
        expected.append(random_pages(layout, 2, layer))
    for layer in (0, 1):
        found = layout.pages(BlockTable(layers[layer], offsets[None]))
        for pages, states in zip(found, expected[layer], strict=True):
            error = (widened(pages, layout.shape) - states.double()).norm() / states.double().norm()
            assert error < {16: 1e-9, 8: 0.01, 4: 0.12}[bits]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_page_is_stored_as_the_same_bytes_whatever_is_stored_with_it(bits: int) -> None:
    # So large that several pages do not go through at once.
    layout = PageLayout(shape_of(heads=40, head_dim=128), bits)
    keys, values = random_pages(layout, 3)
    together, one_by_one = memory_of(layout, 3), memory_of(layout, 3)
    offsets = torch.tensor([2, 0, 1]) * layout.block_nbytes
    layout.store(together, offsets, keys, values)
    for page in (1, 2, 0):
        layout.store(one_by_one, offsets[page : page + 1], keys[page : page + 1], values[page : page + 1])
    assert torch.equal(together, one_by_one)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 8), (2, 64), (3, 80), (2, 128)])
def test_attention_over_stored_pages_is_within_rounding_of_what_their_codes_stand_for(
    name: str, bits: int, heads: int, head_dim: int
) -> None:
    layout = PageLayout(shape_of(heads, head_dim), bits)
    memory, offsets = memory_of(layout, 9), scattered(layout, 8, 9)
    layout.store(memory, offsets, *random_pages(layout, 8))
    call = call_of(*layout.pages(BlockTable(memory, offsets.view(2, 4))), layout.shape, 4 * PAGE_TOKENS, 3)
    assert relative_error(attend(name, call), truth(call)) < TOLERANCE


def recent_pages(states: States, first: int) -> tuple[Pages, Pages]:
    """Pages `first` and on of a sequence as they were computed; the earlier ones are missing."""
    found = []
    for part in states:
        pages = contiguous_pages(as_sequence(part))
        pages.table.offsets[:, :first] = -1
        found.append(pages)
    return found[0], found[1]


@BITS
def test_queries_read_their_own_page_as_computed_and_earlier_ones_as_stored(name: str, bits: int) -> None:
    layout, pages, begin = PageLayout(shape_of(), bits), 4, 100
    memory, offsets = memory_of(layout, 9), scattered(layout, pages, 9)
    states = random_pages(layout, pages)
    # The last page is not complete: there is no block of it, and what lies at its place must not be read.
    layout.store(memory, offsets[:-1], *(part[:-1] for part in states))
    offsets[-1] = -1
    tokens, table = 250, BlockTable(memory, offsets[None])
    call = call_of(*layout.pages(table, recent_pages(states, 1)), layout.shape, tokens, tokens - begin)
    found = attend(name, call)
    stored = [widened(part, layout.shape)[: pages - 1] for part in pages_without_gap(layout, memory, offsets)]
    for own in range(1, pages):
        low, high = max(begin, own * PAGE_TOKENS), min(tokens, (own + 1) * PAGE_TOKENS)
        seen = [
            contiguous_pages(as_sequence(torch.cat([old[:own], new[own:].double()])))
            for old, new in zip(stored, states, strict=True)
        ]
        rows = slice(low - begin, high - begin)
        expected = truth(
            replace(call, query=call.query[:, rows], keys=seen[0], values=seen[1], count=torch.tensor([high]))
        )
        assert relative_error(found[:, rows], expected) < TOLERANCE


def pages_without_gap(layout: PageLayout, memory: torch.Tensor, offsets: torch.Tensor) -> tuple[Pages, Pages]:
    return layout.pages(BlockTable(memory, offsets[None, offsets >= 0]))


@pytest.mark.parametrize("bits", [0, 2, 5, 32])
def test_other_numbers_of_bits_are_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match=f"KV cache: {bits} bits, expected 16, 8 or 4"):
        PageLayout(shape_of(), bits)


def test_heads_of_an_odd_number_of_channels_are_refused_in_4_bits() -> None:
    assert PageLayout(shape_of(head_dim=9), 8).values_format is CacheFormat.INT8
    with pytest.raises(ConfigError, match="heads of 9 channels cannot be packed in 4 bits; use 8 or 16"):
        PageLayout(shape_of(head_dim=9), 4)


@BITS
def test_states_of_another_shape_are_refused(bits: int) -> None:
    layout = PageLayout(shape_of(), bits)
    keys, values = random_pages(layout, 2)
    with pytest.raises(ConfigError, match=r"pages \[2, 2, 64, 63\], expected \[2, 2, 64, 64\]"):
        layout.store(memory_of(layout, 2), torch.tensor([0, layout.block_nbytes]), keys, values[..., 1:])
