"""The options that `generate`, `batch` and `score` share, and the runtime `Options` that they stand for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiered.errors import ConfigError
from tiered.io import VerifyPolicy
from tiered.kernels import Mode
from tiered.plan import KVTier, Objective, parse_bits, parse_tiers
from tiered.runtime import Options
from tiered.units import parse_size


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """The options of a command, as they were given; each command adds its own."""

    store: Path
    dtype: str
    verify: str
    tiers: str
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
    stated: frozenset[str] = frozenset()
    """Names of the options that were given; the others have their defaults."""

    def options(self, **more: Any) -> Options:
        """The options of the runtime, with `more` added. Raises ConfigError for options that contradict each other."""
        if self.kv == "cpu" and self.kv_dir is not None:
            raise ConfigError(
                f"--kv-dir {self.kv_dir}: --kv cpu keeps the cache in memory; use --kv disk or auto, or drop it"
            )
        return Options(
            ram=None if self.ram is None else parse_size(self.ram),
            tiers=parse_tiers(self.tiers),
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
