"""A checkpoint on the hub without its weights: of its safetensors files the headers alone, fetched by range.

In: a repository, a folder for what is fetched. Out: its files as `place.py` gives them, each safetensors file with a
hole for its data, so that the code that converts reads names, dtypes and shapes as it does of whole files.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import huggingface_hub
from huggingface_hub import errors

from tiered.convert.place import HubFiles, HubId, Ledger, WeightFiles, explained
from tiered.convert.recipe import ConvertOptions
from tiered.errors import CheckpointError
from tiered.store.hollow import write_hollow

_TELLS_OF_WEIGHTS: Final = re.compile(r"(adapter_)?config\.json|[^/]+\.(safetensors|bin)(\.index\.json)?")
_SHARD: Final = re.compile(r"(.*-)\d+(-of-\d+\.safetensors)")
_AT_ONCE: Final = 8
"""Headers that are fetched side by side."""


@dataclass(frozen=True)
class HubHeaders(HubId):
    """A repository of which no weights are fetched."""

    folder: Path
    """Where headers go."""

    def open(self, options: ConvertOptions, ledger: Ledger) -> WeightFiles:
        return _HeaderFiles(self.repo_id, options.revision, ledger, self.folder)


class _HeaderFiles(HubFiles):
    """The files of one revision of a repository that tell of its weights."""

    def __init__(self, repo_id: str, revision: str | None, ledger: Ledger, folder: Path) -> None:
        super().__init__(repo_id, revision, ledger, delete=False)
        self._folder = folder
        # Tokenizers take megabytes and say nothing of weights; neither do safetensors files beside the weights' own.
        names = frozenset(filter(_TELLS_OF_WEIGHTS.fullmatch, self.names))
        pickled = {"pytorch_model.bin", "pytorch_model.bin.index.json"} & names
        if pickled and not {"model.safetensors", "model.safetensors.index.json"} & names:
            names = frozenset(name for name in names if not name.endswith(".safetensors"))
        self.names = names

    def is_here(self, name: str) -> bool:
        return name.endswith(".safetensors") or super().is_here(name)

    def path(self, name: str) -> Path:
        cached = self._cached(name)
        if cached is not None or not name.endswith(".safetensors"):
            return cached or super().path(name)
        path = self._folder / name
        if not path.exists():
            series = _SHARD.fullmatch(name)
            wanted = [other for other in self.names if _same_series(series, other)] if series else [name]
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(self._fetch, wanted))
        return path

    def _fetch(self, name: str) -> None:
        """Write the header of a safetensors file."""
        try:
            with explained(self.name, self.revision):
                found = huggingface_hub.HfApi().parse_safetensors_file_metadata(self.name, name, revision=self.revision)
        except errors.SafetensorsParsingError as error:
            raise CheckpointError(f"{self.name}: {name}: damaged safetensors header ({error})") from error
        try:
            write_hollow(self._folder / name, {key: vars(tensor) for key, tensor in found.tensors.items()})
        except (TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{self.name}: {name}: damaged safetensors header ({error})") from error
        except OSError as error:
            raise CheckpointError(f"{self.name}: {name}: no file can be so long ({error.strerror})") from error


def _same_series(series: re.Match[str], name: str) -> bool:
    other = _SHARD.fullmatch(name)
    return other is not None and other.groups() == series.groups()
