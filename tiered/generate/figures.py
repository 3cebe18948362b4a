"""The figures that every report has: of bytes and bandwidths, of memory, of experts, and of a device that computed.

In: what was counted and measured. Out: numbers for programs, and lines for people. `report.py` adds what was generated
or scored, and bounds.
"""

from dataclasses import asdict, dataclass
from typing import Any

from tiered.plan.plan import HOLDS_LESS
from tiered.units import format_rate, format_seconds, format_size


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
class DeviceFigures:
    """What a report says of a device that computed. The last ones are of the decode passes, or of a scoring."""

    name: str
    """As `--device` calls it."""
    description: str
    kernels: str
    """What computed on it: kernels and mode."""
    prefill_device: str
    decode_device: str
    """"gpu" or "cpu": what computed prompts, and the rest."""
    vram_budget_bytes: int
    vram_peak_bytes: int
    """Where a device is emulated, of what was borrowed: slots, weights and the KV cache."""
    resident_bytes: int
    """Bytes of weights that stayed on it."""
    kv_on_device: bool
    """Whether the KV cache was there."""
    vram_decode_bytes: int | None = None
    """What was kept of its memory while only the processor decoded and no prompt waited; None: all, as the device
    decoded, or a prompt was always there."""
    emulated_bytes: int = 0
    """Bytes of its budget that are the process's own memory, beside the budget of that: all where it is emulated."""
    raw_bus_bandwidth: float | None = None
    """Of plain copies from pinned memory, measured after the run; None: not measured."""
    unregistered: str | None = None
    """Why copies went through a staging buffer: the reason for which host memory could not be pinned."""
    bytes_copied_per_pass: float = 0.0
    """To it: weights, and hidden states that had waited."""
    waiting_tokens: int = 0
    """Tokens of a pass whose hidden states wait in the host's memory, at most; 0: all were on it."""
    waiting_bytes_per_pass: float = 0.0
    """Of `bytes_copied_per_pass`, those of hidden states; as many came back."""
    bus_bandwidth: float | None = None
    compute_wait_seconds: float = 0.0
    """How long computing waited for copies of what was in memory."""

    def lines(self, while_: str) -> list[str]:
        """What computed where, in how much memory, and what crossed the bus."""
        over = ", OVER BUDGET" if self.vram_peak_bytes > self.vram_budget_bytes else ""
        peak = f"peak {format_size(self.vram_peak_bytes)} of {format_size(self.vram_budget_bytes)}"
        peak += " (slots, weights and the KV cache)" if self.emulated_bytes else ""
        lines = [
            f"gpu       {self.name}: {self.description}; {self.kernels}",
            f"          {peak}{over}; {format_size(self.resident_bytes)} of weights resident"
            + (", and the KV cache" if self.kv_on_device else ""),
        ]
        if self.decode_device == "cpu":
            kept = ""
            if self.vram_decode_bytes is not None:
                kept = f", during which it kept {format_size(self.vram_decode_bytes)} of its memory"
            lines.append(f"          prompts were computed on it, and the rest by the processor{kept}")
        if self.bus_bandwidth is not None and self.bytes_copied_per_pass:
            bus = f"bus       {format_size(round(self.bytes_copied_per_pass))} copied per pass, "
            bus += f"{format_rate(self.bus_bandwidth)} while {while_}"
            if self.raw_bus_bandwidth:
                bus += f", {self.bus_bandwidth / self.raw_bus_bandwidth:.0%} of the "
                bus += f"{format_rate(self.raw_bus_bandwidth)} measured raw"
            lines.append(bus)
        if self.waiting_tokens:
            waited = f"          hidden states of up to {self.waiting_tokens} tokens of a pass wait in memory"
            if self.waiting_bytes_per_pass:
                waited += f": {format_size(round(self.waiting_bytes_per_pass))} of what was copied, and as much back"
            lines.append(waited)
        if self.unregistered is not None:
            lines.append(f"          copies were staged, as memory could not be pinned: {self.unregistered}")
        return lines


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
    holds_less: bool
    """Fewer weights stayed than had room, as the job is quicker so."""
    read_mode: str
    kernels: str
    """What computed: instruction set, mode and threads."""
    synthetic: bool
    experts: ExpertFigures | None = None
    """None where layers are read whole."""
    device: DeviceFigures | None = None
    """None where the processor computed."""
    fallback: str | None = None
    """Why the processor computed although a device was asked for: `--fallback cpu`."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def machine_lines(self) -> list[str]:
        """The last lines of any report: what computed, in how much memory."""
        emulated = 0 if self.device is None else self.device.emulated_bytes
        budget = format_size(self.ram_budget_bytes) + (f" and {format_size(emulated)} of --vram" if emulated else "")
        over = ", OVER BUDGET" if self.peak_rss_bytes > self.ram_budget_bytes + emulated else ""
        weights = "weights" if self.experts is None else "dense weights"
        lines = [
            f"kernels   {self.kernels}",
            f"memory    peak {format_size(self.peak_rss_bytes)} of {budget}{over}; "
            f"{format_size(self.resident_bytes)} of {format_size(self.tape_bytes)} {weights} resident",
        ]
        if self.holds_less:
            lines.append(f"          {HOLDS_LESS}")
        if self.fallback is not None:
            lines.append(f"fallback  the processor computed, as the GPU could not: {self.fallback}")
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
        if bandwidth and self.raw_disk_bandwidth:
            lines.append(
                f"          {format_rate(bandwidth)} while {while_}, {bandwidth / self.raw_disk_bandwidth:.0%} of the "
                f"{format_rate(self.raw_disk_bandwidth)} measured raw"
            )
        lines += self.device.lines(while_) if self.device is not None else []
        return lines if self.experts is None else lines + self.experts.lines()

    def waits(self, compute_seconds: float, has_read: bool) -> str:
        """Who waited for whom, the disk among them if it `has_read` in all passes."""
        waited = []
        if self.device is not None and self.device.bytes_copied_per_pass:
            waited = [f"{format_seconds(self.device.compute_wait_seconds)} for copies to the GPU"]
            compute_seconds -= self.device.compute_wait_seconds
        if not has_read:
            return f"compute waited {' and '.join(waited) or 'for nothing'}"
        waited = [f"{format_seconds(max(0.0, compute_seconds))} for the disk", *waited]
        return f"compute waited {' and '.join(waited)}, the disk {format_seconds(self.disk_wait_seconds)} for compute"

    @property
    def possible(self) -> str:
        """What a bound takes as given, for people."""
        return "possible here" if self.experts is None else "possible here with these reads of experts"
