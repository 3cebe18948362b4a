"""The options of a run: everything that can be chosen, with defaults."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from tiered.errors import ConfigError
from tiered.io import ReadMode, VerifyPolicy
from tiered.kernels import Mode
from tiered.plan import AnyBits, KVTier, Tier


@dataclass(frozen=True)
class Options:
    """How to run; every field has a sensible default."""

    ram: int | None = None
    """Budget in bytes for the whole process; None: 90 % of what there is."""
    tiers: tuple[Tier, ...] = (Tier.DISK, Tier.CPU)
    dtype: str = "auto"
    """Compute dtype; see `compute_dtype`."""
    threads: int | None = None
    """Threads that compute; None: as many as processors that may be used."""
    verify: VerifyPolicy = VerifyPolicy.FIRST
    prefetch: int | None = None
    """Units that may be read before they are asked for; None: as many as the ring holds."""
    micro_batch_rows: int | None = None
    """Tokens that are computed together at most; None: as many as memory allows and are useful."""
    kv: KVTier = "cpu"
    """Where the KV cache is; auto: in memory if it fits there."""
    kv_bits: AnyBits = 16
    kv_folder: Path | None = None
    """The folder for the KV cache's file, if it is on disk; None: the store's."""
    kernels: str = "auto"
    """A name of `tiered.kernels.KERNEL_NAMES`."""
    kernel_mode: Mode = Mode.INVARIANT
    keep_spans: bool = False
    """Keep the spans of the trace, not only their totals."""
    read_mode: ReadMode | None = None
    """How files are read; None: found out by a small read."""

    def __post_init__(self) -> None:
        for name, value in (("ram", self.ram), ("threads", self.threads), ("micro-batch", self.micro_batch_rows)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} {value!r}: expected a whole number above 0")
        if self.kv not in ("auto", "cpu", "disk"):
            raise ConfigError(f"kv {self.kv!r}: expected auto, cpu or disk")


def compute_dtype(name: str, config: PretrainedConfig) -> torch.dtype:
    """The dtype activations are computed in: "auto" is float32 for a float32 checkpoint, else bfloat16."""
    if name == "auto":
        return torch.float32 if config.dtype in (None, torch.float32) else torch.bfloat16
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in known:
        raise ConfigError(f"dtype {name!r}: expected auto, bfloat16 or float32")
    return known[name]
