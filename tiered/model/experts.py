"""Experts of a mixture that borrow their stacks of weights, as linear layers borrow theirs.

In: a transformers module of experts, and a loan of its two stacks [experts, out, in]. Out: a module that computes the
same function, one expert after the other. Only experts that some token was routed to are computed, in the kernel's
panels.
"""

from collections import deque
from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from tiered.kernels import Kernels
from tiered.model.desk import Desk


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
        # Some families give choices that they have masked out a number beyond the last expert.
        numbers, counts = top_k_index.unique(return_counts=True)
        chosen = {n: count for n, count in zip(numbers.tolist(), counts.tolist(), strict=True) if n < self.num_experts}
        result = torch.zeros_like(hidden_states)
        waiting = deque(chosen)
        """Experts that have not been added to the result, ascending: the sum does not depend on which come first."""
        outputs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for expert, (gate_up, down) in loan.each_expert(chosen, self._names):
            token, choice = torch.where(top_k_index == expert)
            inner = self._apply_gate(self._kernels.linear(hidden_states[token], gate_up))
            out = self._kernels.linear(inner, down) * top_k_weights[token, choice, None]
            outputs[expert] = token, out.to(result.dtype)
            while waiting and waiting[0] in outputs:
                result.index_add_(0, *outputs.pop(waiting.popleft()))
        return result

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"
