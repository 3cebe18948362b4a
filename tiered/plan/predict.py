"""What a run is going to take, by a closed form: the seconds of its passes, its bytes, its memory.

In: a plan and what it was made from. Out: a `Prediction`, pure numbers. `strategies.py` compares plans by it, and
`generate` prints it beside what was measured.

Sequences are taken to be equally long and to run in waves of the plan's batch size: a wave's prompts share passes, then
its sequences decode together. A pass takes the longer of reading and computing; the first one of all reads every
weight. Experts are taken to be chosen equally often, so a real router reads less of them.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any, Literal

from tiered.errors import ConfigError
from tiered.plan.cost import (
    Computing,
    decode_computing,
    kv_block_nbytes,
    kv_written_nbytes,
    linear_computing,
    pass_seconds,
    prompt_attention_seconds,
    prompt_pairs,
)
from tiered.plan.inputs import Machine, ModelShape, Workload
from tiered.plan.plan import Plan
from tiered.plan.way import expected_expert_nbytes

Bottleneck = Literal["disk", "bus", "compute", "memory"]
"""What most of the time goes by; "bus": to a GPU; "memory": nothing is read from disk any more, so computing bounds."""


@dataclass(frozen=True)
class Phase:
    """Passes of one kind, and what they take together."""

    passes: int = 0
    seconds: float = 0.0
    disk_seconds: float = 0.0
    """Of reading and writing, whether or not something computes meanwhile."""
    compute_seconds: float = 0.0
    read_nbytes: float = 0.0
    written_nbytes: float = 0.0
    bus_seconds: float = 0.0
    """Of copying to a GPU and back."""

    def __add__(self, other: "Phase") -> "Phase":
        return Phase(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: int) -> "Phase":
        return Phase(self.passes * times, *(times * value for value in [*vars(self).values()][1:]))

    @property
    def bottleneck(self) -> Bottleneck:
        """What takes longest."""
        if self.bus_seconds > max(self.disk_seconds, self.compute_seconds):
            return "bus"
        if not self.disk_seconds:
            return "memory"
        return "disk" if self.disk_seconds >= self.compute_seconds else "compute"


@dataclass(frozen=True)
class Prediction:
    """What a whole request, or job, is expected to take."""

    prompt_tokens: int
    generated_tokens: int
    prefill: Phase
    decode: Phase
    memory: dict[str, int]
    """Bytes by what takes them."""
    sequences: int = 1

    @property
    def seconds(self) -> float:
        return self.prefill.seconds + self.decode.seconds

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over all seconds, those of the prompts among them, as FlexGen counts."""
        return self.generated_tokens / self.seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Without the prompts' seconds, and without each sequence's first token, which they give; None where no pass
        only decodes."""
        return (self.generated_tokens - self.sequences) / self.decode.seconds if self.decode.seconds else None

    @property
    def seconds_per_pass(self) -> float | None:
        """Of passes that only decode; None where there are none."""
        return self.decode.seconds / self.decode.passes if self.decode.passes else None

    @property
    def bottleneck(self) -> Bottleneck:
        """That of the phase that takes longer."""
        return max(self.prefill, self.decode, key=lambda phase: phase.seconds).bottleneck

    @property
    def read_nbytes(self) -> float:
        return self.prefill.read_nbytes + self.decode.read_nbytes

    @property
    def written_nbytes(self) -> float:
        return self.prefill.written_nbytes + self.decode.written_nbytes

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; seconds and bytes."""
        return asdict(self) | {
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "bottleneck": self.bottleneck,
            "bytes_read": self.read_nbytes,
            "bytes_written": self.written_nbytes,
        }


def predict(plan: Plan, model: ModelShape, machine: Machine, workload: Workload) -> Prediction:
    """What `plan` is expected to take on `machine`, whose rates must be known: raises ConfigError where one is not."""
    run = _Run(plan, model, machine, workload)
    if machine.linear is None or machine.disk_bytes_per_second is None:
        raise ConfigError("no prediction without the machine's rates; run 'tiered profile'")
    count = workload.sequences
    prefill, decode = in_waves(count, plan.batch_size, run.prefill, run.decode)
    memory = memory_by_kind(plan)
    return Prediction(count * run.prompt, count * run.generated, prefill, decode, memory, count)


def in_waves(
    sequences: int, batch_size: int, prefill: Callable[[int, bool], Phase], decode: Callable[[int], Phase]
) -> tuple[Phase, Phase]:
    """Prefill and decoding of `sequences` in waves of `batch_size`, by what these take for a number of them; `prefill`
    is told, too, whether it is that of the first wave, which finds nothing in memory."""
    full, rest = divmod(sequences, batch_size)
    first = min(sequences, batch_size)
    prompts, rounds = prefill(first, True), decode(first)
    if full > 1:
        prompts, rounds = prompts + prefill(first, False) * (full - 1), rounds * full
    if full and rest:
        prompts, rounds = prompts + prefill(rest, False), rounds + decode(rest)
    return prompts, rounds


