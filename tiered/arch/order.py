"""What a pass does in a model's layers: in which order it uses weights, and how much it computes beside them.

In: a skeleton. Out: the names of the weights that are lent to linear layers and stacks of experts, for `convert/`: what
a store puts first in a file is read first; and operations beside these and what they write, for `model/shape.py`.
transformers' own forward is run once over two tokens. Stand-ins take the place of linear layers and stacks: each notes
its weights and returns zeros. All other parameters are zeros that take no memory, and are not multiplied by. So next to
nothing is computed, at any size of the model, and no family's code is repeated here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tiered.arch.mixers import is_mixer
from tiered.arch.modules import StandIn, activation_of, expert_stacks, lent_weights, linear_size
from tiered.arch.skeleton import Skeleton

_TOKENS: Final = 2
_PRODUCTS: Final = {torch.ops.aten.mm.default: 2, torch.ops.aten.bmm.default: 2, torch.ops.aten.addmm.default: 3}
"""Matrix products, and how many tensors each takes: the last two are multiplied."""
_ATTENTION: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_EXPERT_OPERATIONS: Final = 6
"""Of `model/experts.py` for an expert beside its activation: its rows are picked, two linear layers are called, and
their result is weighted, put in the dtype of the sum, and added to it."""
_EXPERT_ROWS: Final = 3
"""Rows as wide as the hidden state that these write for each row of the expert."""


@dataclass(frozen=True)
class Work:
    """What is computed beside matrix products. All that recurrent mixers do is left out, calls of linear layers inside
    them too: it is another for a step than for a scan."""

    operations: int = 0
    """Operations that write something, and calls of linear layers: for a micro-batch in all layers, or for an expert
    of a layer."""
    elements: int = 0
    """Numbers that these write for each row, without the results of linear layers."""


@dataclass(frozen=True)
class PassRecord:
    """What a pass does."""

    order: tuple[str, ...]
    """Full names of the lent weights that it uses, each where it is used first."""
    layers: Work
    """Of all layers, without experts."""
    expert: Work
    """Of each expert that is chosen."""


def order_of_use(skeleton: Skeleton) -> tuple[str, ...]:
    """Full names of all lent weights outside the head: those that a pass uses, in that order, then the others.

    A model that cannot be run here gives the order in which its graph has them: a worse order costs some time to wait
    for a weight, nothing else.
    """
    try:
        used = record_pass(skeleton).order
    # Each family has code of its own, which may raise anything where its configuration is unusual.
    except Exception:
        used = ()
    lent = (p.name for block in skeleton.blocks() if block.role != "head" for p in block.parameters if p.is_linear)
    return tuple(dict.fromkeys((*used, *lent)))


def work_of_layers(skeleton: Skeleton) -> tuple[Work, Work]:
    """What all layers compute beside products, and what each expert that is chosen does. None of a model that cannot be
    run here: what it takes is then not predicted."""
    try:
        record = record_pass(skeleton)
    # As above.
    except Exception:
        return Work(), Work()
    return record.layers, record.expert


def record_pass(skeleton: Skeleton) -> PassRecord:
    """What a pass of `skeleton`, as built, does. Raises what the forward raises."""
    base, mode = skeleton.model.base_model, _Recording()
    with torch.no_grad(), _zeros(base), _stand_ins(skeleton.model, base, mode), _counting(skeleton, mode), mode:
        hidden = torch.zeros(1, _TOKENS, skeleton.embedding.embedding_dim, dtype=skeleton.model.dtype)
        base(inputs_embeds=hidden, use_cache=False, **skeleton.table_zeros(hidden))
    return PassRecord(tuple(dict.fromkeys(mode.noted)), mode.layers.work(_TOKENS), mode.expert.work(_TOKENS))


@dataclass
class _Tally:
    operations: int = 0
    elements: int = 0

    def work(self, rows: int) -> Work:
        """What was counted of a pass over so many rows."""
        return Work(self.operations, self.elements // rows)


class _Recording(TorchDispatchMode):
    """Notes what stand-ins tell, and counts operations that write something into `tally`, while that is one. Does not
    compute attention, nor a matrix product with one of `_zeros`, which would be copied for it: they give zeros."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.noted: list[str] = []
        self.layers, self.expert = _Tally(), _Tally()
        self.tally: _Tally | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._computed(func, args, kwargs or {})
        if self.tally is not None and not func.is_view:
            results = result if isinstance(result, tuple | list) else (result,)
            self.tally.operations += 1
            self.tally.elements += sum(each.numel() for each in results if isinstance(each, torch.Tensor))
        return result

    @staticmethod
    def _computed(func: Any, args: Any, kwargs: Any) -> Any:
        if func is _ATTENTION:
            # Threads that meet in it wait for each other, on a busy machine for longer than all else takes.
            query, _, value, *_ = args
            return query.new_zeros((*query.shape[:-1], value.shape[-1])), query.new_zeros(query.shape[:-1])
        if func in _PRODUCTS:
            *_, left, right = args[: _PRODUCTS[func]]
            if any(factor.numel() > 1 and not any(factor.stride()) for factor in (left, right)):
                return left.new_zeros((*left.shape[:-1], right.shape[-1]))
        return func(*args, **kwargs)

    @contextmanager
    def counting(self, tally: _Tally | None) -> Iterator[None]:
        """Operations count in `tally`, or nowhere, until the context ends."""
        before, self.tally = self.tally, tally
        try:
            yield
        finally:
            self.tally = before


