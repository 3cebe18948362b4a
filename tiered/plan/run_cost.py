"""What runs of equal passes compute, in seconds: `cost.py` for what takes part in them, on one seat or two.

Plans that differ only in what they read have the same runs, so each run's seconds are found once for all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

from tiered.plan.cost import (
    Computing,
    decode_attention_seconds,
    kept_layers,
    layers_computing,
    least_token_seconds,
    linear_computing,
    prompt_attention_seconds,
    prompt_pairs,
    store_seconds,
)
from tiered.plan.gpu import on_gpu
from tiered.plan.hardware import GpuRates
from tiered.plan.inputs import Machine, ModelShape
from tiered.plan.load import PassRun
from tiered.plan.plan import Plan
from tiered.units import PAGE_TOKENS


@dataclass(frozen=True)
class Least:
    """What any passes take at least for tokens that are left."""

    prompt_seconds: float = 0.0
    """Of computing a token of a prompt."""
    row_seconds: float = 0.0
    """Of computing that of a sequence that decodes."""
    read_seconds: float = 0.0
    """The same of reading, by its share of a pass of as many as run at once."""
    at_once: bool = False
    """Prompts are computed beside those that decode."""

    def seconds(self, prompts: int, rows: int) -> float:
        """Seconds of so many tokens of prompts, and so many of sequences that decode."""
        reading, decoding = prompts * self.prompt_seconds, rows * self.row_seconds
        computing = max(reading, decoding) if self.at_once else reading + decoding
        return 0.999 * max(computing, rows * self.read_seconds)


class RunCosts:
    """Seconds of computing by plans like `plan`: with the same devices and micro-batches, and the KV cache in as many
    bits in the same place. Rates must be known."""

    def __init__(self, plan: Plan, model: ModelShape, machine: Machine, gpu: GpuRates | None) -> None:
        self._model, self._most_rows = model, plan.micro_batch_rows
        machine = machine.keeping(plan.cache.bits, plan.cache.on_device)
        self._prompts = self._rest = self._processor = machine
        if gpu is not None and plan.device is not None:
            there = on_gpu(machine, model, plan.cache, gpu)
            self._prompts = there if plan.prefill_device == "gpu" else machine
            self._rest = there if plan.decode_device == "gpu" else machine
        self._known: dict[tuple[object, ...], Computing] = {}
        self._of_rest = self._linear_of(self._rest)
        self._of_prompts = self._of_rest if self._prompts is self._rest else self._linear_of(self._prompts)
        self._pairs = lru_cache(maxsize=None)(lambda prompt: prompt_pairs(model, prompt))

    def least(self, read_seconds: float) -> Least:
        """What passes take at least, where reading takes `read_seconds` for each sequence that decodes in one."""
        return Least(*self._least_token_seconds, read_seconds, self._prompts is not self._rest)

    @cached_property
    def _least_token_seconds(self) -> tuple[float, float]:
        """Of a token of a prompt, and of a sequence that decodes."""
        return least_token_seconds(self._model, self._prompts), least_token_seconds(self._model, self._rest)

    def _linear_of(self, machine: Machine) -> Callable[[int, int], Computing]:
        """What so many tokens, and so many of them through the head, take; many runs have as many."""
        layers = lru_cache(maxsize=None)(partial(layers_computing, self._model, machine))

        def computing(tokens: int, logits: int) -> Computing:
            return linear_computing(self._model, machine, tokens, logits, self._most_rows, layers)

        return lru_cache(maxsize=None)(computing)

    def computing(self, run: PassRun, in_turns: bool = False) -> Computing:
        """Of each pass of `run`. Prompts that a device computes for a processor that decodes go on beside that, unless
        the two take turns inside each layer."""
        key = (run.rows, run.before, run.times, run.parts, run.logits, in_turns)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._computing(run, in_turns)
        return found

    def slowest(self, run: PassRun) -> Machine:
        """Of what computes in each pass that from which readers take most."""
        prompts, rest = self._prompts, self._rest
        if prompts is rest or not run.rows:
            return prompts
        return max(rest, prompts, key=lambda machine: machine.reading_seconds) if run.parts else rest

    def _computing(self, run: PassRun, in_turns: bool) -> Computing:
        logits = -(-run.logits // run.times)
        decoding = decode_attention_seconds(self._model, self._rest, run.rows, run.context) if run.rows else 0.0
        # Prompts attend where they are computed, wherever the KV cache is.
        reading = prompt_attention_seconds(self._model, self._prompts, self._run_pairs(run))
        # The processor fills the pages of a cache that is not on a device, whoever computes.
        storing = self._store_seconds(run) if self._processor.store_seconds else 0.0
        if self._prompts is self._rest:
            return self._of_rest(run.rows + run.prompt_tokens, logits) + Computing(decoding + reading + storing)
        # What decodes computes all logits.
        alone = self._of_rest(0, logits)
        prompts = self._of_prompts(run.prompt_tokens, 0) + Computing(reading)
        rest = self._of_rest(run.rows, 0) + Computing(decoding + storing)
        if in_turns:
            return prompts + rest + alone
        return max(prompts, rest, key=lambda each: each.seconds) + alone

    def _store_seconds(self, run: PassRun) -> float:
        """Of each pass of `run`. Of sequences that decode every token counts, once they are as long as a page."""
        rows = run.rows if run.context >= PAGE_TOKENS else 0
        seconds = 0.0
        for part in run.parts:
            stop = part.start + run.times * len(part)
            seconds += store_seconds(self._model, self._processor, part.start, stop, run.times)
        return rows * self._processor.store_seconds * kept_layers(self._model) + seconds / run.times

    def _run_pairs(self, run: PassRun) -> float:
        """Pairs of a query and a key that it sees, of the prompts in each pass of `run`, summed over layers."""
        ends = ((part.start, part.start + run.times * len(part)) for part in run.parts)
        return sum(self._pairs(stop) - self._pairs(start) for start, stop in ends) / run.times
