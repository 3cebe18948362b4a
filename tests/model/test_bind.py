"""A layer computes with what it has borrowed, and holds nothing of it afterwards."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

from tests.model.loans import GivenLoan
from tests.tiny_configs import tiny_config
from tiered.arch import build_skeleton
from tiered.kernels import Kernels
from tiered.model.bind import BoundModel, OffloadedLinear

Lender = Callable[[float], AbstractContextManager[torch.nn.Module]]


@pytest.fixture
def lend() -> Lender:
    """Lends layer 0 of a small model weights that are `value` everywhere, in another precision than the graph's."""
    skeleton = build_skeleton(tiny_config("opt"), torch.float32)
    (block,) = [block for block in skeleton.blocks() if block.name == "layer-000"]
    shapes = {parameter.name.removeprefix(block.prefix): parameter.shape for parameter in block.parameters}
    model = BoundModel(skeleton, torch.float32, Kernels(1, name="torch"))

    def lend_all(value: float) -> AbstractContextManager[torch.nn.Module]:
        weights = {name: torch.full(shape, value, dtype=torch.float16) for name, shape in shapes.items()}
        return model.lend(model.layers[0], GivenLoan(weights))

    return lend_all


def test_a_second_loan_replaces_the_first(lend: Lender) -> None:
    for value in (1.0, 2.0):
        with lend(value) as layer:
            norm, linear = layer.get_submodule("final_layer_norm"), layer.get_submodule("fc1")
            assert isinstance(norm, torch.nn.LayerNorm)
            assert isinstance(linear, OffloadedLinear)
            assert norm.weight.dtype == torch.float32
            assert float(norm.weight.detach().mean()) == value
            row = torch.ones(1, linear.in_features)
            # As many products with `value` as there are inputs, and a bias of `value`.
            assert float(linear(row)[0, 0]) == value * (linear.in_features + 1)


def test_all_is_given_back_even_after_an_error(lend: Lender) -> None:
    with pytest.raises(RuntimeError, match="in the middle"), lend(1.0) as layer:
        raise RuntimeError("in the middle")
    assert all(tensor.is_meta for tensor in layer.parameters())
    linear = layer.get_submodule("fc1")
    with pytest.raises(AssertionError, match="used outside its block"):
        linear(torch.ones(1, 64))