class _StandIn(StandIn):
    """Takes the place of a linear layer: returns zeros `width` wide."""

    def __init__(self, original: nn.Module, names: tuple[str, ...], width: int, mode: _Recording) -> None:
        super().__init__(original)
        self._names, self._width, self._mode = names, width, mode

    def forward(self, hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        """hidden [..., in] -> zeros [..., out]."""
        self._mode.noted.extend(self._names)
        if self._mode.tally is not None:
            self._mode.tally.operations += 1
        with self._mode.counting(None):
            return hidden.new_zeros((*hidden.shape[:-1], self._width))


class _ExpertsStandIn(StandIn):
    """Takes the place of a stack of experts: returns zeros, and counts what one expert does with as many rows."""

    def __init__(self, original: nn.Module, names: tuple[str, ...], mode: _Recording) -> None:
        super().__init__(original)
        stacks = expert_stacks(original)
        assert stacks is not None
        shape: torch.Size = getattr(original, stacks.weights[0]).shape
        self._names, self._mode, self._width = names, mode, shape[-1 if stacks.is_transposed else -2]
        self._activate: Callable[[torch.Tensor], torch.Tensor] = activation_of(original, stacks)

    def forward(self, hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        """hidden [..., hidden] -> zeros of the same shape."""
        mode = self._mode
        mode.noted.extend(self._names)
        with mode.counting(None):
            first, result = hidden.new_zeros((_TOKENS, self._width)), torch.zeros_like(hidden)
        # All layers' experts are taken to do as those of the last one.
        mode.expert = _Tally(_EXPERT_OPERATIONS, _EXPERT_ROWS * _TOKENS * hidden.shape[-1])
        with mode.counting(mode.expert):
            self._activate(first)
        return result


@contextmanager
def _counting(skeleton: Skeleton, mode: _Recording) -> Iterator[None]:
    """Count what layers do, and nothing of what mixers do inside them, until the context ends."""
    tallies: list[tuple[nn.Module, _Tally | None]] = [(layer, mode.layers) for layer in skeleton.layers]
    tallies += [(module, None) for layer in skeleton.layers for module in layer.modules() if is_mixer(module)]
    before: list[_Tally | None] = []

    def enter(tally: _Tally | None) -> None:
        before.append(mode.tally)
        mode.tally = tally

    def leave(*_: object) -> None:
        mode.tally = before.pop()

    hooks = []
    for module, tally in tallies:
        hooks.append(module.register_forward_pre_hook(lambda *_, tally=tally: enter(tally)))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _stand_ins(model: nn.Module, base: nn.Module, mode: _Recording) -> Iterator[None]:
    """Stand-ins for the linear layers and stacks of `base`, a part of `model`, until the context ends."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    of_model = {id(module): name for name, module in model.named_modules()}
    for parent in list(base.modules()):
        for attribute, child in list(parent.named_children()):
            name, lent, size = of_model[id(child)], lent_weights(child), linear_size(child)
            if not lent:
                continue
            names = tuple(f"{name}.{weight}" for weight in lent)
            stand_in: StandIn = (
                _ExpertsStandIn(child, names, mode) if size is None else _StandIn(child, names, size[0], mode)
            )
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
