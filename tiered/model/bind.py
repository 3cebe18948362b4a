"""Weights into the skeleton: linear layers that borrow theirs for one call, small tensors swapped in by name.

In: the skeleton and the views of a loaded block. Out: a module that computes with them until the call returns.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from tiered.arch import Skeleton, is_expert_stack, is_plain_linear
from tiered.kernels import Kernels
from tiered.model.experts import OffloadedExperts
from tiered.quant import QuantizedWeight

AnyWeight = torch.Tensor | QuantizedWeight


class OffloadedLinear(nn.Module):
    """Takes an nn.Linear's place: the same function of a weight that is lent to it per block."""

    def __init__(self, original: nn.Linear, kernels: Kernels) -> None:
        super().__init__()
        self.in_features, self.out_features = original.in_features, original.out_features
        # A head's bias may be resident (set_outer); a layer's is lent with its weight.
        self.bias = original.bias
        self.lent: AnyWeight | None = None
        self.lent_bias: torch.Tensor | None = None
        self._kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]."""
        assert self.lent is not None, "used outside its block"
        return self._kernels.linear(x, self.lent, self.bias if self.lent_bias is None else self.lent_bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class BoundModel:
    """A skeleton whose layers and head compute with lent weights, and whose other parts hold their own."""

    def __init__(self, skeleton: Skeleton, dtype: torch.dtype, kernels: Kernels) -> None:
        self.skeleton, self.dtype = skeleton, dtype
        self.layers: list[nn.Module] = list(skeleton.layers)
        for layer in self.layers:
            _offload(layer, kernels)
        self.head = OffloadedLinear(_linear_at(skeleton.model, skeleton.head_name), kernels)
        skeleton.model.set_output_embeddings(self.head)
        # It only matters to training, and it would have to be a row of the few that `embed` looks up in.
        skeleton.embedding.padding_idx = None

    def set_outer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the parts outside layers, embedding and head their tensors, by full name, for good."""
        for name, tensor in tensors.items():
            path, _, attribute = name.rpartition(".")
            module = self.skeleton.model.get_submodule(path)
            value = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            if attribute in module._buffers:
                module._buffers[attribute] = value
            else:
                module.register_parameter(attribute, nn.Parameter(value, requires_grad=False))

    def embed(self, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """What the model's own embedding module makes of table `rows` [n, width] at `index` [...]."""
        module = self.skeleton.embedding
        embedded: torch.Tensor = functional_call(module, {"weight": rows}, (index,))
        return embedded

    @contextmanager
    def lend(self, module: nn.Module, weights: Mapping[str, AnyWeight]) -> Iterator["Lent"]:
        """Lend `weights`, named as inside `module`, for the duration of the context."""
        linears: list[OffloadedLinear] = []
        stacks: list[OffloadedExperts] = []
        small: dict[str, torch.Tensor] = {}
        for name, weight in weights.items():
            path, _, attribute = name.rpartition(".")
            target = module.get_submodule(path)
            if isinstance(target, OffloadedLinear) and attribute == "weight":
                target.lent = weight
                linears.append(target)
                continue
            if isinstance(target, OffloadedExperts):
                target.lent[attribute] = weight
                stacks.append(target)
                continue
            assert isinstance(weight, torch.Tensor), f"{name}: only linear layers can be quantized"
            # The graph's own dtype: the compute dtype, but for what a family insists on having in float32.
            tensor = weight.to(getattr(target, attribute).dtype) if weight.is_floating_point() else weight
            if isinstance(target, OffloadedLinear):
                target.lent_bias = tensor
            else:
                small[name] = tensor
        try:
            yield Lent(module, small)
        finally:
            for target in linears:
                target.lent = target.lent_bias = None
            for stack in stacks:
                stack.lent.clear()


class Lent:
    """A module with lent weights; call it as often as there are micro-batches."""

    def __init__(self, module: nn.Module, small: Mapping[str, torch.Tensor]) -> None:
        self._module, self._small = module, dict(small)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._module, self._small, args, kwargs)


def _offload(module: nn.Module, kernels: Kernels) -> None:
    for name, child in module.named_children():
        if is_plain_linear(child):
            assert isinstance(child, nn.Linear)
            setattr(module, name, OffloadedLinear(child, kernels))
        elif is_expert_stack(child):
            setattr(module, name, OffloadedExperts(child, kernels))
        else:
            _offload(child, kernels)


def _linear_at(model: nn.Module, weight_name: str) -> nn.Linear:
    module = model.get_submodule(weight_name.removesuffix(".weight"))
    assert isinstance(module, nn.Linear)
    return module
