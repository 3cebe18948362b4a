"""The reports of a run: what it took, beside what the machine could have done.

    bound of a decode pass = max((S - M + K + X) / B, C - C_x + max(X / B, C_x))
    bound of a scoring     = max((S + (passes - 1) * (S - M) + K + X) / B, C - C_x + max(X / B, C_x)), and of a prefill

S: bytes of the tape. K: bytes of the KV cache written to disk and read from it. M: all that the budget leaves after
baseline, KV cache, workspace, cache of experts and two units, used or not, or what --resident-cpu and --resident-gpu
name. B: raw disk bandwidth, measured after the run by separate code. C: compute seconds, measured. Of a scoring K and C
are those of all passes together: nothing is resident before the first one, which reads everything, and reading goes on
across passes, so only the sums can be compared.

X and C_x are 0 where layers are read whole. Else X is the bytes of experts that were read when they were chosen, those
that this run's cache lacked, and C_x the seconds of computing experts. No expert can be read before the router of its
layer has chosen it, so while experts are read nothing computes but experts.

Where a device computes, a pass takes at least what copies to it take, too: D / P, with D the bytes of weights that do
not fit into its memory beside two units, and P the raw bandwidth of pinned copies, measured by separate code.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from tiered.generate.costs import Generation, PassTotals
from tiered.generate.figures import DeviceFigures, ExpertFigures, Figures
from tiered.generate.score import Scoring
from tiered.plan import Plan, pass_seconds
from tiered.plan.predict import Prediction
from tiered.stream import ExpertUse
from tiered.units import format_seconds

SYNTHETIC = "synthetic weights: a benchmark, not a language model"


@dataclass(frozen=True)
class Surroundings:
    """What a report needs to know besides the run's own costs."""

    plan: Plan
    streamed_file_bytes: int
    """Of the tape's bytes on disk, those of units that are not resident."""
    figures: Figures
    experts: int = 0
    """Experts of all layers."""

    def figures_of(self, cost: PassTotals, tokens: int) -> Figures:
        """The figures, with those of the experts and of the device in the passes of `cost`, which gave `tokens`
        tokens."""
        return replace(self.figures, experts=self._experts_of(cost, tokens), device=self._device_of(cost))

    def _device_of(self, cost: PassTotals) -> DeviceFigures | None:
        device = self.figures.device
        if device is None:
            return None
        return replace(
            device,
            bytes_copied_per_pass=(cost.bus_bytes + cost.waiting_bytes) / max(cost.passes, 1),
            waiting_bytes_per_pass=cost.waiting_bytes / max(cost.passes, 1),
            bus_bandwidth=(cost.bus_bytes + cost.waiting_bytes) / cost.seconds if cost.seconds else None,
            compute_wait_seconds=cost.bus_wait_seconds,
        )

    def _experts_of(self, cost: PassTotals, tokens: int) -> ExpertFigures | None:
        if self.plan.experts is None:
            return None
        use, passes = cost.experts, max(cost.passes, 1)
        chosen, dense = use.hits + use.misses, cost.bytes_read - use.nbytes
        return ExpertFigures(
            held=self.plan.experts.slots,
            total=self.experts,
            hits=use.hits,
            misses=use.misses,
            hit_rate=use.hits / chosen if chosen else None,
            bytes_per_pass=use.nbytes / passes,
            dense_bytes_per_pass=dense / passes,
            bytes_per_token=use.nbytes / tokens if tokens else None,
            dense_bytes_per_token=dense / tokens if tokens else None,
            compute_seconds_per_pass=use.compute_seconds / passes,
        )

    @property
    def again_nbytes(self) -> int:
        """S - M: bytes of files that a pass must read when as much as possible is resident.

        Compressed units count with their bytes on disk, which are fewer than in memory.
        """
        share = 1 - self.plan.bound_resident_nbytes / self.plan.tape.total
        return round(share * self.figures.tape_bytes)

    def bus_seconds(self, cost: PassTotals) -> float:
        """The least seconds in which what the device's memory does not hold, weights and hidden states that wait, can
        be copied in the passes of `cost`; 0 where nothing was copied, or P is not known."""
        rate = None if self.figures.device is None else self.figures.device.raw_bus_bandwidth
        if not rate:
            return 0.0
        # Of chosen experts the run's own; and what came before the passes began is no part of them.
        again = (self.plan.tape.total - self.plan.bound_device_nbytes) * cost.passes
        weights = cost.bus_bytes if self.plan.experts is not None else min(again, cost.bus_bytes)
        return (weights + cost.waiting_bytes) / rate


