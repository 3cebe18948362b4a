"""A checkpoint's files in a local folder."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import xxhash

from tiered.errors import CheckpointError, ConfigError

_SAMPLES: Final = 64
_SAMPLE_NBYTES: Final = 4096


class LocalFiles:
    """The files right inside one folder. They are only read."""

    kind = "folder"
    revision: str | None = None

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: expected a Hugging Face model folder (config.json, tokenizer files, weights)")
        self._folder = folder
        self._names = frozenset(path.name for path in folder.iterdir() if path.is_file())

    @property
    def name(self) -> str:
        return self._folder.resolve().name

    @property
    def names(self) -> frozenset[str]:
        return self._names

    def nbytes(self, name: str) -> int | None:
        return self.path(name).stat().st_size

    def is_here(self, name: str) -> bool:
        return True

    def path(self, name: str) -> Path:
        if name not in self._names:
            raise CheckpointError(f"{self._folder / name}: missing; the checkpoint's index lists it")
        return self._folder / name

    def release(self, name: str) -> None:
        """The user's own files stay."""

    def fingerprint(self, names: Iterable[str]) -> str:
        """Sizes and evenly spaced samples: tells a fine-tuned model of the same shape from the original."""
        digest = xxhash.xxh3_128()
        for name in sorted(names):
            path = self.path(name)
            size = path.stat().st_size
            digest.update(f"{name}\0{size}\0".encode())
            with path.open("rb") as file:
                for index in range(_SAMPLES):
                    digest.update(os.pread(file.fileno(), _SAMPLE_NBYTES, size * index // _SAMPLES))
        return digest.hexdigest()
