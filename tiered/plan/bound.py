"""What a job takes at least by one way to run, whatever its plan would be: found without making one.

In: a way, what is run, rates. Out: seconds that no prediction of a plan of that way goes below. Plans of large models
take tens of milliseconds to make, so `choose.py` makes none of a way that takes longer at least than another one takes.

    seconds >= max(disk, bus, computing)        each summed over all passes, of which there are enough for all tokens

Sums are of what any pass must do: weights that memory cannot hold are read again, a row computes no quicker than in
the best company. How long one waits for the other is left out.
"""

from dataclasses import dataclass
from functools import cached_property

from tiered.plan.cost import (
    kv_block_nbytes,
    kv_written_nbytes,
    least_row_seconds,
    least_token_seconds,
    prompt_attention_seconds,
    prompt_pairs,
    seen_tokens,
)
from tiered.plan.gpu import on_gpu
from tiered.plan.hardware import GpuRates
from tiered.plan.inputs import Machine, ModelShape, Workload
from tiered.plan.kv import CachePlan
from tiered.plan.plan import Plan
from tiered.plan.way import Way, expected_bus_nbytes


def least_seconds(way: Way, workload: Workload, gpu: GpuRates | None) -> float:
    """Seconds that `workload` is predicted to take at least. Rates must be known."""
    bound = _Bound(way, workload, gpu)
    return 0.999 * max(bound.disk_seconds, bound.bus_seconds, bound.compute_seconds)


def least_share(plan: Plan, way: Way, gpu: GpuRates | None) -> float:
    """Of the seconds of `plan`, the share that `way` takes at least, which differs in the bits of the KV cache alone,
    and has fewer; 0 where that cannot be told.

    A pass saves no more than the bytes by which the cache is smaller, and those that had been left, of what is read and
    copied in it at all; of computing it saves no larger share than attention does, if fewer bits attend faster. Where
    latency counts that cannot be told of them, as what computes faster has room for more prompt tokens in each pass.
    """
    machine, less, more, device = way.asked.machine, way.cache(plan.budget), plan.cache, plan.device
    rate = machine.disk_bytes_per_second
    if rate is None or not _is_as_asked(plan, way):
        return 0.0
    rates, smaller = (rate, machine.expert_bytes_per_second or rate), more.blocks_nbytes - less.blocks_nbytes
    each, saved = plan.read_nbytes / max(rates), 0.0
    if each or more.on_disk or plan.reads(way.asked.model.experts):
        # With all in memory there is no ring.
        room = plan.placement.ring_nbytes + plan.budget - plan.nbytes
        saved = (smaller + max(0, more.memory_nbytes - less.memory_nbytes) + room) / min(rates)
    if device is not None and gpu is not None:
        if plan.bus_nbytes:
            room = device.placement.ring_nbytes + device.vram - device.nbytes
            saved = max(saved, (smaller + room) / gpu.host_to_device)
        saved = max(saved, smaller / gpu.memory if plan.cache.on_device else 0.0)
        copied = plan.bus_nbytes + expected_bus_nbytes(way.asked.model, plan, 1)
        each = max(each, copied / gpu.host_to_device if plan.decode_device == "gpu" else 0.0)
    share = max(0.0, 1 - saved / each) if each else float(not saved)
    attended = 1.0 if more.on_device else _attended_share(machine, more.bits, less.bits)
    if attended < 1 and device is None and plan.objective == "latency":
        return 0.0
    return min(share, attended)


def _attended_share(machine: Machine, more: int, less: int) -> float:
    """Of the seconds in which decoding attends over a KV cache of `more` bits, what `less` take, 1 at most."""
    before, after = (machine.keeping(bits).attention_seconds or 0.0 for bits in (more, less))
    return min(1.0, after / before) if before else 1.0


def _is_as_asked(plan: Plan, way: Way) -> bool:
    """Whether memory was no reason for more passes than were asked for, or for waiting."""
    device, tokens = plan.device, way.tokens
    if plan.max_batched_tokens != tokens or (device is not None and device.waiting is not None):
        return False
    return not (plan.reads_in_turns or plan.copies_in_turns)


