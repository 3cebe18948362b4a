"""The report of a run: what it took, beside what the machine could have done.

    bound = max((S - M + K) / B, C)

S: bytes of the tape. K: bytes of the KV cache that go to disk and come from it. M: all that the budget leaves after
baseline, KV cache, workspace and two blocks, used or not. B: raw disk bandwidth, measured before and after by code of
its own. C: compute seconds of a decode pass, measured.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tiered.generate.loop import Generation
from tiered.plan import Plan
from tiered.units import format_rate, format_seconds, format_size

if TYPE_CHECKING:
    from tiered.generate.score_report import ScoreReport


@dataclass(frozen=True)
class Report:
    """Bytes and seconds; bandwidths in bytes per second. None where there is nothing to measure."""

    prompt_tokens: int
    generated_tokens: int
    first_token_seconds: float
    prefill_seconds: float
    prefill_tokens_per_second: float
    decode_seconds: float
    tokens_per_second: float | None
    seconds_per_pass: float | None
    compute_seconds_per_pass: float | None
    passes: int
    bytes_read: int
    bytes_read_kernel: int | None
    bytes_read_per_token: float
    bytes_written: int | None
    kv_bytes_read: int
    """Of a KV cache on disk."""
    kv_bytes_written: int
    disk_bandwidth: float | None
    """While decoding: weights and KV cache, reads and writes."""
    raw_disk_bandwidth: float | None
    """Sustained, before or after the run."""
    raw_disk_best_look: float | None
    """The fastest of the short looks that chose how to measure it."""
    bound_seconds_per_pass: float | None
    bound_share: float | None
    bottleneck: str | None
    """"disk", "compute" or "memory" (everything resident); None where no decode pass ran."""
    compute_wait_seconds: float
    """Of the decode passes, like the next one."""
    disk_wait_seconds: float
    block_overhead_seconds: float
    """Median wall time per block beyond computing and waiting for reads, of the last passes."""
    peak_rss_bytes: int
    ram_budget_bytes: int
    tape_bytes: int
    resident_bytes: int
    missing_overlap_bytes: int
    """What the budget lacked to read one block while the one before computes; 0 where it did."""
    read_mode: str
    kernels: str
    """What computed: instruction set, mode and threads."""
    synthetic: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as people read it."""
        lines = []
        if self.synthetic:
            lines.append("synthetic weights: a benchmark, not a language model")
        lines.append(
            f"prefill   {self.prompt_tokens} tokens in {format_seconds(self.prefill_seconds)}, "
            f"first token after {format_seconds(self.first_token_seconds)}"
        )
        if self.tokens_per_second is not None and self.seconds_per_pass is not None:
            lines.append(
                f"decode    {self.tokens_per_second:.3g} tokens/s, {format_seconds(self.seconds_per_pass)} per pass "
                f"({self.passes} passes, compute {format_seconds(self.compute_seconds_per_pass or 0)} of each)"
            )
        written = "written unknown" if self.bytes_written is None else f"{format_size(self.bytes_written)} written"
        lines.append(
            f"disk      {format_size(self.bytes_read)} read ({self.bytes_read_per_token / 1e9:.3g} GB per token), "
            f"{written}, {self.read_mode}"
        )
        if self.kv_bytes_read or self.kv_bytes_written:
            lines.append(
                f"kv cache  {format_size(self.kv_bytes_read)} read, {format_size(self.kv_bytes_written)} written: "
                "every written byte wears an SSD; its data sheet says how many it stands (TBW)"
            )
        lines += self._bandwidth_lines()
        if self.bottleneck in ("disk", "compute"):
            lines.append(
                f"waits     while decoding, compute waited {format_seconds(self.compute_wait_seconds)} for the disk, "
                f"the disk {format_seconds(self.disk_wait_seconds)} for compute"
            )
        return lines + machine_lines(self)

    def _bandwidth_lines(self) -> list[str]:
        lines = []
        if self.disk_bandwidth is not None and self.raw_disk_bandwidth:
            share = self.disk_bandwidth / self.raw_disk_bandwidth
            lines.append(
                f"          {format_rate(self.disk_bandwidth)} while decoding, {share:.0%} of the "
                f"{format_rate(self.raw_disk_bandwidth)} measured raw"
            )
        if self.bound_share is not None and self.bound_seconds_per_pass is not None:
            what = {
                "disk": "disk-bound",
                "compute": "compute-bound: no evidence for the disk",
                "memory": "all weights in memory: compute-bound",
            }[self.bottleneck or "disk"]
            lines.append(
                f"bound     {format_seconds(self.bound_seconds_per_pass)} per pass possible here, "
                f"{self.bound_share:.0%} of it reached ({what})"
            )
        return lines


