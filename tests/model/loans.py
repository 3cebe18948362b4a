"""Loans of weights that a test has in its hands, without a store."""

from collections.abc import Mapping

import torch

from tiered.stream import AnyWeight, Brought, Loan


class GivenLoan(Loan):
    """All of `weights` are in memory for good."""

    def __init__(self, weights: Mapping[str, AnyWeight | list[AnyWeight]]) -> None:
        super().__init__("block", "", (), (), "test", lambda _: Brought({}, torch.empty(0)), lambda numbers: None)
        self._views = {}
        for name, weight in weights.items():
            # A stack is borrowed expert by expert; a test gives them as a list.
            matrices = (
                {name: weight} if not isinstance(weight, list) else {f"{name}#{k}": w for k, w in enumerate(weight)}
            )
            self._views |= matrices
            self._parts[name] = list(matrices)
