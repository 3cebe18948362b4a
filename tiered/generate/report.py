"""The reports of a run: what it took, beside what the machine could have done.

    bound of a decode pass = max((S - M + K + X) / B, C - C_x + max(X / B, C_x))
    bound of a scoring     = max((S + (passes - 1) * (S - M) + K + X) / B, C - C_x + max(X / B, C_x)), and of a prefill

S: bytes of the tape. K: bytes of the KV cache written to disk and read from it. M: all that the budget leaves after
baseline, KV cache, workspace, cache of experts and two units, used or not. B: raw disk bandwidth, measured after
the run by separate code. C: compute seconds, measured. Of a scoring K and C are those of all passes together: nothing
is resident before the first one, which reads everything, and reading goes on across passes, so only the sums can be
compared.

X and C_x are 0 where layers are read whole. Else X is the bytes of experts that were read when they were chosen, those
that this run's cache lacked, and C_x the seconds of computing experts. No expert can be read before the router of its
layer has chosen it, so while experts are read nothing computes but experts.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from tiered.generate.costs import Generation, PassTotals
from tiered.generate.score import Scoring
from tiered.plan import Plan, pass_seconds
from tiered.plan.predict import Prediction
from tiered.stream import ExpertUse
from tiered.units import format_rate, format_seconds, format_size

SYNTHETIC = "synthetic weights: a benchmark, not a language model"


@dataclass(frozen=True, kw_only=True)
class ExpertFigures:
    """What a report says of experts that are read when they are chosen, in the decode passes or in a scoring."""

    held: int
    """Experts that are in memory at most."""
    total: int
    """Experts of all layers."""
    hits: int
    """Experts that were in memory when a micro-batch chose them."""
    misses: int
    """Those that had to be read."""
    hit_rate: float | None
    bytes_per_pass: float
    dense_bytes_per_pass: float
    """Of what is read ahead, as it is the same for all tokens."""
    bytes_per_token: float | None
    """None where no token came of it."""
    dense_bytes_per_token: float | None
    compute_seconds_per_pass: float

    def lines(self) -> list[str]:
        rate = "" if self.hit_rate is None else f", where {self.hit_rate:.0%} of those chosen were"
        read = f"{format_size(round(self.bytes_per_pass))} of experts and "
        read += f"{format_size(round(self.dense_bytes_per_pass))} of dense weights per pass"
        if self.bytes_per_token is not None and self.dense_bytes_per_token is not None:
            read += f" ({self.bytes_per_token / 1e9:.3g} and {self.dense_bytes_per_token / 1e9:.3g} GB per token)"
        return [f"experts   {self.held} of {self.total} in memory{rate}", f"          read: {read}"]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What every report says. Bytes and seconds; bandwidths in bytes per second; None: nothing to measure."""

    bytes_read: int
    bytes_read_kernel: int | None
    bytes_written: int | None
    kv_bytes_read: int
    """Of a KV cache on disk."""
    kv_bytes_written: int
    kv_bits: int
    kv_on_disk: bool
    raw_disk_bandwidth: float | None
    """Sustained; the better of two measurements after the run."""
    raw_disk_best_look: float | None
    """The fastest of the short measurements that chose how to read."""
    disk_wait_seconds: float
    """How long the disk waited for computing, in the decode passes or in a scoring."""
    peak_rss_bytes: int
    ram_budget_bytes: int
    tape_bytes: int
    """S: bytes of all units of the tape, as they lie on disk; experts that are read when they are chosen are not on
    it."""
    resident_bytes: int
    missing_overlap_bytes: int
    """What the budget lacked to read one unit while the one before computes; 0 where it lacked nothing."""
    read_mode: str
    kernels: str
    """What computed: instruction set, mode and threads."""
    synthetic: bool
    experts: ExpertFigures | None = None
    """None where layers are read whole."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def machine_lines(self) -> list[str]:
        """The last lines of any report: what computed, in how much memory."""
        over = ", OVER BUDGET" if self.peak_rss_bytes > self.ram_budget_bytes else ""
        weights = "weights" if self.experts is None else "dense weights"
        lines = [
            f"kernels   {self.kernels}",
            f"memory    peak {format_size(self.peak_rss_bytes)} of {format_size(self.ram_budget_bytes)}{over}; "
            f"{format_size(self.resident_bytes)} of {format_size(self.tape_bytes)} {weights} resident",
        ]
        if self.missing_overlap_bytes:
            lines.append(
                "          no room to read ahead, so reading and computing took turns: "
                f"with {format_size(self.missing_overlap_bytes)} more they would overlap"
            )
        return lines

    def disk_lines(self, while_: str, bandwidth: float | None, per_token: str, kv_advice: str) -> list[str]:
        """Lines on bytes read and written, and on the bandwidth; `while_` names what was done meanwhile."""
        written = "written unknown" if self.bytes_written is None else f"{format_size(self.bytes_written)} written"
        lines = [f"disk      {format_size(self.bytes_read)} read{per_token}, {written}, {self.read_mode}"]
        if self.kv_bytes_read or self.kv_bytes_written:
            moved = f"{format_size(self.kv_bytes_read)} read, {format_size(self.kv_bytes_written)} written"
            lines.append(f"kv cache  {moved}: {kv_advice}")
        if bandwidth is not None and self.raw_disk_bandwidth:
            lines.append(
                f"          {format_rate(bandwidth)} while {while_}, {bandwidth / self.raw_disk_bandwidth:.0%} of the "
                f"{format_rate(self.raw_disk_bandwidth)} measured raw"
            )
        return lines if self.experts is None else lines + self.experts.lines()

    @property
    def possible(self) -> str:
        """What a bound takes as given, for people."""
        return "possible here" if self.experts is None else "possible here with these reads of experts"


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
        """The figures, with those of the experts in the passes of `cost`, which gave `tokens` tokens."""
        if self.plan.experts is None:
            return self.figures
        use, passes = cost.experts, max(cost.passes, 1)
        chosen, dense = use.hits + use.misses, cost.bytes_read - use.nbytes
        experts = ExpertFigures(
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
        return replace(self.figures, experts=experts)

    @property
    def again_nbytes(self) -> int:
        """S - M: bytes of files that a pass must read when as much as possible is resident.

        Compressed units count with their bytes on disk, which are fewer than in memory.
        """
        share = 1 - self.plan.bound_resident_nbytes / self.plan.tape.total
        return round(share * self.figures.tape_bytes)


Bottleneck = Literal["disk", "compute", "memory"]
"""What bounds a run; "memory": everything is resident."""


def _bound(nbytes: float, experts: ExpertUse, compute_seconds: float, rate: float) -> tuple[float, Bottleneck]:
    """The least seconds in which `nbytes` are read ahead, `experts` when they are chosen, and all is computed; and what
    keeps it from being less."""
    disk = (nbytes + experts.nbytes) / rate
    seconds = pass_seconds(disk, compute_seconds, experts.nbytes / rate, experts.compute_seconds)
    return seconds, "compute" if compute_seconds > disk else "disk"


def _bound_from_nothing(
    cost: PassTotals, figures: Figures, again_nbytes: int, kv_nbytes: int
) -> tuple[float, Bottleneck] | None:
    """`_bound` of all passes of `cost`, the first of which finds nothing in memory; None where B is not known."""
    if not figures.raw_disk_bandwidth or not cost.passes:
        return None
    nbytes = figures.tape_bytes + (cost.passes - 1) * again_nbytes + kv_nbytes
    return _bound(nbytes, cost.experts, cost.compute_seconds, figures.raw_disk_bandwidth)


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
    """By the machine's profile, before the run; None without one."""
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
                "compute": "compute-bound: no evidence for the disk",
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
            lines.append(f"{said}, by this machine's profile")
        if self.bottleneck in ("disk", "compute"):
            lines.append(
                f"waits     while decoding, compute waited {format_seconds(self.compute_wait_seconds)} for the disk, "
                f"the disk {format_seconds(self.disk_wait_seconds)} for compute"
            )
        return lines + self.machine_lines()


