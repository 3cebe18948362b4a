"""The loan of a block's weights: each is there once its unit is, and goes back when it has been computed with.

In: the units of a block, and a streamer that brings and takes them back. Out: weights, one by one, to the modules that
compute with them. For the thread that computes.

What is resident is brought once; borrowing it is then a look-up in a dictionary, without a lock and without the loop.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from tiered.device import Device, Event
from tiered.errors import UnsupportedFamilyError
from tiered.quant import QuantizedWeight
from tiered.store import Unit, Weight

AnyWeight = torch.Tensor | QuantizedWeight
EachExpert = Callable[[Mapping[int, int], Sequence[str]], Iterator[tuple[int, Sequence[AnyWeight]]]]
"""`Loan.each_expert`."""


@dataclass(frozen=True)
class Brought:
    """A unit that can be computed with."""

    views: Mapping[str, AnyWeight]
    """Its weights, by key."""
    memory: torch.Tensor
    """All its bytes."""
    arrived: Event | None = None
    """The end of its copy to a device, for which computing must wait."""


class Loan:
    """The weights of one block. It is lent for every pass; `close` ends each of these times.

    `bring` waits for a unit, by its number in the block; `take_back` gets the numbers of units that are free again.
    Units whose numbers are not in `streamed` are resident: they are brought once. `experts` brings those of a mixture
    where they are not among the units. A `device` that checks waits is told what is computed with.
    """

    def __init__(
        self,
        block: str,
        prefix: str,
        units: Sequence[Unit],
        streamed: Collection[int],
        family: str,
        bring: Callable[[int], Brought],
        take_back: Callable[[Sequence[int]], None],
        experts: EachExpert | None = None,
        device: Device | None = None,
    ) -> None:
        self.block, self.units = block, units
        self.is_held = False
        """Whether units stay until the loan is closed, as several micro-batches use them."""
        self._streamed, self._family, self._bring, self._take_back = frozenset(streamed), family, bring, take_back
        self._experts = experts
        self._checked = device if device is not None and device.checks else None
        """A device that wants to be told."""
        self._views: dict[str, AnyWeight] = {}
        """What can be borrowed without waiting."""
        self._memory: dict[int, torch.Tensor] = {}
        """The memory of the units that it is in, by their numbers; kept for a device that checks."""
        self._parts: dict[str, list[str]] = {}
        """Keys by name: one, or several where a weight is stored in ranges of its rows."""
        self._unit_of: dict[str, int] = {}
        """The number of the unit of each key."""
        self._left: dict[int, set[str]] = {}
        """Of streamed units that are in use: keys that have not been given back."""
        self._returned: set[int] = set()
        """Streamed units that were here and have gone."""
        self._keys: list[dict[str, Weight]] = [{} for _ in units]
        for number, unit in enumerate(units):
            for weight in unit.weights.values():
                key = weight.name.removeprefix(prefix)
                self._parts.setdefault(weight.whole_name.removeprefix(prefix), []).append(key)
                self._keys[number][key], self._unit_of[key] = weight, number

    @property
    def names(self) -> Collection[str]:
        """Names of the weights, as inside the block's module."""
        return self._parts.keys()

    def views(self, number: int, memory: torch.Tensor) -> dict[str, AnyWeight]:
        """Views of the weights of unit `number` in `memory`, by key."""
        return {key: weight.view(memory) for key, weight in self._keys[number].items()}

    def parts(self, name: str) -> Sequence[str]:
        """The keys of a weight: its rows are those of its ranges, one after the other; a stack has one per expert."""
        return self._parts[name]

    def is_streamed(self, key: str) -> bool:
        """Whether what is borrowed by `key` goes away again."""
        return self._unit_of.get(key) in self._streamed

    def borrow(self, key: str) -> AnyWeight:
        """The weight of `key`: a look-up where it is in memory, else a wait for its unit.

        Raises what reading the unit raised, InterruptedRun once the run is cancelled, and UnsupportedFamilyError where
        the unit has gone already or cannot come.
        """
        found = self._views.get(key)
        if found is None:
            found = self._wait(key)
        if self._checked is not None:
            self._checked.uses(self._bytes_of(key))
        return found

    def release(self, *keys: str) -> None:
        """Whoever has borrowed `keys` has computed with them. What nobody will borrow may be given back as well."""
        if not self._streamed or self.is_held:
            return
        for key in keys:
            number = self._unit_of[key]
            if number in self._streamed and number not in self._returned:
                left = self._left.setdefault(number, set(self._keys[number]))
                left.discard(key)
                if not left:
                    self._drop(number)
                    self._take_back((number,))

    def each_expert(self, chosen: Mapping[int, int], names: Sequence[str]) -> Iterator[tuple[int, Sequence[AnyWeight]]]:
        """The experts of the stacks `names` that are `chosen`, by how many tokens; each with its matrices, which are
        valid until the next one is asked for. In ascending order, or as they come. Raises as `borrow`."""
        if self._experts is not None:
            yield from self._experts(chosen, names)
            return
        for expert, keys in enumerate(zip(*(self.parts(name) for name in names), strict=True)):
            if expert in chosen:
                yield expert, [self.borrow(key) for key in keys]
            self.release(*keys)

    def close(self) -> None:
        """End this time: what is streamed goes back, used or not."""
        if not self._streamed:
            return
        missed = self._streamed - self._returned
        for number in list(self._left):
            self._drop(number)
        self._returned.clear()
        if missed:
            self._take_back(sorted(missed))

    def forget(self) -> None:
        """Drop the views of what is resident: its memory is used for something else."""
        self._views.clear()
        self._memory.clear()

    def _wait(self, key: str) -> AnyWeight:
        number = self._unit_of[key]
        if number in self._returned:
            raise UnsupportedFamilyError(
                f"model family {self._family!r}: {self.block} uses {key} of unit {self.units[number].name} after that "
                f"has been given back, expected {self._expected()}; its layers use weights in another order than the "
                "store was made for: convert the model again with this version of tiered and transformers"
            )
        brought = self._bring(number)
        self._views.update(brought.views)
        if self._checked is not None:
            self._memory[number] = brought.memory
        if number in self._streamed:
            self._left.setdefault(number, set(brought.views))
        return brought.views[key]

    def _bytes_of(self, key: str) -> torch.Tensor:
        """The stretch of its unit's memory that the parts of `key` lie in."""
        number = self._unit_of[key]
        parts = self._keys[number][key].parts.values()
        start = min(part.offset for part in parts)
        return self._memory[number][start : max(part.offset + part.nbytes for part in parts)]

    def _expected(self) -> str:
        """The unit that would be used next if the order were the store's."""
        following = (unit.name for number, unit in enumerate(self.units) if self._is_due(number))
        return f"unit {next(following, 'none')}"

    def _is_due(self, number: int) -> bool:
        return number in self._streamed and number not in self._returned

    def _drop(self, number: int) -> None:
        self._returned.add(number)
        for key in self._keys[number]:
            self._views.pop(key, None)
        if self._checked is not None:
            self._checked.discards(self._memory.pop(number))
        del self._left[number]
