"""The stores of a benchmark: the one that is named, or synthetic ones of a shape, made where they are not there yet.

In: what to measure. Out: a folder for every way to compress. Conversions are processes of their own. Called by
`tiered bench`.
"""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tiered.bench.runs import TIERED
from tiered.configs_path import config_dir
from tiered.errors import ConfigError, TieredError


@dataclass(frozen=True)
class Synthetic:
    """Synthetic stores of a shape."""

    shape: str
    """A name in configs/models, or a .toml file."""
    quant: str
    distinct_blocks: int | None
    folder: Path
    """Where they go."""

    def __post_init__(self) -> None:
        models, shape = config_dir() / "models", self.shape
        if not (models / f"{shape}.toml").is_file() and not (shape.endswith(".toml") and Path(shape).is_file()):
            names = ", ".join(sorted(path.stem for path in models.glob("*.toml")))
            raise ConfigError(f"{shape}: neither a store nor a shape; shapes are {names}, or a .toml file")
        if not self.folder.is_dir():
            raise ConfigError(f"--dir {self.folder}: expected a folder that exists")

    def path(self, compress: str) -> Path:
        """Where the store lies that is compressed so."""
        parts = ["bench", Path(self.shape).name.removesuffix(".toml"), self.quant]
        parts += [] if compress == "none" else [compress]
        parts += [] if self.distinct_blocks is None else [f"x{self.distinct_blocks}"]
        return self.folder / f"{'-'.join(parts)}.tiered"

    def make(self, compress: str) -> Path:
        """The store, which is made if it is not there; raises TieredError if that fails."""
        store = self.path(compress)
        if not (store / "manifest.json").exists():
            words = ["--synthetic", self.shape, "-o", str(store), "--quant", self.quant, "--compress", compress]
            if self.distinct_blocks is not None:
                words += ["--distinct-blocks", str(self.distinct_blocks)]
            # What it says of its progress goes to standard error.
            code = subprocess.run([*TIERED, "convert", *words], stdout=2, check=False).returncode
            if code:
                raise TieredError(f"{store}: 'tiered convert' ended with exit status {code}; it says why above")
        return store


@contextlib.contextmanager
def synthetic_stores(what: Synthetic, ways: Sequence[str], clean: bool) -> Iterator[dict[str, Path]]:
    """A store for each of the `ways` to compress; removed afterwards if `clean`."""
    try:
        yield {compress: what.make(compress) for compress in ways}
    finally:
        if clean:
            for compress in ways:
                shutil.rmtree(what.path(compress), ignore_errors=True)
