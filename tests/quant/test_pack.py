"""Packing: the inverse pair, and the nibble order that kernels rely on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiered.errors import ConfigError
from tiered.quant import pack_int4, unpack_int4


@given(
    rows=st.integers(0, 5),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 2**32),
)
def test_unpack_inverts_pack_and_pack_inverts_unpack(rows: int, groups: int, group_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, groups * group_size), dtype=torch.uint8, generator=generator)
    packed = pack_int4(codes, group_size)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, groups * group_size // 2)
    assert torch.equal(unpack_int4(packed, group_size), codes)
    any_bytes = torch.randint(0, 256, packed.shape, dtype=torch.uint8, generator=generator)
    assert torch.equal(pack_int4(unpack_int4(any_bytes, group_size), group_size), any_bytes)


def test_low_nibbles_hold_the_first_half_of_each_group() -> None:
    group = [1] + [2] * 15 + [3] + [4] * 15  # values 0..15 and 16..31
    codes = torch.tensor([group + [5] * 16 + [6] * 16], dtype=torch.uint8)
    assert pack_int4(codes, 32).tolist() == [[0x31] + [0x42] * 15 + [0x65] * 16]


def test_whole_groups_unpack_on_their_own() -> None:
    codes = torch.arange(2 * 256).remainder(16).to(torch.uint8).view(2, 256)
    packed = pack_int4(codes, 64)
    assert torch.equal(unpack_int4(packed[1:, 32:96], 64), codes[1:, 64:192])


def test_what_is_not_whole_groups_of_u8_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 64"):
        pack_int4(torch.zeros(2, 96, dtype=torch.uint8), 64)
    with pytest.raises(ConfigError, match=r"torch\.int32"):
        pack_int4(torch.zeros(2, 64, dtype=torch.int32), 64)
    with pytest.raises(ConfigError, match="packed codes"):
        unpack_int4(torch.zeros(2, 48, dtype=torch.uint8), 64)
