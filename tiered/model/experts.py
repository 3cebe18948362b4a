"""Experts of a mixture that borrow their stacks of weights, as linear layers borrow theirs.

In: a transformers module of experts, and a loan of its two stacks [experts, out, in]. Out: a module that computes the
same function, one expert after the other. Only experts that some token was routed to are computed, in the kernel's
panels.
"""

from collections import Counter, deque
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
        of_token = top_k_index.tolist()
        uses = Counter(expert for experts in of_token for expert in experts if expert < self.num_experts)
        chosen = dict(sorted(uses.items()))
        result = torch.zeros_like(hidden_states)
        waiting = deque(chosen)
        """Experts that have not been added to the result, ascending: the sum does not depend on which come first."""
        outputs: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}
        for expert, (gate_up, down) in loan.each_expert(chosen, self._names):
            token: torch.Tensor | None = None
            if len(of_token) == 1:
                # Nearly all passes of a sequence that decodes: picking and scattering rows would take longer than they.
                x, weight = hidden_states, top_k_weights[:, of_token[0].index(expert), None]
            else:
                token, choice = torch.where(top_k_index == expert)
                x, weight = hidden_states[token], top_k_weights[token, choice, None]
            out = self._kernels.linear(self._apply_gate(self._kernels.linear(x, gate_up)), down) * weight
            outputs[expert] = token, out.to(result.dtype)
            while waiting and waiting[0] in outputs:
                token, out = outputs.pop(waiting.popleft())
                result = result.add_(out) if token is None else result.index_add_(0, token, out)
        return result

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"
