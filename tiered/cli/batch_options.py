"""The options of `tiered batch`, as they were given."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BatchOptions:
    """None where an option is left to what is found out."""

    store: Path
    input_path: Path
    output_path: Path
    seed: int
    max_tokens: int
    context: int | None
    batch: int | None
    micro_batch: int | None
    kv: str
    kv_bits: str
    kv_dir: Path | None
    dtype: str
    verify: str
    tiers: str
    ram: str | None
    threads: int | None
    kernels: str
    kernel_mode: str
    measure: bool
    as_json: bool