Bottleneck = Literal["disk", "bus", "compute", "memory"]
"""What bounds a run; "memory": everything is resident."""


def _bound(
    nbytes: float, experts: ExpertUse, compute_seconds: float, rate: float, bus_seconds: float = 0.0
) -> tuple[float, Bottleneck]:
    """The least seconds in which `nbytes` are read ahead, `experts` when they are chosen, all is computed, and what
    takes `bus_seconds` is copied to a device; and what keeps it from being less."""
    disk = (nbytes + experts.nbytes) / rate
    seconds = pass_seconds(disk, compute_seconds, experts.nbytes / rate, experts.compute_seconds)
    if bus_seconds > seconds:
        return bus_seconds, "bus"
    return seconds, "compute" if compute_seconds > disk else "disk"


def _bound_from_nothing(cost: PassTotals, around: "Surroundings", kv_nbytes: int) -> tuple[float, Bottleneck] | None:
    """`_bound` of all passes of `cost`, the first of which finds nothing in memory; None where B is not known."""
    figures = around.figures
    if not figures.raw_disk_bandwidth or not cost.passes:
        return None
    nbytes = figures.tape_bytes + (cost.passes - 1) * around.again_nbytes + kv_nbytes
    rate, bus_seconds = figures.raw_disk_bandwidth, around.bus_seconds(cost)
    return _bound(nbytes, cost.experts, cost.compute_seconds, rate, bus_seconds)


@dataclass(frozen=True, kw_only=True)
class Report(Figures):
    """The report of a generation."""

    prompt_tokens: int
    generated_tokens: int
    first_token_seconds: float
    prefill_seconds: float
    prefill_tokens_per_second: float
    prefill_compute_seconds: float
    prefill_bound_seconds: float | None
    """Of passes with prompt tokens. The first one finds nothing in memory, so it reads all weights."""
    prefill_bound_share: float | None
    decode_seconds: float
    tokens_per_second: float | None
    seconds_per_pass: float | None
    compute_seconds_per_pass: float | None
    passes: int
    bytes_read_per_token: float
    disk_bandwidth: float | None
    """While decoding: weights and KV cache, reads and writes."""
    bound_seconds_per_pass: float | None
    bound_share: float | None
    bottleneck: Bottleneck | None
    """None where no decode pass ran."""
    compute_wait_seconds: float
    """How long computing waited for the disk in the decode passes."""
    block_overhead_seconds: float
    """Median wall time per block beyond computing and waiting for reads, of the last passes."""
    predicted_prefill_seconds: float | None = None
    """By the rates that the plan was made by, before the run; None where they were not known."""
    predicted_seconds_per_pass: float | None = None
    """Of decode passes."""

    def lines(self) -> list[str]:
        """The report as people read it."""
        lines = [SYNTHETIC] if self.synthetic else []
        lines.append(
            f"prefill   {self.prompt_tokens} tokens in {format_seconds(self.prefill_seconds)}, "
            f"first token after {format_seconds(self.first_token_seconds)}"
        )
        if self.tokens_per_second is not None and self.seconds_per_pass is not None:
            lines.append(
                f"decode    {self.tokens_per_second:.3g} tokens/s, {format_seconds(self.seconds_per_pass)} per pass "
                f"({self.passes} passes, compute {format_seconds(self.compute_seconds_per_pass or 0)} of each)"
            )
        lines += self.disk_lines(
            "decoding",
            self.disk_bandwidth,
            f" ({self.bytes_read_per_token / 1e9:.3g} GB per token)",
            "every written byte wears an SSD; its data sheet says how many it stands (TBW)",
        )
        if self.bound_share is not None and self.bound_seconds_per_pass is not None:
            what = {
                "disk": "disk-bound",
                "bus": "bound by copies to the GPU",
                "compute": "compute-bound" + (": no evidence for the disk" if self._has_read else ""),
                "memory": "all weights in memory: compute-bound",
            }[self.bottleneck or "disk"]
            lines.append(
                f"bound     {format_seconds(self.bound_seconds_per_pass)} per pass {self.possible}, "
                f"{self.bound_share:.0%} of it reached ({what})"
            )
        if self.predicted_prefill_seconds is not None:
            said = f"predicted prefill {format_seconds(self.predicted_prefill_seconds)}"
            if self.predicted_seconds_per_pass is not None:
                said += f", {format_seconds(self.predicted_seconds_per_pass)} per pass"
            lines.append(f"{said}, by this machine's rates")
        if self.bottleneck in ("disk", "bus", "compute"):
            lines.append(f"waits     while decoding, {self.waits(self.compute_wait_seconds, self._has_read)}")
        return lines + self.machine_lines()

    @property
    def _has_read(self) -> bool:
        """Whether decoding reads weights or KV cache: then the raw disk has been measured."""
        return bool(self.raw_disk_bandwidth) or self.bottleneck == "disk"


