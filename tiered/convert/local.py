"""A checkpoint's files in a local folder."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import xxhash

from tiered.errors import CheckpointError, ConfigError
from tiered.files import check_regular, reading

_SAMPLES: Final = 64
_SAMPLE_NBYTES: Final = 4096
_MODEL_FILE: Final = re.compile(r".*\.(safetensors|bin|json|jinja|model|txt)")
_CACHED_MODEL: Final = "models--"
"""How huggingface_hub's cache begins the name of a model's folder; "--" stands for the slash of its id."""


class LocalFiles:
    """The files right inside one folder. They are only read."""

    kind = "folder"
    revision: str | None = None

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: expected a Hugging Face model folder (config.json, tokenizer files, weights)")
        self._folder = folder
        with reading(folder):
            # What is no file but is called like one of a model's is for `path` to refuse, not to be passed over.
            found = [path.name for path in folder.iterdir() if not path.is_dir() or _MODEL_FILE.fullmatch(path.name)]
        self._names = frozenset(found)
        self._found_good: set[str] = set()

    @property
    def name(self) -> str:
        return model_name(self._folder)

    @property
    def names(self) -> frozenset[str]:
        return self._names

    def nbytes(self, name: str) -> int | None:
        return self.path(name).stat().st_size

    def is_here(self, name: str) -> bool:
        return True

    def path(self, name: str) -> Path:
        path = self._folder / name
        if name not in self._names:
            raise CheckpointError(f"{path}: missing; the checkpoint's index lists it")
        if name not in self._found_good:  # asked for once per tensor, of which there may be thousands
            check_regular(path, CheckpointError)
            _check_link(path)
            self._found_good.add(name)
        return path

    def release(self, name: str) -> None:
        """The user's own files stay."""

    def fingerprint(self, names: Iterable[str]) -> str:
        """Sizes and evenly spaced samples: tells a fine-tuned model of the same shape from the original."""
        digest = xxhash.xxh3_128()
        for name in sorted(names):
            path = self.path(name)
            size = path.stat().st_size
            digest.update(f"{name}\0{size}\0".encode())
            with reading(path), path.open("rb") as file:
                for index in range(_SAMPLES):
                    digest.update(os.pread(file.fileno(), _SAMPLE_NBYTES, size * index // _SAMPLES))
        return digest.hexdigest()


def model_name(folder: Path) -> str:
    """What the model in `folder` is called: as the folder, or in huggingface_hub's cache as its repository."""
    real = folder.resolve()
    cached = _cached_repository(real)
    return real.name if cached is None else cached.name.removeprefix(_CACHED_MODEL).rpartition("--")[2]


def _cached_repository(real: Path) -> Path | None:
    """The folder of the hub's cache (models--OWNER--NAME) of which `real` is a snapshot or within one."""
    for snapshots in real.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith(_CACHED_MODEL):
            return snapshots.parent
    return None


def _check_link(path: Path) -> None:
    """Raise CheckpointError where `path` is a link out of its folder, other than into the blobs of the hub's cache.

    A store is given away: a folder from elsewhere must not be able to have the user's own files copied into one.
    """
    folder, real = path.parent.resolve(), path.resolve()
    allowed = [folder]
    repository = _cached_repository(folder)
    if repository is not None:
        # The second is where the cache keeps what several repositories share.
        allowed += [repository / "blobs", repository.parent / "blobs"]
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{path}: a link out of the folder, to {real}, which is not followed; put a copy of the file in its place"
            " (or a hard link), or convert the folder that it leads to"
        )
