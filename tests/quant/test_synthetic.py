"""Synthetic weights: determinism, statistics, and streams that belong together."""

import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tiered.errors import ConfigError
from tiered.quant import GroupScheme, Scheme, SyntheticPool, dequantize
from tiered.units import MIB

INT4 = GroupScheme(4)


@pytest.fixture(scope="module")
def pool() -> SyntheticPool:
    return SyntheticPool(INT4, seed=3, nbytes=MIB)


def weight_of(pool: SyntheticPool, out_features: int, in_features: int, key: str, std: float) -> Tensor:
    """The dequantized weight of three streams."""
    scheme = pool.scheme
    shape = out_features, in_features
    pieces = (
        pool.q_pieces(range(out_features), in_features, key),
        pool.scale_pieces(range(out_features), in_features, key, std),
        pool.zero_pieces(range(out_features), in_features, key),
    )
    q, scale, zero = (torch.from_numpy(np.frombuffer(b"".join(stream), np.uint8).copy()) for stream in pieces)
    return dequantize(
        q.view(scheme.q_shape(*shape)),
        scale.view(scheme.scale_dtype).view(scheme.scale_shape(*shape)),
        zero.view(scheme.zero_shape(*shape)),
        scheme,
    )


@pytest.mark.parametrize("name", ["int4-g64", "int8-g64", "mxfp4-g32", "nf4-g64", "iq4nl-g32"])
def test_weights_have_the_mean_and_the_deviation_asked_for(name: str) -> None:
    pool = SyntheticPool(Scheme.parse(name), nbytes=MIB)
    # Scales that are exponents can follow powers of two only.
    std = 2.0**-6 if name == "mxfp4-g32" else 0.02
    weight = weight_of(pool, 1000, 3072, "fc1", std)
    assert abs(float(weight.mean())) < 1e-4
    assert float(weight.std()) == pytest.approx(std, rel=0.02)
    # Scales that belonged to other groups would betray themselves by clipped or hollow ranges.
    assert float(weight.abs().max()) < 0.02 * 7


def test_streams_stay_together_across_runs(pool: SyntheticPool) -> None:
    """Each group of a long weight is one of the pool's own groups, scale and zero included."""
    weight = weight_of(pool, 512, 12288, "long", std=1.0).view(-1, 64)
    short = torch.cat([weight_of(pool, 1, 64, f"short {i}", std=1.0) for i in range(20)])
    ranges = weight.amax(1) - weight.amin(1)
    assert float(ranges.min()) > 2.5 and float(ranges.max()) < 9  # 64 normal values span 3 to 8 deviations
    assert float((short.amax(1) - short.amin(1)).min()) > 2.5


def test_chunks_add_up_and_are_bounded(pool: SyntheticPool) -> None:
    out_features, in_features = 512, 12288
    streams = (
        pool.q_pieces(range(out_features), in_features, "w"),
        pool.scale_pieces(range(out_features), in_features, "w", 0.02),
        pool.zero_pieces(range(out_features), in_features, "w"),
    )
    sizes = [[len(piece) for piece in stream] for stream in streams]
    assert sum(map(sum, sizes)) == INT4.nbytes(out_features, in_features)
    assert len(sizes[0]) > 1
    assert max(map(max, sizes)) <= 8 * MIB


def test_the_same_seed_and_key_give_the_same_bytes(pool: SyntheticPool) -> None:
    again, other = SyntheticPool(INT4, seed=3, nbytes=MIB), SyntheticPool(INT4, seed=4, nbytes=MIB)
    first = weight_of(pool, 64, 1024, "layers.0.fc1", 0.02)
    assert torch.equal(weight_of(again, 64, 1024, "layers.0.fc1", 0.02), first)
    assert not torch.equal(weight_of(pool, 64, 1024, "layers.1.fc1", 0.02), first)
    assert not torch.equal(weight_of(other, 64, 1024, "layers.0.fc1", 0.02), first)
    normal = b"".join(pool.normal_pieces(1000, torch.bfloat16, 0.02, "bias"))
    assert b"".join(again.normal_pieces(1000, torch.bfloat16, 0.02, "bias")) == normal
    assert b"".join(again.normal_pieces(1000, torch.bfloat16, 0.02, "other")) != normal


def test_pieces_cannot_be_written_to(pool: SyntheticPool) -> None:
    for piece in (next(pool.q_pieces(range(1), 64, "w")), next(pool.normal_pieces(4, torch.float32, 1.0, "b"))):
        with pytest.raises(TypeError, match="read-only"):
            piece[0] = 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("numel", [1, 50_000, 1_000_000])
def test_normal_values_have_the_mean_and_the_deviation_asked_for(
    pool: SyntheticPool, numel: int, dtype: torch.dtype
) -> None:
    data = b"".join(pool.normal_pieces(numel, dtype, 0.1, "norm", mean=1.0))
    values = torch.frombuffer(bytearray(data), dtype=dtype).float()
    assert values.numel() == numel
    assert float(values.mean()) == pytest.approx(1.0, abs=0.01 if numel > 1 else 0.6)
    if numel > 1:
        assert float(values.std()) == pytest.approx(0.1, rel=0.02)


def test_a_pool_of_one_group_serves_any_shape() -> None:
    pool = SyntheticPool(INT4, nbytes=INT4.group_q_nbytes)
    assert sum(map(len, pool.q_pieces(range(3), 128, "w"))) == 3 * 64
    assert sum(map(len, pool.normal_pieces(33, torch.float16, 1.0, "b"))) == 66


def test_bad_arguments_are_named(pool: SyntheticPool) -> None:
    with pytest.raises(ConfigError, match="pool of 31 bytes"):
        SyntheticPool(INT4, nbytes=31)
    for std in (0.0, -1.0, 1e9, float("nan")):
        with pytest.raises(ConfigError, match=re.escape("fc1: standard deviation")):
            next(pool.scale_pieces(range(1), 64, "fc1", std))
    with pytest.raises(ConfigError, match=r"bias: synthetic dtype torch\.int8"):
        next(pool.normal_pieces(1, torch.int8, 1.0, "bias"))


@cache
def small_pool(bits: int) -> SyntheticPool:
    return SyntheticPool(GroupScheme(bits), nbytes=1 << 14)


@given(
    rows=st.integers(1, 300),
    cuts=st.lists(st.integers(0, 300), max_size=4),
    bits=st.sampled_from([4, 8]),
)
def test_ranges_of_rows_have_the_values_of_the_whole(rows: int, cuts: list[int], bits: int) -> None:
    pool = small_pool(bits)
    edges = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    ranges = [range(start, stop) for start, stop in pairwise(edges)]

    def joined(make: Callable[[range], Iterator[memoryview]], parts: list[range]) -> bytes:
        return b"".join(piece for part in parts for piece in make(part))

    for make in (
        lambda part: pool.q_pieces(part, 128, "w"),
        lambda part: pool.scale_pieces(part, 128, "w", 0.1),
        lambda part: pool.zero_pieces(part, 128, "w"),
        lambda part: pool.normal_pieces(
            rows * 128, torch.bfloat16, 0.1, "w", part=range(part.start * 128, part.stop * 128)
        ),
    ):
        assert joined(make, ranges) == joined(make, [range(rows)])
