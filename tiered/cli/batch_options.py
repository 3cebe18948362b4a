"""The options of `tiered batch`, as they were given."""

from dataclasses import dataclass
from pathlib import Path

from tiered.cli.run_request import RunRequest


@dataclass(frozen=True, kw_only=True)
class BatchOptions(RunRequest):
    """None where an option is left to what is found out."""

    input_path: Path
    output_path: Path
    seed: int
    max_tokens: int
    context: int | None
    batch: int | None
