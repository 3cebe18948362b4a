"""Recurrent state in numbers: what some layers keep of a sequence, whatever its length, and where prompts may be cut.

In: what a model's mixers hand to the cache (`arch/mixers.py` finds it out). Out: bytes, before any of them is taken.
`cache/state.py` puts them to use.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Self

from tiered.units import PAGE, round_up

StateKind = Literal["conv", "recurrent"]
STATE_ALIGNMENT: Final = 64
"""Each state begins at a multiple of so many bytes."""
_ITEMSIZES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class StatePart:
    """One of the tensors that a layer keeps of a sequence."""

    kind: StateKind
    number: int
    """Among those of its kind in the layer."""
    shape: tuple[int, ...]
    """Without the dimension of sequences."""
    dtype: str
    """As torch spells it: recurrences are often float32, whatever the compute dtype."""

    @property
    def nbytes(self) -> int:
        nbytes = _ITEMSIZES[self.dtype]
        for size in self.shape:
            nbytes *= size
        return nbytes


@dataclass(frozen=True)
class StateGroup:
    """Layers that keep the same."""

    layers: tuple[int, ...]
    parts: tuple[StatePart, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Bytes from the start of what one layer keeps of a sequence to each part."""
        starts, position = [], 0
        for part in self.parts:
            starts.append(position)
            position = round_up(position + part.nbytes, STATE_ALIGNMENT)
        return tuple(starts)

    @property
    def nbytes(self) -> int:
        """Bytes that one layer keeps of a sequence: whole pages, as they may be read from disk and written there."""
        return round_up(self.offsets[-1] + self.parts[-1].nbytes, PAGE)


@dataclass(frozen=True)
class Grid:
    """Where scans of several tokens may begin, counted from the beginning of the text: there prompts may be cut, and
    nowhere else. So what is computed of a token depends on its position alone."""

    tokens: int = 1
    """From one line of the grid to the next. 1: anywhere; 0: nowhere, prompts are computed whole."""
    one_cell: bool = False
    """A scan ends with the cell that it begins in."""

    def cell(self, prompt: int) -> int:
        """Of a prompt of so many tokens, the most that must be computed together."""
        return min(self.tokens, prompt) if self.tokens else prompt

    def padded(self, tokens: int) -> int:
        """How many tokens a scan of at most so many computes: families' own code fills up the cell that it ends in. A
        single one is no scan."""
        if self.tokens < 2 or tokens < 2:
            return tokens
        return max(tokens, self.tokens) if self.one_cell else round_up(tokens, self.tokens)

    def share(self, wanted: int, left: int) -> int:
        """How many of at most `wanted` tokens a pass may take of a prompt that has `left`, from a line of the grid
        on."""
        if wanted >= left:
            return left
        return wanted - wanted % self.tokens if self.tokens else 0

    def next_stop(self, start: int, stop: int, rows: int) -> int:
        """Where the next part of tokens `start` to `stop` - 1 ends, if it has `rows` tokens at most. Where the grid
        leaves no other place it has more."""
        most = min(stop, start + rows)
        if self.tokens == 1:
            return most
        if not self.tokens:
            return stop
        line = start - start % self.tokens + self.tokens
        if self.one_cell:
            most = min(stop, line)
        elif most < stop:
            most = max(most - most % self.tokens, min(line, stop))
        # A single token is no scan: behind a line it is always computed by itself, in which pass soever it comes.
        return most - 1 if most - start > 1 and (most - 1) % self.tokens == 0 else most


ANYWHERE: Final = Grid()


@dataclass(frozen=True)
class StateShape:
    """What a model keeps of one sequence beside keys and values."""

    groups: tuple[StateGroup, ...]
    grid: Grid
    row_nbytes: int
    """Bytes that a mixer takes for each token of a scan."""
    step_nbytes: int
    """Bytes that it takes for each sequence of which it computes a single token, in the family's own code."""
    native_step_nbytes: int
    """The same where the library of kernels computes it, which updates states where they lie."""

    @property
    def nbytes(self) -> int:
        """Bytes of one sequence in all layers."""
        return sum(len(group.layers) * group.nbytes for group in self.groups)

    @property
    def layer_nbytes(self) -> int:
        """Bytes of one sequence in the layer that keeps most."""
        return max(group.nbytes for group in self.groups)

    def in_dtype(self, dtype: str, before: str) -> Self:
        """The shape as computed in another dtype than `before`, by their names. What is in 16 bits follows the compute
        dtype; recurrences that a family keeps in float32 do not, and where all is, they cannot be told apart."""
        if _ITEMSIZES[before] > 2:
            return self
        groups = (
            replace(group, parts=tuple(replace(p, dtype=dtype) if p.dtype == before else p for p in group.parts))
            for group in self.groups
        )
        return replace(self, groups=tuple(groups))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The shape whose `dataclasses.asdict` this is. Raises KeyError or TypeError where it is no such."""
        groups = tuple(
            StateGroup(
                tuple(group["layers"]),
                tuple(StatePart(**{**part, "shape": tuple(part["shape"])}) for part in group["parts"]),
            )
            for group in fields["groups"]
        )
        return cls(**{**fields, "groups": groups, "grid": Grid(**fields["grid"])})
