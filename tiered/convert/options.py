"""What a conversion is asked to do, what it reports while it runs, and what it hands back."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from tiered.errors import ConfigError
from tiered.quant import GroupScheme

QUANTS: Final = ("int4", "int8", "none")
COMPRESSIONS: Final = ("auto", "zstd", "none")


@dataclass(frozen=True)
class ConvertOptions:
    """Everything `tiered convert` can be told, besides what to convert and where to."""

    quant: str = "int4"  # of the layers' linear weights: int4, int8 or none
    group_size: int = 64  # weights along `in` that share a scale and a zero
    clip: Literal["mse", "minmax"] = "mse"  # how int4 chooses each group's range
    compress: str = "auto"  # auto (only where the disk is slow enough), zstd (wherever it shrinks) or none
    ram_bytes: int | None = None  # peak RSS of the whole process; None does not check
    force: bool = False  # replace what an earlier conversion left in the output folder
    revision: str | None = None  # of a hub repository: branch, tag or commit
    delete_downloads: bool = False  # remove each file this conversion downloaded once it is converted
    synthetic: bool = False  # random weights of a known shape, no checkpoint
    distinct_blocks: int | None = None  # layer files of a synthetic store, repeated; None: one for each layer
    seed: int = 0  # of synthetic weights

    def __post_init__(self) -> None:
        if self.quant not in QUANTS:
            raise ConfigError(f"quantization {self.quant!r}: expected one of {', '.join(QUANTS)}")
        if self.compress not in COMPRESSIONS:
            raise ConfigError(f"compression {self.compress!r}: expected one of {', '.join(COMPRESSIONS)}")
        GroupScheme(8, self.group_size)  # raises for a group size there is no layout for
        if self.clip not in ("mse", "minmax"):
            raise ConfigError(f"clip {self.clip!r}: expected mse or minmax")
        if not self.synthetic and self.distinct_blocks is not None:
            raise ConfigError("--distinct-blocks repeats random layers; it needs --synthetic")
        if self.synthetic and (self.delete_downloads or self.revision is not None):
            raise ConfigError("--synthetic reads no checkpoint; drop --revision and --delete-downloads")
        if self.synthetic and self.compress == "zstd":
            raise ConfigError("--synthetic writes raw blocks at disk speed; drop --compress zstd")
        if self.distinct_blocks is not None and self.distinct_blocks < 1:
            raise ConfigError(f"--distinct-blocks {self.distinct_blocks}: expected at least 1")

    @property
    def layer_scheme(self) -> GroupScheme | None:
        """Of the layers' linear weights; None keeps the checkpoint's precision."""
        return None if self.quant == "none" else GroupScheme(int(self.quant[3:]), self.group_size)

    @property
    def embed_scheme(self) -> GroupScheme | None:
        """Of token embedding and head: 8 bits even where layers have 4, because every token passes them."""
        return None if self.quant == "none" else GroupScheme(8, self.group_size)

    def settings(self) -> dict[str, Any]:
        """The options that decide what the store's bytes are: a resumed conversion must repeat them."""
        return {
            "quant": self.quant,
            "group_size": self.group_size,
            "clip": self.clip,
            "compress": "none" if self.synthetic else self.compress,
            "distinct_blocks": self.distinct_blocks,
            "seed": self.seed if self.synthetic else None,
        }


@dataclass(frozen=True)
class ConvertProgress:
    """Where a conversion stands; passed to the caller's function after every few MiB."""

    block: str
    nbytes_done: int
    """Of the store, those that earlier attempts finished included."""
    nbytes_total: int
    nbytes_skipped: int
    """Of `nbytes_done`, those that earlier attempts had finished: they say nothing about speed."""
    downloading: bool = False
    """The block's files are being downloaded; nothing is written until that is done."""


ProgressFunction = Callable[[ConvertProgress], None]


@dataclass(frozen=True)
class ConvertResult:
    """A finished conversion."""

    store: Path
    blocks: int
    """Entries of the manifest; repeated synthetic layers count each."""
    nbytes: int
    """Of all block files."""
    weights: int
    """Numbers that the block files stand for."""
    seconds: float
    resumed_blocks: int
    """Block files that an earlier attempt had finished."""
    scheme: str
    """Of the layers: "int4-g64", or "none"."""
    unquantized: tuple[str, ...]
    """Linear weights that keep the checkpoint's precision because their shape does not fit the groups."""
    warnings: tuple[str, ...]
    synthetic: bool
    has_tokenizer: bool = True
    """Whether there was one to copy: a store without takes and gives token ids only."""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights
