"""What the word after `tiered convert` means: a folder, a hub id, a known name, or a shape to fill with noise."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tiered.configs_path import config_dir
from tiered.convert.local import model_name
from tiered.errors import ConfigError, CorruptError
from tiered.files import MOST_JSON_NBYTES, read_whole

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_OPT_175B: Final = (
    "opt-175b: its weights are on no hub. Meta gives them out on request (facebookresearch/metaseq, projects/OPT), as "
    "992 metaseq shards; reshard them and convert them to a Hugging Face folder (config.json, tokenizer files, "
    "model*.safetensors or pytorch_model*.bin) with metaseq's and transformers' own scripts, then pass that folder: "
    "'tiered convert PATH/TO/FOLDER'. For benchmarks at this size without the weights: "
    "'tiered convert opt-175b --synthetic'"
)


@dataclass(frozen=True)
class Folder:
    """A local Hugging Face folder."""

    path: Path

    @property
    def name(self) -> str:
        return model_name(self.path)


@dataclass(frozen=True)
class HubId:
    """A repository on the hub."""

    repo_id: str

    @property
    def name(self) -> str:
        return self.repo_id.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Shape:
    """A model's shape from a toml file."""

    name: str
    config: dict[str, Any]
    hub_id: str | None


def resolve_checkpoint(source: str | Path) -> Folder | HubId:
    """Where the checkpoint called `source` is. A folder comes first, then a known name, then a hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        return Folder(path)
    if path.exists():
        raise ConfigError(f"{source}: a file; expected a Hugging Face model folder, a hub id or a known name")
    text = str(source)
    known = config_dir() / "models" / f"{text}.toml"
    if "/" not in text and known.is_file():
        shape = _read_shape(known)
        if text == "opt-175b":
            raise ConfigError(_OPT_175B)
        if shape.hub_id is None:
            raise ConfigError(f"{text}: a shape without published weights; pass --synthetic for random ones")
        return HubId(shape.hub_id)
    if isinstance(source, str) and _HUB_ID.fullmatch(text):
        return HubId(text)
    raise ConfigError(
        f"{text}: no such folder, no hub id (owner/name) and no known name; known are {', '.join(known_names())}"
    )


def resolve_shape(source: str | Path) -> Shape:
    """The shape called `source`, or in the toml file `source`."""
    path = Path(source).expanduser()
    if path.suffix == ".toml" and path.is_file():
        return _read_shape(path)
    known = config_dir() / "models" / f"{source}.toml"
    if "/" not in str(source) and known.is_file():
        return _read_shape(known)
    raise ConfigError(
        f"{source}: --synthetic expects a known shape or a toml file of one; known are {', '.join(known_names())}"
    )


def known_names() -> list[str]:
    """The shapes in configs/models."""
    return sorted(path.stem for path in (config_dir() / "models").glob("*.toml"))


def _read_shape(path: Path) -> Shape:
    try:
        value = tomllib.loads(read_whole(path, CorruptError, MOST_JSON_NBYTES).decode("utf-8"))
        return Shape(str(value.get("name", path.stem)), dict(value["config"]), value.get("hub_id"))
    except (CorruptError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected a toml file with a table [config] ({error!r})") from None