@dataclass(frozen=True)
class _Bound:
    way: Way
    workload: Workload
    gpu: GpuRates | None

    @cached_property
    def _model(self) -> ModelShape:
        return self.way.asked.model

    @cached_property
    def _cache(self) -> CachePlan:
        return self.way.cache(self.way.asked.budgets.ram)

    @cached_property
    def _prompt(self) -> int:
        """Tokens of each prompt."""
        return min(max(1, round(self.workload.mean_prompt)), self._context)

    @cached_property
    def _context(self) -> int:
        return max(1, round(self.way.context * self.workload.mean_context / self.workload.max_context))

    @cached_property
    def _tokens(self) -> int:
        """Of all prompts."""
        return self.workload.sequences * self._prompt

    @cached_property
    def _decoded(self) -> int:
        """Rows of sequences that decode, of all passes together."""
        generated = 0 if self.workload.one_pass else self._context - self._prompt
        return self.workload.sequences * max(0, generated - 1)

    @cached_property
    def _prompt_passes(self) -> int:
        return -(-self._tokens // self.way.tokens)

    @cached_property
    def _passes(self) -> float:
        """All of them; nothing decodes in the first one."""
        return max(self._prompt_passes, 1 + self._decoded / self.way.batch_size)

    def _chosen(self, rows: int) -> float:
        """Experts of all layers that each of so many rows asks for at least, as it shares them with the others."""
        experts = self._model.experts
        return 0.0 if experts is None else experts.layers * experts.distinct(rows) / rows

    @cached_property
    def _chosen_by_prompts(self) -> float:
        """Experts that all tokens of prompts ask for at least, in passes that are full."""
        return self._tokens * self._chosen(self.way.tokens)

    @cached_property
    def _chosen_by_all(self) -> float:
        """Experts that all passes ask for at least."""
        decoding = self._decoded * self._chosen(self.way.batch_size)
        return max(decoding, self._chosen_by_prompts + self._decoded * self._chosen(self.way.tokens))

    @property
    def disk_seconds(self) -> float:
        asked, machine, cache = self.way.asked, self.way.asked.machine, self._cache
        budgets, tape, experts = asked.budgets, self._model.tape, self._model.experts
        rate = machine.disk_bytes_per_second
        assert rate is not None
        room = budgets.ram - budgets.baseline - self._model.tables_nbytes
        room -= 0 if cache.on_device else cache.memory_nbytes
        room += 0 if budgets.is_hybrid else budgets.vram
        room = max(0, room)
        nbytes = tape.file_total + (self._passes - 1) * max(0.0, tape.file_total - room * tape.most_packed)
        if experts is not None:
            # A byte of a dense unit saves itself in every pass, one of an expert's less.
            dense = experts.dense
            missing = max(0.0, 1 - max(0, room - dense.total) / (experts.total * experts.nbytes))
            again = (self._passes - 1) * max(0.0, dense.file_total - room * dense.most_packed)
            chosen = self._chosen_by_all * missing * experts.file_nbytes
            nbytes = min(nbytes, dense.file_total + again + chosen)
        fastest = max(rate, machine.expert_bytes_per_second or 0.0)
        seconds = nbytes / fastest
        if cache.on_disk:
            seconds += self._decoded * kv_block_nbytes(cache, self._prompt) / rate
            written = kv_written_nbytes(cache, self._tokens + self._decoded)
            seconds += written / (machine.disk_write_bytes_per_second or rate)
        return seconds

    @property
    def bus_seconds(self) -> float:
        budgets, tape, experts = self.way.asked.budgets, self._model.tape, self._model.experts
        if self.gpu is None or not budgets.has_device:
            return 0.0
        passes = self._prompt_passes if budgets.is_hybrid else self._passes
        vram = 0 if budgets.is_hybrid else budgets.vram
        nbytes = tape.total + (passes - 1) * max(0, tape.total - vram)
        if experts is not None:
            dense = experts.dense.total
            chosen = self._chosen_by_prompts if budgets.is_hybrid else self._chosen_by_all
            nbytes = min(nbytes, dense + (passes - 1) * max(0, dense - vram) + chosen * experts.nbytes)
        return nbytes / self.gpu.host_to_device

    @property
    def compute_seconds(self) -> float:
        budgets, machine = self.way.asked.budgets, self.way.asked.machine.keeping(self._cache.bits)
        prompts = rest = machine
        if self.gpu is not None and budgets.has_device:
            there = on_gpu(machine, self._model, self._cache, self.gpu)
            prompts, rest = (there if each == "gpu" else machine for each in budgets.computes)
        decoding, reading = self._decode_seconds(rest), self._tokens * least_token_seconds(self._model, prompts)
        pairs = self.workload.sequences * prompt_pairs(self._model, self._prompt)
        seen = prompt_attention_seconds(self._model, prompts, pairs)
        # Of pages that are quantized and those that are not yet, whichever takes less.
        rates = [each for each in (rest.attention_seconds, rest.recent_attention_seconds) if each is not None]
        attended = min(rates, default=0.0) * seen_tokens(self._model, self._prompt) * self._decoded
        if prompts is rest:
            # They may share passes, and be the quicker for it.
            together = reading + self._decoded * least_token_seconds(self._model, rest)
            seconds = max(decoding, together) + seen + attended
        else:
            # Both may go on at once.
            seconds = max(decoding + attended, reading + seen)
        return seconds + self._passes * self._model.operations * machine.operation_seconds

    def _decode_seconds(self, machine: Machine) -> float:
        """Of products of all rows that decode, in passes of a batch at most."""
        model, batch, rate = self._model, self.way.batch_size, machine.linear
        assert rate is not None
        dense, head = self._dense_weights, model.head_weights
        each = least_row_seconds(rate, dense, batch) + least_row_seconds(rate, head, batch)
        if model.experts is not None:
            weights = model.experts.weights
            least = min(rate.seconds(rows, weights) for rows in rate.rows)
            of_all = least_token_seconds(model, machine) - least_row_seconds(rate, dense)
            each += max(self._chosen(batch) * least, of_all)
        return self._decoded * each

    @property
    def _dense_weights(self) -> int:
        experts = self._model.experts
        dense = self._model.weights - self._model.head_weights
        return dense if experts is None else dense - experts.total * experts.weights
