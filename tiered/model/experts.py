"""Experts of a mixture that borrow their stacks of weights, as linear layers borrow theirs.

In: a transformers module of experts, and a loan of its two stacks [experts, out, in]. Out: a module that computes the
same function, one expert after the other. Only experts that some token was routed to are computed, in the kernel's
panels.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from tiered.kernels import Kernels
from tiered.model.desk import Desk
from tiered.quant import QuantizedWeight
from tiered.stream import AnyWeight


class OffloadedExperts(nn.Module):
    """Takes the place of a module that `tiered.arch.is_expert_stack` accepts."""

    def __init__(self, original: nn.Module, kernels: Kernels, desk: Desk, path: str) -> None:
        super().__init__()
        self.num_experts = int(original.get_parameter("down_proj").shape[0])
        self._names = f"{path}.gate_up_proj", f"{path}.down_proj"
        self._apply_gate = cast(Callable[[torch.Tensor], torch.Tensor], original._apply_gate)
        self._kernels, self._desk = kernels, desk

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, hidden] with each token's experts and their weights, both [tokens, k] -> [tokens, hidden]."""
        loan = self._desk.loan
        assert loan is not None, "used outside its block"
        gate_up_stack, down_stack = (loan.borrow(name) for name in self._names)
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue  # the number that some families give to choices they have masked out
            token, choice = torch.where(top_k_index == expert)
            gate_up = self._kernels.linear(hidden_states[token], self._matrix(gate_up_stack, expert))
            out = self._kernels.linear(self._apply_gate(gate_up), self._matrix(down_stack, expert))
            result.index_add_(0, token, (out * top_k_weights[token, choice, None]).to(result.dtype))
        loan.release(*self._names)
        return result

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"

    def _matrix(self, stack: AnyWeight, expert: int) -> AnyWeight:
        """The weight [out, in] of one expert, without copying it."""
        if isinstance(stack, QuantizedWeight):
            out = stack.shape[0] // self.num_experts
            return stack.part(expert * out, (expert + 1) * out)
        return stack[expert]
