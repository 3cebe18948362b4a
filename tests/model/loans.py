"""Loans of weights that a test has in its hands, without a store."""

from collections.abc import Mapping

from tiered.stream import AnyWeight, Loan
from tiered.stream.loan import Brought


class GivenLoan(Loan):
    """All of `weights` are in memory for good."""

    def __init__(self, weights: Mapping[str, AnyWeight | list[AnyWeight]]) -> None:
        super().__init__("block", "", (), (), "test", _nothing, lambda numbers: None)
        self._views = {}
        for name, weight in weights.items():
            # A stack is borrowed expert by expert; a test gives them as a list.
            matrices = (
                {name: weight} if not isinstance(weight, list) else {f"{name}#{k}": w for k, w in enumerate(weight)}
            )
            self._views |= matrices
            self._parts[name] = list(matrices)


def _nothing(number: int) -> Brought:
    raise AssertionError(f"unit {number} is to come, where all weights are there")