def memory_by_kind(plan: Plan) -> dict[str, int]:
    """Bytes of the budget by what takes them."""
    needs = plan.needs
    return {
        "process": needs.baseline,
        "tables": needs.outer,
        "kv_cache": needs.kv,
        "workspace": needs.workspace,
        "resident": plan.placement.resident_nbytes,
        "ring": plan.placement.ring_nbytes,
        "experts": 0 if plan.experts is None else plan.experts.nbytes,
    }


@dataclass(frozen=True)
class _Run:
    plan: Plan
    model: ModelShape
    machine: Machine
    workload: Workload

    @property
    def prompt(self) -> int:
        """Tokens of a prompt, on average."""
        return max(1, round((self.workload.max_prompt or self.workload.max_context) * self._share))

    @property
    def generated(self) -> int:
        """Tokens that a sequence generates, on average."""
        whole = self.workload.max_context - (self.workload.max_prompt or self.workload.max_context)
        return round(whole * self._share)

    @property
    def _share(self) -> float:
        return self.workload.mean_context / self.workload.max_context

    def prefill(self, count: int, is_first: bool) -> Phase:
        """The passes that read the prompts of `count` sequences."""
        total, most, prompt = count * self.prompt, self.plan.max_batched_tokens, self.prompt
        passes = -(-total // most)
        sizes = [min(most, total - number * most) for number in range(passes)]
        attention = self._attention_seconds(count)
        on_disk = self.plan.cache.on_disk
        # Passes that begin within a prompt read what the passes before them have written of it.
        if prompt > most:
            begun = [(start, count) for start in range(0, prompt, most)]
        else:
            begun = [(number * most % prompt, 1) for number in range(passes)]
        read = sum(kv_block_nbytes(self.plan.cache, *each) for each in begun) / passes if on_disk else 0.0
        written = kv_written_nbytes(self.plan.cache, total) / passes if on_disk else 0.0
        phases = []
        for number, tokens in enumerate(sizes):
            logits = tokens if self.workload.all_logits else -(-count // passes)
            computing = linear_computing(self.model, self.machine, tokens, logits, self.plan.micro_batch_rows)
            computing += Computing(attention * tokens / total)
            phases.append(self._pass(tokens, computing, read, written, is_first and not number))
        return reduce(add, phases)

    def decode(self, count: int) -> Phase:
        """The passes after the prompts: a token of each of `count` sequences in each."""
        passes = max(0, self.generated - 1)
        context = self.prompt + self.generated / 2
        computing = decode_computing(self.model, self.machine, count, context, self.plan.micro_batch_rows)
        on_disk = self.plan.cache.on_disk
        read = kv_block_nbytes(self.plan.cache, context, count) if on_disk else 0.0
        written = kv_written_nbytes(self.plan.cache, count) if on_disk else 0.0
        return self._pass(count, computing, read, written) * passes

    def _pass(self, tokens: int, computing: Computing, kv_read: float, written: float, is_first: bool = False) -> Phase:
        plan, machine = self.plan, self.machine
        experts: float = expected_expert_nbytes(self.model, plan, tokens)
        dense = plan.read_nbytes
        if is_first:
            dense = sum(plan.tape.file_nbytes)
            if plan.experts is not None and self.model.experts is not None:
                cold = self.model.experts.layers * self.model.experts.distinct(tokens)
                experts = max(experts, cold * self.model.experts.file_nbytes)
        rate = machine.disk_bytes_per_second
        assert rate is not None
        expert_seconds = experts / (machine.expert_bytes_per_second or rate)
        disk = (dense + kv_read) / rate + expert_seconds
        disk += written / (machine.disk_write_bytes_per_second or rate)
        if plan.missing_overlap_nbytes:
            seconds = disk + computing.seconds  # no room to read ahead: they take turns
        else:
            seconds = pass_seconds(disk, computing.seconds, expert_seconds, computing.expert_seconds)
        return Phase(1, seconds, disk, computing.seconds, dense + kv_read + experts, written)

    def _attention_seconds(self, count: int) -> float:
        """Seconds of the attention of `count` prompts."""
        pairs = count * prompt_pairs(self.model, self.prompt)
        flops = self.machine.prompt_attention_flops
        if flops is None:
            return pairs * (self.machine.attention_seconds or 0.0)
        return prompt_attention_seconds(self.model, pairs, flops)