def make_report(generation: Generation, around: Surroundings, predicted: Prediction | None = None) -> Report:
    """Put the figures of one run together, beside what was `predicted` of it."""
    decode, prefill = generation.decode, generation.prefill
    if around.plan.decode_device == "cpu":
        # What is copied while the processor decodes is for the next prompt.
        decode = replace(decode, bus_bytes=0, waiting_bytes=0, bus_wait_seconds=0.0)
    figures = around.figures_of(decode, decode.new_tokens)
    per_pass = decode.seconds / decode.passes if decode.passes else None
    compute = decode.compute_seconds / decode.passes if decode.passes else None
    bound: float | None = None
    bottleneck: Bottleneck | None = None
    if compute is not None:
        # What the ring held when decoding began has been read before, and what it would hold at the end is not read
        # any more: the bound is that much lower, or few passes would seem to beat it.
        streamed = round(around.again_nbytes * _share_read(generation, around)) * decode.passes + decode.kv_bytes
        reads, bus_seconds = streamed + decode.experts.nbytes > 0, around.bus_seconds(decode)
        if not reads and not bus_seconds:
            bound, bottleneck = compute, "memory"
        elif not reads or figures.raw_disk_bandwidth:
            rate = figures.raw_disk_bandwidth or math.inf
            seconds, bottleneck = _bound(streamed, decode.experts, decode.compute_seconds, rate, bus_seconds)
            bound = seconds / decode.passes
    first = _bound_from_nothing(prefill, around, prefill.kv_bytes)
    tokens = generation.generated_tokens
    moved = decode.bytes_read + decode.kv_bytes
    overheads = sorted(s for cost in generation.recent for s in cost.pass_.block_seconds)
    return Report(
        **vars(figures),
        prompt_tokens=generation.prompt_tokens,
        generated_tokens=tokens,
        first_token_seconds=generation.first_token_seconds,
        prefill_seconds=prefill.pass_seconds,
        prefill_tokens_per_second=generation.prompt_tokens / prefill.pass_seconds if prefill.pass_seconds else 0.0,
        prefill_compute_seconds=prefill.compute_seconds,
        prefill_bound_seconds=None if first is None else first[0],
        prefill_bound_share=None if first is None else first[0] / prefill.pass_seconds,
        decode_seconds=decode.seconds,
        tokens_per_second=decode.new_tokens / decode.seconds if decode.seconds else None,
        seconds_per_pass=per_pass,
        compute_seconds_per_pass=compute,
        passes=generation.passes,
        bytes_read_per_token=figures.bytes_read / max(tokens, 1),
        disk_bandwidth=moved / decode.seconds if decode.seconds else None,
        bound_seconds_per_pass=bound,
        bound_share=bound / per_pass if bound is not None and per_pass else None,
        bottleneck=bottleneck,
        compute_wait_seconds=decode.wait_seconds,
        block_overhead_seconds=overheads[len(overheads) // 2] if overheads else 0.0,
        predicted_prefill_seconds=None if predicted is None else predicted.prefill.seconds,
        predicted_seconds_per_pass=None if predicted is None else predicted.seconds_per_pass,
    )


def _share_read(generation: Generation, around: Surroundings) -> float:
    """The share of the bytes streamed by the decode passes that were read while they ran."""
    due = generation.decode.passes * around.streamed_file_bytes
    read = generation.decode.bytes_read - generation.decode.experts.nbytes
    return min(1.0, read / due) if due else 1.0


@dataclass(frozen=True, kw_only=True)
class ScoreReport(Figures):
    """The report of a scoring."""

    scored_tokens: int
    input_tokens: int
    """Tokens computed; more than scored where windows overlap."""
    windows: int
    passes: int
    seconds: float
    seconds_per_pass: float
    compute_seconds_per_pass: float
    tokens_per_second: float
    """Scored tokens only."""
    disk_bandwidth: float
    """While scoring: weights and KV cache, reads and writes."""
    bound_seconds: float | None
    bound_share: float | None
    bottleneck: Bottleneck
    compute_wait_seconds: float
    predicted_seconds: float | None = None
    """Of all passes, by the rates that the plan was made by, before the run; None where they were not known."""
    predicted_seconds_per_pass: float | None = None

    def lines(self) -> list[str]:
        """The report as people read it."""
        lines = [SYNTHETIC] if self.synthetic else []
        again = self.input_tokens - self.scored_tokens
        overlap = f", {again} more computed as context" if again > self.windows else ""
        lines.append(
            f"score     {self.scored_tokens} tokens in {format_seconds(self.seconds)}, "
            f"{self.tokens_per_second:.3g} tokens/s{overlap}"
        )
        lines.append(
            f"passes    {self.passes} with {self.windows} windows, {format_seconds(self.seconds_per_pass)} per pass "
            f"(compute {format_seconds(self.compute_seconds_per_pass)} of each)"
        )
        lines += self.disk_lines("scoring", self.disk_bandwidth, "", "a smaller --batch or --context may fit in memory")
        if self.bound_seconds is not None and self.bound_share is not None:
            bounds = {"disk": "disk-bound", "bus": "bound by copies to the GPU"}
            what = bounds.get(self.bottleneck, "compute-bound: no evidence for the disk")
            lines.append(
                f"bound     {format_seconds(self.bound_seconds)} {self.possible}, {self.bound_share:.0%} of it reached "
                f"({what})"
            )
        if self.predicted_seconds is not None and self.predicted_seconds_per_pass is not None:
            lines.append(
                f"predicted {format_seconds(self.predicted_seconds)}, "
                f"{format_seconds(self.predicted_seconds_per_pass)} per pass, by this machine's rates"
            )
        if self.bottleneck != "memory":
            has_read = bool(self.raw_disk_bandwidth) or self.bottleneck == "disk"
            lines.append(f"waits     {self.waits(self.compute_wait_seconds, has_read)}")
        return lines + self.machine_lines()


def _without_loading(cost: PassTotals, plan: Plan) -> PassTotals:
    """`cost` without the copies of what stays on the device, which are made once and in no pass."""
    loaded = 0 if plan.device is None else plan.device.placement.resident_nbytes
    return replace(cost, bus_bytes=max(0, cost.bus_bytes - loaded))


def make_score_report(scoring: Scoring, around: Surroundings, predicted: Prediction | None = None) -> ScoreReport:
    """Put the figures of one run together, beside what was `predicted` of it; it has at least one pass."""
    expected = None if predicted is None else predicted.prefill
    cost, again = _without_loading(scoring.costs.prefill, around.plan), around.again_nbytes
    figures = around.figures_of(cost, scoring.total.tokens)
    kv = figures.kv_bytes_read + figures.kv_bytes_written
    bound: float | None = None
    reads, copies = bool(again or kv or cost.experts.nbytes), around.bus_seconds(cost) > 0
    bottleneck: Bottleneck = "disk" if reads else "bus" if copies else "memory"
    if (reads or copies) and (found := _bound_from_nothing(cost, around, kv)) is not None:
        bound, bottleneck = found
    return ScoreReport(
        **vars(figures),
        scored_tokens=scoring.total.tokens,
        input_tokens=scoring.costs.prompt_tokens,
        windows=scoring.costs.sequences,
        passes=cost.passes,
        seconds=cost.seconds,
        seconds_per_pass=cost.pass_seconds / cost.passes,
        compute_seconds_per_pass=cost.compute_seconds / cost.passes,
        tokens_per_second=scoring.total.tokens / cost.seconds,
        disk_bandwidth=(cost.bytes_read + kv) / cost.seconds,
        bound_seconds=bound,
        bound_share=bound / cost.seconds if bound is not None else None,
        bottleneck=bottleneck,
        compute_wait_seconds=cost.wait_seconds,
        predicted_seconds=None if expected is None else expected.seconds,
        predicted_seconds_per_pass=None if expected is None else expected.seconds / expected.passes,
    )
