"""Lending weights to the skeleton's modules: linear layers and experts borrow theirs when they compute.

In: the skeleton, and the loan of a block. Out: a module that computes with it until the context ends. A token goes
through every layer in milliseconds, so what is in memory costs a module only look-ups in dictionaries.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from torch.func import functional_call

from tiered.arch import Skeleton, expert_stacks, linear_size
from tiered.cache import PagedKeys
from tiered.kernels import LayerKernels
from tiered.model.desk import Desk
from tiered.model.experts import InputScaledMixture, OffloadedExperts
from tiered.model.mixers import split_mixers
from tiered.store import ALIGNMENT
from tiered.stream import AnyWeight, Loan
from tiered.units import round_up

PROCESSOR: Final = torch.device("cpu")
"""Where the processor's tensors are, in torch's words."""


class OffloadedLinear(nn.Module):
    """Takes the place of a linear layer that `linear_size` knows: the same function, of a weight [out, in] that is
    borrowed while it is computed.

    `path` is the module's own, inside the block's module: "" where it is the block's.
    """

    def __init__(self, original: nn.Module, kernels: LayerKernels, desk: Desk, path: str) -> None:
        super().__init__()
        size, bias = linear_size(original), original.bias
        assert size is not None
        assert bias is None or isinstance(bias, nn.Parameter)
        self.out_features, self.in_features = size
        # May be resident for good (BoundModel.keep); else it is lent beside the weight.
        self.register_parameter("bias", bias)
        # In a tuple: it is no parameter of this module.
        self._own = (original.get_parameter("weight"),)
        self.latents: PagedKeys | None = None
        """Latents in pages whose product was asked for last."""
        self._kernels, self._desk = kernels, desk
        self._weight_name, self._bias_name = _joined(path, "weight"), _joined(path, "bias")

    @property
    def weight(self) -> torch.Tensor:
        """The graph's own tensor, which has no values: some modules look up the dtype that they compute in."""
        return self._own[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]; of latents in pages only what has that shape."""
        if isinstance(x, PagedKeys):
            # Attention does without their expansion, and takes them from here (latent.py).
            self.latents = x
            return x.new_zeros(1).expand(*x.shape[:-1], self.out_features)
        loan = self._desk.loan
        assert loan is not None, "used outside its block"
        own: torch.Tensor | None = self._parameters["bias"]
        bias, keys = own, loan.parts(self._weight_name)
        if own is not None and self._bias_name in loan.names:
            # The graph's own dtype, which is the compute dtype.
            bias = loan.borrow(self._bias_name).to(own.dtype)  # type: ignore[union-attr]
        y = self._by_rows(loan, x, keys, bias) if len(keys) > 1 else self._product(loan, x, keys[0], bias)
        if bias is not own:
            loan.release(self._bias_name)
        return y

    @contextmanager
    def borrowing(self) -> Iterator[Sequence[AnyWeight]]:
        """The weight for the duration of the context: its parts, whose rows in order are its own."""
        loan = self._desk.loan
        assert loan is not None, "used outside its block"
        keys = loan.parts(self._weight_name)
        yield [loan.borrow(key) for key in keys]
        for key in keys:
            loan.release(key)

    def _product(self, loan: Loan, x: torch.Tensor, key: str, bias: torch.Tensor | None) -> torch.Tensor:
        y = self._kernels.linear(x, loan.borrow(key), bias)
        loan.release(key)
        return y

    def _by_rows(self, loan: Loan, x: torch.Tensor, keys: Sequence[str], bias: torch.Tensor | None) -> torch.Tensor:
        """The same where ranges of the weight's rows are in several units."""
        y = x.new_empty((*x.shape[:-1], self.out_features))
        start = 0
        for key in keys:
            stop = start + loan.borrow(key).shape[0]
            y[..., start:stop] = self._product(loan, x, key, None if bias is None else bias[start:stop])
            start = stop
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class ResidentLinear(nn.Module):
    """Takes the place of an nn.Linear outside layers and head: the same function by the kernels, so that a row's result
    does not depend on the rows beside it. `BoundModel.set_outer` gives it its tensors."""

    def __init__(self, original: nn.Linear, kernels: LayerKernels) -> None:
        super().__init__()
        self.in_features, self.out_features = original.in_features, original.out_features
        self.weight = original.weight
        self.register_parameter("bias", original.bias)
        self._kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return self._kernels.linear(x, self.weight, self._parameters["bias"])


