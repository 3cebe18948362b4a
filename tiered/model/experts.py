"""Experts of a mixture that borrow their stacks of weights, as linear layers borrow theirs.

In: a transformers module of experts, and a loan of its two stacks [experts, out, in]. Out: a module that computes the
same function, one expert after the other. Only experts that some token was routed to are computed, in the kernel's
panels.
"""

import itertools
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from tiered.arch import ExpertStacks, activation_of
from tiered.kernels import LayerKernels
from tiered.model.desk import Desk


class OffloadedExperts(nn.Module):
    """Takes the place of a module whose `stacks` are those that `tiered.arch.expert_stacks` has found."""

    def __init__(self, original: nn.Module, stacks: ExpertStacks, kernels: LayerKernels, desk: Desk, path: str) -> None:
        super().__init__()
        first, last = stacks.weights
        self.num_experts = int(original.get_parameter(last).shape[0])
        self.scales_input = stacks.scales_input
        self._names = f"{path}.{first}", f"{path}.{last}"
        self._activate = activation_of(original, stacks)
        for name in stacks.biases:
            self.register_parameter(name, original.get_parameter(name))
        self._biases = stacks.biases
        self._kernels, self._desk = kernels, desk

    def borrows(self, attribute: str) -> bool:
        """Whether the parameter `attribute` of the original module is borrowed while it computes."""
        return attribute not in self._biases

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, hidden] with each token's experts and their weights, both [tokens, k] -> [tokens, hidden]."""
        loan = self._desk.loan
        assert loan is not None, "used outside its block"
        of_token: list[list[int]] = top_k_index.tolist()
        uses = _uses(of_token, self.num_experts)
        chosen = {expert: len(choices) for expert, choices in uses.items()}
        rows = _Rows(hidden_states, top_k_weights, uses) if len(of_token) > 1 else None
        biases: list[torch.Tensor] = [getattr(self, name) for name in self._biases]
        result = torch.zeros_like(hidden_states)
        waiting = deque(chosen)
        """Experts that have not been added to the result, ascending: the sum does not depend on which come first."""
        outputs: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}
        for expert, stacks in loan.each_expert(chosen, self._names):
            token: torch.Tensor | None = None
            if rows is None:
                # Nearly all passes of a sequence that decodes: picking and scattering rows would take longer than they.
                x, weight = hidden_states, top_k_weights[:, of_token[0].index(expert), None]
            else:
                token, x, weight = rows.of(expert)
            first, last = zip(stacks, [bias[expert] for bias in biases] or (None, None), strict=True)
            if self.scales_input:
                x = x * weight
            out = self._kernels.linear(self._activate(self._kernels.linear(x, *first)), *last)
            if not self.scales_input:
                out = out * weight
            outputs[expert] = token, out.to(result.dtype)
            while waiting and waiting[0] in outputs:
                token, out = outputs.pop(waiting.popleft())
                result = result.add_(out) if token is None else result.index_add_(0, token, out)
        return result

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"


class InputScaledMixture(nn.Module):
    """Takes the place of a mixture that hands its experts every token times every routing weight, most of them 0
    (Llama 4): the same function, which gives each token to the experts that its router has chosen, and to no other.

    `original` has a router, a shared expert and the experts, which are offloaded.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.router, self.shared_expert = original.get_submodule("router"), original.get_submodule("shared_expert")
        self.experts = original.get_submodule("experts")
        self._chosen = int(cast(int, original.top_k))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., hidden] -> [tokens, hidden], and what the router computed, [tokens, experts]."""
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, logits = self.router(hidden)  # both [tokens, experts]
        index = logits.topk(self._chosen, dim=1).indices
        shared: torch.Tensor = self.shared_expert(hidden)
        return shared + self.experts(hidden, index, weights.gather(1, index)), logits


def _uses(of_token: Sequence[Sequence[int]], experts: int) -> dict[int, list[int]]:
    """The choices of each expert that was chosen, ascending; a choice is its number in the flattened [tokens, k]."""
    found: defaultdict[int, list[int]] = defaultdict(list)
    for choice, expert in enumerate(itertools.chain.from_iterable(of_token)):
        # Some families give choices that they have masked out a number beyond the last expert.
        if expert < experts:
            found[expert].append(choice)
    return dict(sorted(found.items()))


class _Rows:
    """Which rows of `hidden` [tokens, hidden] each expert of `uses` computes, and their `weights` [tokens, k].

    Found once for all experts from what the host knows: asking a device for each expert's would wait for it each time.
    """

    def __init__(self, hidden: torch.Tensor, weights: torch.Tensor, uses: Mapping[int, Sequence[int]]) -> None:
        flat = list(itertools.chain.from_iterable(uses.values()))
        choices = torch.tensor(flat, dtype=torch.int64).to(hidden.device)
        self._hidden = hidden
        self._tokens, self._weights = choices // weights.shape[1], weights.flatten()[choices][:, None]
        stops = list(itertools.accumulate(map(len, uses.values()), initial=0))
        self._spans = {expert: slice(*span) for expert, span in zip(uses, itertools.pairwise(stops), strict=True)}

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens [n], their rows [n, hidden] and weights [n, 1]."""
        span = self._spans[expert]
        tokens = self._tokens[span]
        return tokens, self._hidden[tokens], self._weights[span]