def machine_lines(report: "Report | ScoreReport") -> list[str]:
    """The last lines of any report: what computed, in how much memory."""
    over = ", OVER BUDGET" if report.peak_rss_bytes > report.ram_budget_bytes else ""
    lines = [
        f"kernels   {report.kernels}",
        f"memory    peak {format_size(report.peak_rss_bytes)} of {format_size(report.ram_budget_bytes)}{over}; "
        f"{format_size(report.resident_bytes)} of {format_size(report.tape_bytes)} weights resident",
    ]
    if report.missing_overlap_bytes:
        lines.append(
            "          room for one block at a time, so reading and computing took turns: "
            f"with {format_size(report.missing_overlap_bytes)} more they would overlap"
        )
    return lines


@dataclass(frozen=True)
class Surroundings:
    """What a report needs to know that the generation does not."""

    plan: Plan
    tape_file_bytes: int
    """S: bytes of all blocks of the tape as they lie on disk."""
    streamed_file_bytes: int
    """Of these, bytes of the blocks that are not resident."""
    raw_disk_bandwidth: float | None
    raw_disk_best_look: float | None
    bytes_read: int
    bytes_read_kernel: int | None
    bytes_written: int | None
    kv_bytes_read: int
    kv_bytes_written: int
    peak_rss_bytes: int
    disk_wait_seconds: float
    """While decoding."""
    read_mode: str
    kernels: str
    synthetic: bool


def make_report(generation: Generation, around: Surroundings) -> Report:
    """Put the figures of one run together."""
    decode, prefill = generation.decode, generation.prefill
    per_pass = decode.seconds / decode.passes if decode.passes else None
    compute = decode.compute_seconds / decode.passes if decode.passes else None
    plan, raw = around.plan, around.raw_disk_bandwidth
    bound = bottleneck = None
    if compute is not None:
        # S - M counts what is read: of compressed blocks that is less than what they take in memory. What the ring
        # held when decoding began has been read before, and what it would hold at the end is not read any more: the
        # bound is that much lower, or few passes would seem to beat it.
        streamed = round((1 - plan.bound_resident_nbytes / sum(plan.tape_sizes)) * around.tape_file_bytes)
        streamed = round(streamed * _share_read(generation, around))
        streamed += decode.kv_bytes // decode.passes
        disk = streamed / raw if raw else None
        if streamed == 0:
            bound, bottleneck = compute, "memory"
        elif disk is not None:
            bound, bottleneck = max(disk, compute), "compute" if compute > disk else "disk"
    tokens = generation.generated_tokens
    moved = decode.bytes_read + decode.kv_bytes
    overheads = sorted(s for cost in generation.recent for s in cost.pass_.block_seconds)
    return Report(
        prompt_tokens=generation.prompt_tokens,
        generated_tokens=tokens,
        first_token_seconds=generation.first_token_seconds,
        prefill_seconds=prefill.pass_seconds,
        prefill_tokens_per_second=generation.prompt_tokens / prefill.pass_seconds if prefill.pass_seconds else 0.0,
        decode_seconds=decode.seconds,
        tokens_per_second=decode.new_tokens / decode.seconds if decode.seconds else None,
        seconds_per_pass=per_pass,
        compute_seconds_per_pass=compute,
        passes=generation.passes,
        bytes_read=around.bytes_read,
        bytes_read_kernel=around.bytes_read_kernel,
        bytes_read_per_token=around.bytes_read / max(tokens, 1),
        bytes_written=around.bytes_written,
        kv_bytes_read=around.kv_bytes_read,
        kv_bytes_written=around.kv_bytes_written,
        disk_bandwidth=moved / decode.seconds if decode.seconds else None,
        raw_disk_bandwidth=raw,
        raw_disk_best_look=around.raw_disk_best_look,
        bound_seconds_per_pass=bound,
        bound_share=bound / per_pass if bound is not None and per_pass else None,
        bottleneck=bottleneck,
        compute_wait_seconds=decode.wait_seconds,
        disk_wait_seconds=around.disk_wait_seconds,
        block_overhead_seconds=overheads[len(overheads) // 2] if overheads else 0.0,
        peak_rss_bytes=around.peak_rss_bytes,
        ram_budget_bytes=plan.budget,
        tape_bytes=around.tape_file_bytes,
        resident_bytes=plan.placement.resident_nbytes,
        missing_overlap_bytes=plan.missing_overlap_nbytes,
        read_mode=around.read_mode,
        kernels=around.kernels,
        synthetic=around.synthetic,
    )


def _share_read(generation: Generation, around: Surroundings) -> float:
    """Of the bytes that the decode passes streamed, how many were read while they ran."""
    due = generation.decode.passes * around.streamed_file_bytes
    return min(1.0, generation.decode.bytes_read / due) if due else 1.0
