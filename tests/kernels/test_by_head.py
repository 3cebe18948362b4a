"""Products with a matrix for each head: exact, and the same bits whatever else is computed with them."""

import pytest
import torch

from tiered.kernels import Kernels, load_library
from tiered.kernels.by_head import by_head_reference

HEADS, ROWS, IN = 5, 24, 40


def matrices() -> torch.Tensor:
    """[heads, rows, in], between rows that are not theirs."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(HEADS, ROWS + 7, IN, generator=generator)[:, 3 : 3 + ROWS]


def states(tokens: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[tokens, heads, width] with the strides of queries."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(HEADS, tokens, width + 8, generator=generator).to(dtype).transpose(0, 1)[..., 8:]


@pytest.mark.parametrize("transposed", [True, False])
def test_each_head_is_multiplied_with_its_own_matrix(transposed: bool) -> None:
    x, w = states(35, ROWS if transposed else IN), matrices()
    expected = torch.einsum("thr,hri->thi" if transposed else "thi,hri->thr", x.double(), w.double())
    with Kernels(2) as kernels, Kernels(1, name="torch") as plain:
        found = kernels.by_head(x, w, transposed), plain.by_head(x, w, transposed)
        exact = plain.by_head(x.float(), w, transposed)
    for each in found:
        # One rounding to bf16.
        torch.testing.assert_close(each.double(), expected, rtol=2**-8, atol=1e-4)
    torch.testing.assert_close(exact.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [True, False])
def test_a_token_has_the_same_bits_alone_and_among_others(transposed: bool) -> None:
    if isinstance(load_library(), str):
        pytest.skip(str(load_library()))
    x, w = states(35, ROWS if transposed else IN), matrices()
    with Kernels(2) as kernels, Kernels(1) as one:
        together = kernels.by_head(x, w, transposed)
        for token in (0, 17, 34):
            assert torch.equal(one.by_head(x[token : token + 1], w, transposed)[0], together[token])
        assert torch.equal(kernels.by_head(x[20:, :2], w[:2], transposed), together[20:, :2])


def test_products_of_fixed_shape_do_not_depend_on_how_many_tokens_there_are() -> None:
    x, w = states(70, ROWS, torch.float32), matrices()
    together = by_head_reference(x, w, True, fixed=True)
    torch.testing.assert_close(together, by_head_reference(x, w, True))
    assert torch.equal(by_head_reference(x[:3], w, True, fixed=True), together[:3])
