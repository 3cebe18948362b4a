"""Lending weights to the skeleton's modules: linear layers borrow theirs, small tensors are swapped in by name.

In: the skeleton and the views of a loaded block. Out: a module that computes with them until the context ends. A token
goes through every layer in milliseconds, so the place of each name is looked up only once for each module.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from tiered.arch import Skeleton, is_expert_stack, is_plain_linear
from tiered.io import DiskReader
from tiered.kernels import Kernels
from tiered.model.experts import OffloadedExperts
from tiered.quant import QuantizedWeight
from tiered.store import PAGE, Store

AnyWeight = torch.Tensor | QuantizedWeight


class OffloadedLinear(nn.Module):
    """Takes an nn.Linear's place: the same function, of a weight that is lent for as long as its block is."""

    def __init__(self, original: nn.Linear, kernels: Kernels) -> None:
        super().__init__()
        self.in_features, self.out_features = original.in_features, original.out_features
        # A head's bias may be resident (set_outer); a layer's is lent with its weight.
        self.bias = original.bias
        self.lent: dict[str, AnyWeight] = {}
        """By "weight" and "bias"; empty outside a loan. A dictionary, as setting a module's attributes is slow."""
        self._kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]."""
        lent = self.lent
        assert lent, "used outside its block"
        bias = lent.get("bias", self.bias)
        assert bias is None or isinstance(bias, torch.Tensor)
        return self._kernels.linear(x, lent["weight"], bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@dataclass(frozen=True, eq=False)
class _Place:
    """Where the weight of one name belongs."""

    target: nn.Module
    attribute: str
    own: torch.Tensor | None
    """The graph's own tensor of that name, whose dtype the weight gets; None where a borrowing module has none."""
    lent: dict[str, AnyWeight] | None
    """The target's dictionary of borrowed weights; None: it has none, and the weight takes the place of `own`."""

    @classmethod
    def find(cls, module: nn.Module, name: str) -> "_Place":
        path, _, attribute = name.rpartition(".")
        target = module.get_submodule(path)
        lent: dict[str, AnyWeight] | None = getattr(target, "lent", None)
        own: torch.Tensor | None = getattr(target, attribute) if lent is None else getattr(target, attribute, None)
        return cls(target, attribute, own, lent)

    def lend(self, name: str, weight: AnyWeight) -> None:
        """Give `weight` to the target until `take_back`."""
        if self.own is not None:
            assert isinstance(weight, torch.Tensor), f"{name}: only linear layers can be quantized"
            # The graph's own dtype: the compute dtype, except for tensors that a family keeps in float32.
            weight = weight.to(self.own.dtype) if weight.is_floating_point() else weight
        if self.lent is not None:
            self.lent[self.attribute] = weight
        else:
            assert isinstance(weight, torch.Tensor)
            self._put(weight)

    def take_back(self) -> None:
        if self.lent is not None:
            self.lent.pop(self.attribute, None)
        else:
            assert self.own is not None
            self._put(self.own)

    def _put(self, tensor: torch.Tensor) -> None:
        # Bypasses nn.Module's checks, as torch.func.functional_call does: a view is not an nn.Parameter.
        of = self.target._buffers if self.attribute in self.target._buffers else self.target._parameters
        of[self.attribute] = tensor  # type: ignore[assignment]


class BoundModel:
    """A skeleton whose layers and head compute with lent weights, and whose other parts hold their own."""

    def __init__(self, skeleton: Skeleton, dtype: torch.dtype, kernels: Kernels) -> None:
        self.skeleton, self.dtype = skeleton, dtype
        self._places: dict[nn.Module, dict[str, _Place]] = {}
        self.layers: list[nn.Module] = list(skeleton.layers)
        for layer in self.layers:
            _offload(layer, kernels)
        self.head = OffloadedLinear(_linear_at(skeleton.model, skeleton.head_name), kernels)
        skeleton.model.set_output_embeddings(self.head)
        # It matters in training only, and torch would demand that it is among the few rows that `embed` is given.
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
        """What the model's own embedding module returns for `index` [...], with `rows` [n, width] as its table."""
        module = self.skeleton.embedding
        embedded: torch.Tensor = functional_call(module, {"weight": rows}, (index,))
        return embedded

    @contextmanager
    def lend(self, module: nn.Module, weights: Mapping[str, AnyWeight]) -> Iterator[nn.Module]:
        """Lend `weights`, named as inside `module`, for the duration of the context."""
        known = self._places.setdefault(module, {})
        lent: list[_Place] = []
        try:
            for name, weight in weights.items():
                place = known.get(name)
                if place is None:
                    place = known[name] = _Place.find(module, name)
                lent.append(place)
                place.lend(name, weight)
            yield module
        finally:
            for place in lent:
                place.take_back()


async def load_outer(model: BoundModel, store: Store, reader: DiskReader) -> None:
    """Read the tensors that are neither in layers nor embedding nor head, and give them to `model` for good."""
    block = store.blocks.get("outer")
    if block is None:
        return
    layout = store.layout(block)
    # Not borrowed from the arena: only copies in the compute dtype are kept, and this memory is freed at once.
    memory = _aligned(max(unit.memory_nbytes for unit in layout.units))
    view = memoryview(memory.numpy())  # type: ignore[arg-type]  # numpy's stubs lack the buffer protocol here
    for unit in layout.units:
        await reader.read_unit(unit, view)
        for item in unit.compressed:
            item.decode(view)
        tensors = {name: weight.view(memory) for name, weight in unit.weights.items()}
        model.set_outer({name: tensor.clone() for name, tensor in tensors.items()})  # type: ignore[union-attr]


def _aligned(nbytes: int) -> torch.Tensor:
    """uint8 memory that starts on a page."""
    raw = torch.empty(nbytes + PAGE, dtype=torch.uint8)
    start = -raw.data_ptr() % PAGE
    return raw[start : start + nbytes]


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
