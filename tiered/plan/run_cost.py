"""What runs of equal passes compute, in seconds: `cost.py` for what takes part in them, on one seat or two.

Plans that differ only in what they read have the same runs, so each run's seconds are found once for all of them.
"""

from functools import lru_cache

from tiered.plan.cost import (
    Computing,
    decode_attention_seconds,
    linear_computing,
    prompt_attention_seconds,
    prompt_pairs,
)
from tiered.plan.gpu import on_gpu
from tiered.plan.hardware import GpuRates
from tiered.plan.inputs import Machine, ModelShape
from tiered.plan.load import PassRun
from tiered.plan.plan import Plan


class RunCosts:
    """Seconds of computing by plans like `plan`: with the same devices and micro-batches. Rates must be known."""

    def __init__(self, plan: Plan, model: ModelShape, machine: Machine, gpu: GpuRates | None) -> None:
        self._model, self._machine, self._most_rows = model, machine, plan.micro_batch_rows
        self._prompts = self._rest = machine
        if gpu is not None and plan.device is not None:
            there = on_gpu(machine, model, plan.cache, gpu)
            self._prompts = there if plan.prefill_device == "gpu" else machine
            self._rest = there if plan.decode_device == "gpu" else machine
        self._attends_elsewhere = plan.prefill_device == "gpu" and not plan.cache.on_device
        self._known: dict[tuple[object, ...], Computing] = {}
        self._pairs = lru_cache(maxsize=None)(lambda prompt: prompt_pairs(model, prompt))

    def computing(self, run: PassRun) -> Computing:
        """Of each pass of `run`."""
        key = (run.rows, run.before, run.times, run.parts, run.logits)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._linear(run) + Computing(self._attention_seconds(run))
        return found

    def slowest(self, run: PassRun) -> Machine:
        """Of what computes in each pass that from which readers take most."""
        prompts, rest = self._prompts, self._rest
        if prompts is rest or not run.rows:
            return prompts
        return max(rest, prompts, key=lambda machine: machine.reading_seconds) if run.parts else rest

    def _linear(self, run: PassRun) -> Computing:
        """Of each pass. Where its prompts are computed elsewhere than the rest, one after the other."""
        logits, rows = -(-run.logits // run.times), self._most_rows
        prompts, rest = self._prompts, self._rest
        if prompts is rest:
            return linear_computing(self._model, rest, run.rows + run.prompt_tokens, logits, rows)
        of_rest = min(run.rows, logits)
        found = linear_computing(self._model, prompts, run.prompt_tokens, logits - of_rest, rows)
        return found + linear_computing(self._model, rest, run.rows, of_rest, rows)

    def _attention_seconds(self, run: PassRun) -> float:
        """Seconds of each pass. A device that has no KV cache attends to prompts in the pass in which they begin."""
        seconds = decode_attention_seconds(self._model, self._rest, run.rows, run.context) if run.rows else 0.0
        pairs = self._run_pairs(run)
        here = pairs
        if self._attends_elsewhere:
            here = sum(self._pairs(len(part)) for part in run.parts if not part.start) / run.times
        seconds += prompt_attention_seconds(self._model, self._prompts, here)
        return seconds + prompt_attention_seconds(self._model, self._machine, pairs - here)

    def _run_pairs(self, run: PassRun) -> float:
        """Pairs of a query and a key that it sees, of the prompts in each pass of `run`, summed over layers."""
        ends = ((part.start, part.start + run.times * len(part)) for part in run.parts)
        return sum(self._pairs(stop) - self._pairs(start) for start, stop in ends) / run.times
