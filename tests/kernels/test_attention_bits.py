"""A query's result is, bit for bit, a function of itself and of the keys it sees: on every native level."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.attention_cases import Shape, attend, random_call, rows_of, scatter
from tests.kernels.native_linear import require
from tiered.kernels import CacheFormat, Kernels, Level, contiguous_pages

pytestmark = pytest.mark.inputs("tiered/kernels", "tiered/quant", "tests/kernels")

FORMATS = ((CacheFormat.BF16, CacheFormat.BF16), (CacheFormat.INT4_CHANNEL, CacheFormat.INT8))
SCALINGS = (0.125, 3.0)
"""The second makes the reference score move again and again."""


@pytest.fixture(params=[level for level in Level if level is not Level.AMX], ids=lambda level: level.name)
def name(request: pytest.FixtureRequest) -> str:
    level: Level = request.param
    require(level)
    return level.name.lower()


def random_states(sequences: int, heads: int, slots: int, head_dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequences, heads, slots, head_dim, generator=generator).bfloat16()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("keys", "values"), FORMATS)
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_parts_and_single_steps_give_the_bits_of_one_call(
    name: str, head_dim: int, group: int, keys: CacheFormat, values: CacheFormat, scaling: float
) -> None:
    shape = Shape(2, 75, 2 * group, 2, 140, head_dim)
    call = random_call(shape, keys, values, scaling=scaling)
    with Kernels(2, name=name) as kernels:
        whole = kernels.attention(call)
        for step in (1, 2, 7, 64):
            for start in range(0, 75, step):
                stop = min(75, start + step)
                assert torch.equal(kernels.attention(rows_of(call, start, stop)), whole[:, start:stop]), (step, start)


@pytest.mark.parametrize("kind", [CacheFormat.BF16, CacheFormat.INT8])
def test_many_heads_that_share_one_key_head_give_the_bits_of_fewer(name: str, kind: CacheFormat) -> None:
    # Latents, as wide as they come: what decodes is taken a few heads at a time, what is a prompt all at once.
    call = random_call(Shape(2, 5, 40, 1, 140, 576), kind, kind)
    call = replace(call, values=call.keys)
    with Kernels(2, name=name) as kernels:
        whole = kernels.attention(call)
        for query in range(5):
            assert torch.equal(kernels.attention(rows_of(call, query, query + 1)), whole[:, query : query + 1])
        assert torch.equal(kernels.attention(replace(call, query=call.query[:, :, 7:9])), whole[:, :, 7:9])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(name: str, threads: int) -> None:
    call = random_call(Shape(3, 40, 4, 2, 300, 80), CacheFormat.INT4, CacheFormat.INT8)
    assert torch.equal(attend(name, call, threads), attend(name, call, 3))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_neighbours_and_padding_change_nothing(name: str, scaling: float) -> None:
    keys, values = random_states(3, 2, 200, 64), random_states(3, 2, 200, 64, 1)
    call = replace(
        random_call(Shape(3, 30, 4, 2, 200, 64), scaling=scaling),
        keys=contiguous_pages(keys),
        values=contiguous_pages(values),
        first=torch.tensor([0, 37, 150]),
    )
    together = attend(name, call)
    for s, first in enumerate(call.first.tolist()):
        # Alone, and without the slots of padding: pages begin elsewhere.
        alone = replace(
            call,
            query=call.query[s : s + 1],
            keys=contiguous_pages(keys[s : s + 1, :, first:]),
            values=contiguous_pages(values[s : s + 1, :, first:]),
            first=torch.zeros(1, dtype=torch.int64),
            count=torch.tensor([200 - first]),
        )
        assert torch.equal(attend(name, alone)[0], together[s])


def test_page_addresses_change_nothing(name: str) -> None:
    states = random_states(2, 3, 192, 96)
    call = random_call(Shape(2, 20, 6, 3, 192, 96))
    lying = contiguous_pages(states)
    paged = states.unflatten(2, (3, 64)).transpose(1, 2)
    scattered = scatter(CacheFormat.BF16, [paged], torch.Generator().manual_seed(2))
    in_one_piece = attend(name, replace(call, keys=lying, values=lying))
    assert torch.equal(attend(name, replace(call, keys=scattered, values=scattered)), in_one_piece)


@pytest.mark.parametrize("window", [0, 50])
def test_a_mask_gives_the_bits_of_the_rule_it_spells_out(name: str, window: int) -> None:
    call = random_call(Shape(2, 30, 4, 2, 200, 64), first=torch.tensor([0, 70]), window=window)
    own, slot = torch.arange(170, 200)[:, None], torch.arange(200)
    seen = (slot <= own) & (slot > own - (window or 1000)) & (slot >= call.first[:, None, None])
    plain = replace(call, first=torch.zeros(2, dtype=torch.int64), causal=False, window=0)
    expected = attend(name, call)
    assert torch.equal(attend(name, replace(plain, mask=seen)), expected)
    assert torch.equal(attend(name, replace(plain, mask=seen.to(torch.uint8) * 255)), expected)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("past", [40, 60, 128])
def test_every_path_of_a_tree_has_the_bits_of_decoding_it_alone(name: str, past: int, scaling: float) -> None:
    parents = [-1, 0, 0, 1, 1, 2, 4, -1, 7, 6]
    nodes = len(parents)
    keys, values = random_states(1, 2, past + nodes, 64), random_states(1, 2, past + nodes, 64, 1)
    call = replace(
        random_call(Shape(1, nodes, 4, 2, past + nodes, 64), scaling=scaling),
        keys=contiguous_pages(keys),
        values=contiguous_pages(values),
    )
    paths = []
    for node in range(nodes):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        paths.append(path)
    mask = torch.zeros(1, nodes, past + nodes, dtype=torch.bool)
    mask[..., :past] = True
    for node, path in enumerate(paths):
        mask[0, node, [past + i for i in path]] = True
    tree = attend(name, replace(call, mask=mask))
    for node, path in enumerate(paths):
        slots = [*range(past), *(past + i for i in path)]
        step = replace(
            call,
            query=call.query[:, node : node + 1],
            keys=contiguous_pages(keys[:, :, slots]),
            values=contiguous_pages(values[:, :, slots]),
            count=torch.tensor([len(slots)]),
        )
        assert torch.equal(attend(name, step)[0, 0], tree[0, node]), node


def test_what_lies_in_hidden_pages_is_not_looked_at(name: str) -> None:
    keys, values = random_states(1, 2, 200, 64), random_states(1, 2, 200, 64, 1)
    call = random_call(Shape(1, 3, 4, 2, 200, 64), first=torch.tensor([130]))
    call = replace(call, keys=contiguous_pages(keys), values=contiguous_pages(values))
    expected = attend(name, call)
    keys[:, :, :130], values[:, :, :130] = torch.nan, torch.inf
    assert torch.equal(attend(name, call), expected)
