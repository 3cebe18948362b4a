"""The options that `generate`, `batch` and `score` share, and the runtime `Options` that they stand for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tiered.errors import ConfigError
from tiered.io import VerifyPolicy
from tiered.kernels import Mode
from tiered.options import PhaseDevice
from tiered.plan import KVTier, Objective, parse_bits, parse_tiers
from tiered.runtime import Options
from tiered.units import parse_option, parse_size


@dataclass(frozen=True, kw_only=True)
class DeviceRequest:
    """The options for tiers and what computes, as they were given."""

    tiers: str
    device: str = "auto"
    vram: str | None = None
    resident_gpu: str | None = None
    resident_cpu: str | None = None
    prefill_device: PhaseDevice = "auto"
    decode_device: PhaseDevice = "auto"

    def device_options(self) -> dict[str, Any]:
        """The fields of the runtime's options that these stand for. Raises ConfigError for sizes that are none."""
        return {
            "tiers": parse_tiers(self.tiers),
            "device": None if self.device == "auto" else self.device,
            "vram": _bytes("--vram", self.vram),
            # Unlike budgets, none may be wished for.
            "resident_gpu": _bytes("--resident-gpu", self.resident_gpu, or_none=True),
            "resident_cpu": _bytes("--resident-cpu", self.resident_cpu, or_none=True),
            "prefill_device": self.prefill_device,
            "decode_device": self.decode_device,
        }


def _bytes(option: str, text: str | None, or_none: bool = False) -> int | None:
    return None if text is None else parse_option(option, text, or_none)


@dataclass(frozen=True, kw_only=True)
class RunRequest(DeviceRequest):
    """The options of a command, as they were given; each command adds its own."""

    store: Path
    dtype: str
    verify: str
    ram: str | None
    threads: int | None
    kernels: str
    kernel_mode: str
    micro_batch: int | None = None
    objective: Objective = "throughput"
    kv: KVTier = "auto"
    kv_bits: str
    kv_dir: Path | None = None
    measure: bool
    as_json: bool
    fallback: Literal["cpu"] | None = None
    stated: frozenset[str] = frozenset()
    """Names of the options that were given; the others have their defaults."""

    def options(self, **more: Any) -> Options:
        """The options of the runtime, with `more` added. Raises ConfigError for options that contradict each other."""
        if self.kv in ("cpu", "gpu") and self.kv_dir is not None:
            where = "in memory" if self.kv == "cpu" else "on the GPU"
            raise ConfigError(
                f"--kv-dir {self.kv_dir}: --kv {self.kv} keeps the cache {where}; use --kv disk or auto, or drop it"
            )
        return Options(
            **self.device_options(),
            fallback=self.fallback,
            ram=None if self.ram is None else parse_size(self.ram),
            dtype=self.dtype,
            threads=self.threads,
            verify=VerifyPolicy(self.verify),
            micro_batch_rows=self.micro_batch,
            kv=self.kv,
            kv_bits=parse_bits(self.kv_bits),
            kv_folder=self.kv_dir,
            kernels=self.kernels,
            kernel_mode=Mode(self.kernel_mode),
            **more,
        )
