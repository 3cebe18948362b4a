"""What a unit, a layer's attention and an expert cost to compute, by a machine's rates: `cost.py` in parts.

Of a block's weights and seconds a unit has the share that it has of its bytes.
"""

from collections.abc import Iterable
from functools import cached_property

from tiered.errors import ConfigError
from tiered.plan.cost import beside_seconds, expert_seconds, prompt_attention_seconds, stored_tokens
from tiered.plan.inputs import Machine, ModelShape
from tiered.plan.plan import Plan
from tiered.units import PAGE_TOKENS


class UnitCosts:
    """Seconds of computing with `plan`, on a `machine` that keeps its KV cache (`Machine.keeping`). Raises ConfigError
    where rates are not known."""

    def __init__(self, plan: Plan, model: ModelShape, machine: Machine) -> None:
        if machine.linear is None:
            raise ConfigError("no simulation without the speed of linear layers: run 'tiered profile'")
        self._tape, self._model, self._machine, self._linear = plan.tape, model, machine, machine.linear
        self._attention = machine.attention_seconds or 0.0
        recent = machine.recent_attention_seconds
        self._recent = 0.0 if recent is None else recent - self._attention
        """What a token of the page that is being filled takes more than others."""
        self._window_of = {layer: group.window for group in plan.cache.groups for layer in group.layers}
        self._block_of = [number for number, units in enumerate(self._tape.blocks) for _ in units]
        self._nbytes = [sum(self._tape.nbytes[unit] for unit in units) for units in self._tape.blocks]
        self._seconds: dict[tuple[int, int], float] = {}
        """Of blocks, by number and rows."""
        self._on_demand = plan.experts is not None

    def unit(self, unit: int, rows: int) -> float:
        """Seconds of `rows` rows with unit number `unit` of the tape: its share, by bytes, of its block's."""
        block = self._block_of[unit]
        if (block, rows) not in self._seconds:
            self._seconds[block, rows] = self._block(block, rows)
        return self._seconds[block, rows] * self._tape.nbytes[unit] / self._nbytes[block]

    def attention(self, layer: int, parts: Iterable[range]) -> float:
        """Seconds in which these tokens of sequences attend to those before them, and to themselves."""
        if layer not in self._window_of:
            return 0.0  # it keeps no keys
        window, seconds = self._window_of[layer], 0.0
        for part in parts:
            pairs = _pairs(part, window)
            if len(part) == 1:
                seconds += pairs * self._attention + min(pairs, part.start % PAGE_TOKENS + 1) * self._recent
            else:
                seconds += prompt_attention_seconds(self._model, self._machine, pairs)
        return seconds

    def storing(self, layer: int, parts: Iterable[range]) -> float:
        """Seconds of quantizing the pages that sequences fill with these tokens."""
        if layer not in self._window_of:
            return 0.0
        window = self._window_of[layer]
        return self._machine.store_seconds * sum(stored_tokens(part.start, part.stop, window) for part in parts)

    def experts(self, rows: int) -> tuple[float, float]:
        """How many experts of a layer `rows` rows are expected to choose, and the seconds of each."""
        experts = self._model.experts
        assert experts is not None
        return experts.distinct(rows), expert_seconds(experts, self._machine, experts.rows_each(rows))

    @cached_property
    def expert_layers(self) -> list[bool]:
        """Of each block, whether it has experts."""
        experts, whole = self._model.experts, self._model.tape
        if experts is None:
            return [False] * len(whole.counts)
        return [
            sum(whole.nbytes[unit] for unit in units) > sum(experts.dense.nbytes[unit] for unit in dense)
            for units, dense in zip(whole.blocks, experts.dense.blocks, strict=True)
        ]

    def _block(self, block: int, rows: int) -> float:
        """Seconds of `rows` rows with all units of a block; without attention."""
        model, experts = self._model, self._model.experts
        if block == len(self._nbytes) - 1:
            return self._linear.seconds(rows, model.head_weights)
        dense = model.tape if experts is None else experts.dense
        weights = model.weights - model.head_weights - (0 if experts is None else experts.total * experts.weights)
        nbytes = [sum(dense.nbytes[unit] for unit in units) for units in dense.blocks[:-1]]
        seconds = self._linear.seconds(rows, round(weights * nbytes[block] / sum(nbytes)))
        seconds += beside_seconds(model, self._machine, rows)
        if self.expert_layers[block] and not self._on_demand:
            chosen, each = self.experts(rows)
            seconds += chosen * each
        return seconds


def _pairs(part: range, window: int) -> int:
    """How many keys the tokens of `part` see between them."""
    cut = max(part.start, min(part.stop, window)) if window else part.stop
    # Up to position `cut` a token sees all before it and itself, from there on `window` tokens.
    return (part.start + 1 + cut) * (cut - part.start) // 2 + (part.stop - cut) * window