def make_report(generation: Generation, around: Surroundings, predicted: Prediction | None = None) -> Report:
    """Put the figures of one run together, beside what was `predicted` of it."""
    decode, prefill = generation.decode, generation.prefill
    figures = around.figures_of(decode, decode.new_tokens)
    per_pass = decode.seconds / decode.passes if decode.passes else None
    compute = decode.compute_seconds / decode.passes if decode.passes else None
    bound: float | None = None
    bottleneck: Bottleneck | None = None
    if compute is not None:
        # What the ring held when decoding began has been read before, and what it would hold at the end is not read
        # any more: the bound is that much lower, or few passes would seem to beat it.
        streamed = round(around.again_nbytes * _share_read(generation, around)) * decode.passes + decode.kv_bytes
        if streamed + decode.experts.nbytes == 0:
            bound, bottleneck = compute, "memory"
        elif figures.raw_disk_bandwidth:
            seconds, bottleneck = _bound(streamed, decode.experts, decode.compute_seconds, figures.raw_disk_bandwidth)
            bound = seconds / decode.passes
    first = _bound_from_nothing(prefill, figures, around.again_nbytes, prefill.kv_bytes)
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
    """Of all passes, by the machine's profile, before the run; None without one."""
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
            what = "disk-bound" if self.bottleneck == "disk" else "compute-bound: no evidence for the disk"
            lines.append(
                f"bound     {format_seconds(self.bound_seconds)} {self.possible}, {self.bound_share:.0%} of it reached "
                f"({what})"
            )
        if self.predicted_seconds is not None and self.predicted_seconds_per_pass is not None:
            lines.append(
                f"predicted {format_seconds(self.predicted_seconds)}, "
                f"{format_seconds(self.predicted_seconds_per_pass)} per pass, by this machine's profile"
            )
        if self.bottleneck != "memory":
            lines.append(
                f"waits     compute waited {format_seconds(self.compute_wait_seconds)} for the disk, "
                f"the disk {format_seconds(self.disk_wait_seconds)} for compute"
            )
        return lines + self.machine_lines()


def make_score_report(scoring: Scoring, around: Surroundings, predicted: Prediction | None = None) -> ScoreReport:
    """Put the figures of one run together, beside what was `predicted` of it; it has at least one pass."""
    expected = None if predicted is None else predicted.prefill
    cost, again = scoring.costs.prefill, around.again_nbytes
    figures = around.figures_of(cost, scoring.total.tokens)
    kv = figures.kv_bytes_read + figures.kv_bytes_written
    bound: float | None = None
    reads = bool(again or kv or cost.experts.nbytes)
    bottleneck: Bottleneck = "disk" if reads else "memory"
    if reads and (found := _bound_from_nothing(cost, figures, again, kv)) is not None:
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
