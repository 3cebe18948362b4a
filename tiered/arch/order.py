"""In which order a pass uses the weights of a model's layers: what a store puts first in a file is read first.

In: a skeleton. Out: the names of the weights that are lent to linear layers and stacks of experts. transformers' own
forward is run once over two tokens. Stand-ins take the place of linear layers and stacks: each notes its weights and
returns zeros. All other parameters are zeros that take no memory, and are not multiplied by. So nothing is computed,
at any size of the model, and no family's code is repeated here. Called by `convert/`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tiered.arch.modules import StandIn, lent_weights, linear_size
from tiered.arch.skeleton import Skeleton

_TOKENS: Final = 2
_PRODUCTS: Final = {torch.ops.aten.mm.default: 2, torch.ops.aten.bmm.default: 2, torch.ops.aten.addmm.default: 3}
"""Matrix products, and how many tensors each takes: the last two are multiplied."""


def order_of_use(skeleton: Skeleton) -> tuple[str, ...]:
    """Full names of all lent weights outside the head: those that a pass uses, in that order, then the others.

    A model that cannot be run here gives the order in which its graph has them: a worse order costs some time to wait
    for a weight, nothing else.
    """
    try:
        used = record_order(skeleton)
    # Each family has code of its own, which may raise anything where its configuration is unusual.
    except Exception:
        used = ()
    lent = (p.name for block in skeleton.blocks() if block.role != "head" for p in block.parameters if p.is_linear)
    return tuple(dict.fromkeys((*used, *lent)))


def record_order(skeleton: Skeleton) -> tuple[str, ...]:
    """Full names of the lent weights that a pass uses, each where it is used first. Raises what the forward raises."""
    base = skeleton.model.base_model
    noted: list[str] = []
    with torch.no_grad(), _zeros(base), _stand_ins(skeleton.model, base, noted), _NoProducts():
        hidden = torch.zeros(1, _TOKENS, skeleton.embedding.embedding_dim, dtype=skeleton.model.dtype)
        base(inputs_embeds=hidden, use_cache=False, **skeleton.table_zeros(hidden))
    return tuple(dict.fromkeys(noted))


class _StandIn(StandIn):
    """Takes the place of a linear layer, or of a stack of experts (`width` None): returns zeros of the right shape."""

    def __init__(self, original: nn.Module, names: tuple[str, ...], width: int | None, noted: list[str]) -> None:
        super().__init__(original)
        self._names, self._width, self._noted = names, width, noted

    def forward(self, hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        """hidden [..., in] -> zeros [..., out]; a stack's result has the shape of `hidden`."""
        self._noted.extend(self._names)
        return hidden.new_zeros((*hidden.shape[:-1], self._width or hidden.shape[-1]))


class _NoProducts(TorchDispatchMode):
    """Does not compute a matrix product with one of `_zeros`, which would be copied for it: the result is zeros."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            *_, left, right = args[: _PRODUCTS[func]]
            if any(factor.numel() > 1 and not any(factor.stride()) for factor in (left, right)):
                return left.new_zeros((*left.shape[:-1], right.shape[-1]))
        return func(*args, **(kwargs or {}))


@contextmanager
def _stand_ins(model: nn.Module, base: nn.Module, noted: list[str]) -> Iterator[None]:
    """Stand-ins for the linear layers and stacks of `base`, a part of `model`, until the context ends."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    of_model = {id(module): name for name, module in model.named_modules()}
    for parent in list(base.modules()):
        for attribute, child in list(parent.named_children()):
            name, lent, size = of_model[id(child)], lent_weights(child), linear_size(child)
            if not lent:
                continue
            names = tuple(f"{name}.{weight}" for weight in lent)
            stand_in = _StandIn(child, names, None if size is None else size[0], noted)
            setattr(parent, attribute, stand_in)
            replaced.append((parent, attribute, child))
    try:
        yield
    finally:
        for parent, attribute, child in replaced:
            setattr(parent, attribute, child)


@contextmanager
def _zeros(base: nn.Module) -> Iterator[None]:
    """Zeros for all parameters of `base` that are on the meta device, until the context ends."""
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in base.modules():
            for name, own in module._parameters.items():
                if own is not None and own.is_meta:
                    replaced.append((module, name, own))
                    # One number, repeated by strides of 0. Bypasses nn.Module's checks: it is no nn.Parameter.
                    zeros = torch.zeros((), dtype=own.dtype).expand(own.shape)
                    module._parameters[name] = zeros  # type: ignore[assignment]
        yield
    finally:
        for module, name, own in replaced:
            module._parameters[name] = own
