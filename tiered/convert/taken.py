"""What became of the weights that a checkpoint holds quantized: taken as they are, or quantized anew, at which error.

In: what was read and what was stored of each, as `stored_rows.py` converts it. Out: one `Taken` for each method of the
checkpoint and form in the store, for `tiered convert` to print.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import sqrt
from typing import Final

import torch

_PART_NUMEL: Final = 1 << 16


@dataclass(frozen=True)
class Taken:
    """The weights that one method of the checkpoint has quantized and that the store holds in one form."""

    method: str
    """Of the checkpoint: "gptq"."""
    form: str
    """In the store: a scheme's name, with what was rounded; or a dtype."""
    weights: int
    """How many weights (not values) of this run; those that an earlier attempt had finished are not among them."""
    added: float
    """RMS of what the form in the store changed, as a share of the RMS of the weights; 0.0 where they are the same
    values. It is that of a sample of rows from all of them."""


@dataclass
class _Sums:
    names: set[str] = field(default_factory=set)
    changed: float = 0.0
    values: float = 0.0


class Tally:
    """Adds up what a conversion does to weights that were quantized already, in any threads."""

    def __init__(self) -> None:
        self._adding = threading.Lock()
        self._sums: dict[tuple[str, str], _Sums] = {}

    def add(self, name: str, method: str, form: str) -> None:
        """The weight `name`, or rows of it, is stored as `form` with the values that it had."""
        with self._adding:
            self._sums.setdefault((method, form), _Sums()).names.add(name)

    def add_changed(self, name: str, method: str, form: str, before: torch.Tensor, after: torch.Tensor) -> None:
        """Rows of the weight `name` were `before`, float32, and are `after` in the store."""
        self.add(name, method, form)
        changed = values = 0.0
        # Part by part: what is made of them on the way is memory that no budget knows of.
        for one, other in zip(before.flatten().split(_PART_NUMEL), after.flatten().split(_PART_NUMEL), strict=True):
            changed += float((other.float() - one).double().square().sum())
            values += float(one.double().square().sum())
        with self._adding:
            self._sums[method, form].changed += changed
            self._sums[method, form].values += values

    def taken(self) -> Iterator[Taken]:
        """What has been added up, the weights of most methods first."""
        for (method, form), sums in sorted(self._sums.items(), key=lambda item: -len(item[1].names)):
            added = sqrt(sums.changed / sums.values) if sums.values else 0.0
            yield Taken(method, form, len(sums.names), added)
