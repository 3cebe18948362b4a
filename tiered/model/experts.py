"""Experts of a mixture that borrow their stacks of weights, as linear layers borrow theirs.

In: a transformers module of experts, and per block its two stacks [experts, out, in]. Out: a module that computes the
same function, one expert after the other. Only experts that some token was routed to are computed, in the kernel's
panels.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from tiered.kernels import Kernels
from tiered.quant import QuantizedWeight


class OffloadedExperts(nn.Module):
    """Takes the place of a module that `tiered.arch.is_expert_stack` accepts."""

    def __init__(self, original: nn.Module, kernels: Kernels) -> None:
        super().__init__()
        self.num_experts = int(original.get_parameter("down_proj").shape[0])
        self.lent: dict[str, torch.Tensor | QuantizedWeight] = {}
        """The stacks by their names, "gate_up_proj" and "down_proj"; empty outside a loan."""
        self._apply_gate = cast(Callable[[torch.Tensor], torch.Tensor], original._apply_gate)
        self._kernels = kernels

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, hidden] with each token's experts and their weights, both [tokens, k] -> [tokens, hidden]."""
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue  # the number that some families give to choices they have masked out
            token, choice = torch.where(top_k_index == expert)
            gate_up = self._kernels.linear(hidden_states[token], self._matrix("gate_up_proj", expert))
            out = self._kernels.linear(self._apply_gate(gate_up), self._matrix("down_proj", expert))
            result.index_add_(0, token, (out * top_k_weights[token, choice, None]).to(result.dtype))
        return result

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"

    def _matrix(self, name: str, expert: int) -> torch.Tensor | QuantizedWeight:
        """The weight [out, in] of one expert, without copying it."""
        stack = self.lent[name]
        if isinstance(stack, QuantizedWeight):
            out = stack.shape[0] // self.num_experts
            return stack.part(expert * out, (expert + 1) * out)
        return stack[expert]
