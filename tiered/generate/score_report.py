"""The report of a scoring: what it took, beside what the machine could have done.

    bound = max((S + (passes - 1) * (S - M) + K) / B, C)

S, M, B as in `report.py`; K and C are the KV cache's bytes and the compute time of all passes together, measured.
Nothing is resident before the first pass, which therefore reads everything. Reading goes on across passes, so only
the sums can be compared.
"""

from dataclasses import asdict, dataclass
from typing import Any

from tiered.generate.report import Surroundings, machine_lines
from tiered.generate.score import Scoring
from tiered.units import format_rate, format_seconds, format_size


@dataclass(frozen=True)
class ScoreReport:
    """Bytes and seconds; bandwidths in bytes per second. None where there is nothing to measure."""

    scored_tokens: int
    input_tokens: int
    """Tokens computed; more than scored where windows overlap."""
    windows: int
    passes: int
    seconds: float
    seconds_per_pass: float
    compute_seconds_per_pass: float
    tokens_per_second: float
    """Scored ones."""
    bytes_read: int
    bytes_read_kernel: int | None
    bytes_written: int | None
    kv_bytes_read: int
    """Of a KV cache on disk."""
    kv_bytes_written: int
    disk_bandwidth: float
    """While scoring: weights and KV cache, reads and writes."""
    raw_disk_bandwidth: float | None
    bound_seconds: float | None
    bound_share: float | None
    bottleneck: str
    """"disk", "compute" or, where everything is resident after the first pass, "memory"."""
    compute_wait_seconds: float
    disk_wait_seconds: float
    peak_rss_bytes: int
    ram_budget_bytes: int
    tape_bytes: int
    resident_bytes: int
    missing_overlap_bytes: int
    """What the budget lacked to read one block while the one before computes; 0 where it did."""
    read_mode: str
    kernels: str
    synthetic: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as people read it."""
        lines = ["synthetic weights: a benchmark, not a language model"] if self.synthetic else []
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
        written = "written unknown" if self.bytes_written is None else f"{format_size(self.bytes_written)} written"
        lines.append(f"disk      {format_size(self.bytes_read)} read, {written}, {self.read_mode}")
        if self.kv_bytes_read or self.kv_bytes_written:
            lines.append(
                f"kv cache  {format_size(self.kv_bytes_read)} read, {format_size(self.kv_bytes_written)} written: "
                "a smaller --batch or --context may fit in memory"
            )
        if self.raw_disk_bandwidth:
            lines.append(
                f"          {format_rate(self.disk_bandwidth)} while scoring, "
                f"{self.disk_bandwidth / self.raw_disk_bandwidth:.0%} of the "
                f"{format_rate(self.raw_disk_bandwidth)} measured raw"
            )
        if self.bound_seconds is not None and self.bound_share is not None:
            what = "disk-bound" if self.bottleneck == "disk" else "compute-bound: no evidence for the disk"
            lines.append(
                f"bound     {format_seconds(self.bound_seconds)} possible here, {self.bound_share:.0%} of it reached "
                f"({what})"
            )
        if self.bottleneck != "memory":
            lines.append(
                f"waits     compute waited {format_seconds(self.compute_wait_seconds)} for the disk, "
                f"the disk {format_seconds(self.disk_wait_seconds)} for compute"
            )
        return lines + machine_lines(self)


def make_score_report(scoring: Scoring, around: Surroundings) -> ScoreReport:
    """Put the figures of one run together; it has at least one pass."""
    plan, raw, passes = around.plan, around.raw_disk_bandwidth, scoring.passes
    compute = scoring.compute_seconds
    # S - M counts what is read: of compressed blocks that is less than what they take in memory.
    again = round((1 - plan.bound_resident_nbytes / sum(plan.tape_sizes)) * around.tape_file_bytes)
    kv = around.kv_bytes_read + around.kv_bytes_written
    bound, bottleneck = None, "disk" if again or kv else "memory"
    if raw is not None and (again or kv):
        disk = (around.tape_file_bytes + (passes - 1) * again + kv) / raw
        bound, bottleneck = max(disk, compute), "compute" if compute > disk else "disk"
    return ScoreReport(
        scored_tokens=scoring.total.tokens,
        input_tokens=scoring.input_tokens,
        windows=scoring.windows,
        passes=passes,
        seconds=scoring.seconds,
        seconds_per_pass=scoring.pass_seconds / passes,
        compute_seconds_per_pass=compute / passes,
        tokens_per_second=scoring.total.tokens / scoring.seconds,
        bytes_read=around.bytes_read,
        bytes_read_kernel=around.bytes_read_kernel,
        bytes_written=around.bytes_written,
        kv_bytes_read=around.kv_bytes_read,
        kv_bytes_written=around.kv_bytes_written,
        disk_bandwidth=(scoring.bytes_read + kv) / scoring.seconds,
        raw_disk_bandwidth=raw,
        bound_seconds=bound,
        bound_share=bound / scoring.seconds if bound is not None else None,
        bottleneck=bottleneck,
        compute_wait_seconds=scoring.wait_seconds,
        disk_wait_seconds=scoring.disk_idle_seconds,
        peak_rss_bytes=around.peak_rss_bytes,
        ram_budget_bytes=plan.budget,
        tape_bytes=around.tape_file_bytes,
        resident_bytes=plan.placement.resident_nbytes,
        missing_overlap_bytes=plan.missing_overlap_nbytes,
        read_mode=around.read_mode,
        kernels=around.kernels,
        synthetic=around.synthetic,
    )
