"""Which modules of a graph borrow their weights while they compute: linear layers, and experts of a mixture.

In: a module. Out: which of its parameters are lent, and how it has them. Every weight that is lent is [out, in] in a
store, or a stack [experts, out, in]; a few modules have theirs transposed. Called by `skeleton.py` and `order.py`, and
by `model/`, which puts modules that borrow in their places.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

_GATED: Final = ("gate_up_proj", "down_proj")
_UNGATED: Final = ("up_proj", "down_proj")
_LINEAR_CLASSES: Final = ("FalconLinear",)
"""Subclasses of nn.Linear whose own forward computes the same."""


class StandIn(nn.Module):
    """Takes the place of `original` in a graph; attributes that it has not itself are the original's."""

    original: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # Bypasses nn.Module's bookkeeping: the original must not become a submodule.
        object.__setattr__(self, "original", original)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "original"), name)


@dataclass(frozen=True)
class ExpertStacks:
    """The parameters of a module that holds all experts of a layer."""

    weights: tuple[str, str]
    """Attributes of the stack that is multiplied first, and of the one that is multiplied last."""
    biases: tuple[str, ...]
    """Attributes of the biases [experts, out] of the two; none where experts have no biases."""
    is_gated: bool
    """The module's `_apply_gate` joins the two halves of the first product; else its `act_fn` is applied to it."""
    is_transposed: bool
    """The module's own stacks are [experts, in, out]."""
    scales_input: bool = False
    """Routing weights multiply what goes into experts, not what they give, and the module is handed the product of
    every token with every expert's (Llama 4)."""


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer that is nothing more; None for any other module: some routers are a subclass of
    nn.Linear that does more."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    own = type(module)
    if isinstance(module, nn.Linear) and (own.forward is nn.Linear.forward or own.__name__ in _LINEAR_CLASSES):
        return module.out_features, module.in_features
    return None


def expert_stacks(module: nn.Module) -> ExpertStacks | None:
    """The stacks of a module that holds the experts of a mixture in a form of transformers'; None for any other.

    It has a forward(hidden, top_k_index, top_k_weights), and attributes by which transformers' own implementations
    (eager, grouped) know what to compute. Llama 4's has neither, and is known by its parameters.
    """
    flags = {name: getattr(module, name, None) for name in ("has_gate", "has_bias", "is_transposed")}
    if all(isinstance(flag, bool) for flag in flags.values()):
        if getattr(module, "has_post_expert_norm", False):
            return None
        weights = _GATED if flags["has_gate"] else _UNGATED
        biases = tuple(f"{name}_bias" for name in weights) if flags["has_bias"] else ()
        return ExpertStacks(weights, biases, bool(flags["has_gate"]), bool(flags["is_transposed"]))
    if module._parameters.keys() == {*_GATED} and list(inspect.signature(module.forward).parameters) == [
        "hidden_states"
    ]:
        return ExpertStacks(_GATED, (), is_gated=True, is_transposed=True, scales_input=True)
    return None


def activation_of(module: nn.Module, stacks: ExpertStacks) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes of an expert's first product what its last one multiplies: the module's own, or activation of the
    first half times the second."""
    own = getattr(module, "_apply_gate", None) if stacks.is_gated else None
    activation = cast(Callable[[torch.Tensor], torch.Tensor], own or module.act_fn)
    if own is not None or not stacks.is_gated:
        return activation

    def gated(product: torch.Tensor) -> torch.Tensor:
        gate, up = product.chunk(2, dim=-1)
        return activation(gate) * up

    return gated


def lent_weights(module: nn.Module) -> Mapping[str, bool]:
    """The attributes of the weights that `module` borrows while it computes, in the order of their use, and whether
    the module's own are transposed; empty for a module that computes with its own."""
    if linear_size(module) is not None:
        return {"weight": isinstance(module, Conv1D)}
    stacks = expert_stacks(module)
    return {} if stacks is None else dict.fromkeys(stacks.weights, stacks.is_transposed)