@dataclass(frozen=True, eq=False)
class _Place:
    """Where the weight of one name belongs that no module borrows."""

    target: nn.Module
    attribute: str
    own: torch.Tensor
    """The graph's own tensor of that name, whose dtype the weight gets and whose place it takes."""

    @classmethod
    def find(cls, module: nn.Module, name: str) -> "_Place | None":
        """None where the module that has the weight borrows it when it computes."""
        path, _, attribute = name.rpartition(".")
        target = module.get_submodule(path)
        if isinstance(target, OffloadedLinear) or (isinstance(target, OffloadedExperts) and target.borrows(attribute)):
            return None
        return cls(target, attribute, getattr(target, attribute))

    def put(self, tensor: torch.Tensor) -> None:
        """Let `tensor` be the module's."""
        # Bypasses nn.Module's checks, as torch.func.functional_call does: a view is not an nn.Parameter.
        of = self.target._buffers if self.attribute in self.target._buffers else self.target._parameters
        of[self.attribute] = tensor  # type: ignore[assignment]


class BoundModel:
    """A skeleton whose layers and head compute with lent weights, and whose other parts hold their own.

    All its tensors are at `where`, and so must be what it computes with: lent weights, embedding rows, positions. A
    model elsewhere needs another skeleton.
    """

    def __init__(
        self, skeleton: Skeleton, dtype: torch.dtype, kernels: LayerKernels, where: torch.device = PROCESSOR
    ) -> None:
        self.skeleton, self.dtype, self.where = skeleton, dtype, where
        self._desk = Desk()
        self._places: dict[nn.Module, dict[str, _Place]] = {}
        """Of each module that was lent weights: the places of those that nothing borrows."""
        self._scratch = torch.empty(0, dtype=torch.uint8, device=where)
        """Holds copies of such weights while their module computes: of the module that has most of them."""
        self.layers: list[nn.Module] = list(skeleton.layers)
        for layer in self.layers:
            _offload(layer, kernels, self._desk, "")
            split_mixers(layer, kernels)
        self.head = OffloadedLinear(_linear_at(skeleton.model, skeleton.head_name), kernels, self._desk, "")
        skeleton.model.set_output_embeddings(self.head)
        _keep_linears(skeleton.model, kernels)
        self.blocks: list[nn.Module] = [*self.layers, self.head]
        """The modules of the tape's blocks."""
        # It matters in training only, and torch would demand that it is among the few rows that `embed` is given.
        skeleton.embedding.padding_idx = None
        _move_tables(skeleton.model, where)

    def set_outer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the parts outside layers, embedding and head their tensors, by full name, for good."""
        for name, tensor in tensors.items():
            dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
            _keep(self.skeleton.model, name, tensor.to(self.where, dtype))

    def set_small(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give a layer or the head its small tensors, by name inside it, for good."""
        for name, tensor in tensors.items():
            path, _, attribute = name.rpartition(".")
            own: torch.Tensor = getattr(module.get_submodule(path), attribute)
            _keep(module, name, tensor.to(self.where, own.dtype if tensor.is_floating_point() else tensor.dtype))

    def embed(self, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """What the model makes of the ids `index` [...] before its layers, with `rows` [n, width] as its table."""
        module = self.skeleton.embedding
        embedded: torch.Tensor = functional_call(module, {"weight": rows}, (index,))
        scale = self.skeleton.family.embedding_scale
        return embedded if scale is None else embedded * getattr(self.skeleton.config, scale)

    @contextmanager
    def lend(self, module: nn.Module, loan: Loan) -> Iterator[nn.Module]:
        """Let `module` compute with the weights of `loan` for the duration of the context.

        Weights that no linear layer or stack of experts borrows are put in their places here, until the end: copies of
        those that are streamed, whose units are free again before the module computes.
        """
        places = self._places.get(module)
        if places is None:
            found = {name: _Place.find(module, name) for name in loan.names}
            places = self._places[module] = {name: place for name, place in found.items() if place is not None}
        put: list[_Place] = []
        self._desk.loan, used = loan, 0
        try:
            for name, place in places.items():
                weight = _in_place(loan, name, place.own.dtype)
                if weight is None:
                    weight = _copy(loan, name, place.own, self._room(places.values())[used:])
                    used = round_up(used + weight.nbytes, ALIGNMENT)
                put.append(place)
                place.put(weight)
            yield module
        finally:
            self._desk.loan = None
            for place in put:
                place.put(place.own)

    def _room(self, places: Iterable[_Place]) -> torch.Tensor:
        """Memory for copies of the weights of all `places`."""
        nbytes = sum(round_up(place.own.nbytes, ALIGNMENT) for place in places)
        if nbytes > len(self._scratch):
            self._scratch = self._scratch.new_empty(nbytes)
        return self._scratch


def _in_place(loan: Loan, name: str, dtype: torch.dtype) -> torch.Tensor | None:
    """The weight `name` where it lies, if it stays there, as a tensor of `dtype`; else None."""
    keys = loan.parts(name)
    if len(keys) > 1 or loan.is_streamed(keys[0]):
        return None
    weight = _plain(loan.borrow(keys[0]), name)
    return weight if weight.dtype == dtype else None


def _copy(loan: Loan, name: str, own: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """A copy of the weight `name`, of the shape and dtype of `own`, in the first bytes of `room`. Gives it back."""
    copy = room[: own.nbytes].view(own.dtype).view(own.shape)
    flat, start = copy.view(-1), 0
    for key in loan.parts(name):
        part = _plain(loan.borrow(key), name).reshape(-1)
        flat[start : start + len(part)] = part
        start += len(part)
        loan.release(key)
    assert start == len(flat), f"{name}: {start:,} of {len(flat):,} numbers"
    return copy


def _plain(weight: AnyWeight, name: str) -> torch.Tensor:
    assert isinstance(weight, torch.Tensor), f"{name}: only linear layers can be quantized"
    return weight


def _move_tables(model: nn.Module, where: torch.device) -> None:
    """Have all tensors that modules made for themselves (rotary frequencies, position tables) at `where`."""
    for module in model.modules():
        # A few keep one outside parameters and buffers, as a plain attribute.
        for tensors in (module._buffers, vars(module)):
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.device != where:
                    tensors[name] = tensor.to(where)


def _keep(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Make `value` the parameter or buffer `name` inside `module`."""
    path, _, attribute = name.rpartition(".")
    target = module.get_submodule(path)
    if attribute in target._buffers:
        target._buffers[attribute] = value
    else:
        target.register_parameter(attribute, nn.Parameter(value, requires_grad=False))


def _offload(module: nn.Module, kernels: LayerKernels, desk: Desk, path: str) -> None:
    for name, child in module.named_children():
        inside = _joined(path, name)
        if linear_size(child) is not None:
            setattr(module, name, OffloadedLinear(child, kernels, desk, inside))
        elif (stacks := expert_stacks(child)) is not None:
            setattr(module, name, OffloadedExperts(child, stacks, kernels, desk, inside))
        else:
            _offload(child, kernels, desk, inside)
            experts = child._modules.get("experts")
            if isinstance(experts, OffloadedExperts) and experts.scales_input:
                setattr(module, name, InputScaledMixture(child))


def _keep_linears(model: nn.Module, kernels: LayerKernels) -> None:
    """Have the linear layers that are left compute with the kernels, too."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and linear_size(child) is not None:
                setattr(parent, name, ResidentLinear(child, kernels))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _linear_at(model: nn.Module, weight_name: str) -> nn.Linear:
    module = model.get_submodule(weight_name.removesuffix(".weight"))
    assert isinstance(module, nn.Linear)
    return module
