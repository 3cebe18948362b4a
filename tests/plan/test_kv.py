"""The KV cache in numbers: a block's bytes are those its parts fill."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered.cache import PageLayout
from tiered.errors import ConfigError
from tiered.plan.kv import KVShape, block_nbytes
from tiered.units import PAGE


@given(
    heads=st.integers(1, 70),
    head_dim=st.integers(1, 80).map(lambda half: 2 * half),
    value_dim=st.integers(0, 80).map(lambda half: 2 * half),
    bits=st.sampled_from([16, 8, 4]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    slots=st.sampled_from([8, 24, 64]),
)
def test_a_block_is_as_long_as_its_parts(
    heads: int, head_dim: int, value_dim: int, bits: int, dtype: str, slots: int
) -> None:
    shape = KVShape(heads, head_dim, value_dim, dtype)
    layout = PageLayout(shape, bits, slots)
    stop = layout._values.stop
    assert block_nbytes(shape, bits, slots) == layout.block_nbytes == -(-stop // PAGE) * PAGE


@pytest.mark.parametrize(
    ("head_dim", "bits", "message"), [(64, 5, "5 bits, expected 16, 8 or 4"), (63, 4, "cannot be packed in 4 bits")]
)
def test_blocks_that_cannot_be_are_explained(head_dim: int, bits: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        block_nbytes(KVShape(2, head_dim, 64, "bfloat16"), bits)
