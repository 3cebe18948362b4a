"""What a job is: its input, its store, and every setting that its results depend on. Kept in `RESULTS.job`.

Results of one job may be added to by another process only if that process would have written the same ones.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import xxhash

from tiered.errors import ConfigError, CorruptError, DiskFullError, StoreError
from tiered.files import MOST_JSON_NBYTES, check_regular, parse_json, read_whole, reading
from tiered.plan.shapes import STORE_SHAPE_NAME
from tiered.store import atomic_write

FORMAT: Final = "tiered-job"
VERSION: Final = 1
_REMEDY: Final = "name another file with -o, or remove this one and its results to begin anew"
_PIECE_NBYTES: Final = 1 << 20

Setting = str | int | None


@dataclass(frozen=True)
class Identity:
    """Equal identities give equal results."""

    input: str
    """Fingerprint of the input file."""
    store: str
    """Fingerprint of the store: manifest, configuration, tokenizer."""
    settings: Mapping[str, Setting]

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that stand for all of it; part of every result's id."""
        return xxhash.xxh3_64_hexdigest(json.dumps(self._values(), sort_keys=True).encode())

    def differences(self, begun: "Identity") -> list[str]:
        """What has changed since the job `begun` was begun, each difference in a few words."""
        found = ["the input has other contents"] if self.input != begun.input else []
        found += ["it is another store, or was converted or upgraded since"] if self.store != begun.store else []
        for name in sorted(self.settings.keys() | begun.settings.keys()):
            now, then = self.settings.get(name), begun.settings.get(name)
            if now != then:
                found.append(f"{name} is {_shown(now)}, it was {_shown(then)}")
        return found

    def _values(self) -> dict[str, Any]:
        return {"input": self.input, "store": self.store, "settings": dict(self.settings)}


@dataclass(frozen=True)
class JobFile:
    """Everything `RESULTS.job` says."""

    identity: Identity
    created: int
    """When the job was begun, in seconds since 1970."""
    sequences: int
    """How many sequences the input asks for; each choice of a request is one."""
    longest: int
    """Tokens of the longest sequence, prompt and completion; 0 where there is none."""
    tokens: int
    """Tokens of all sequences together, at most."""
    prompt_tokens: int = 0
    """Of these, those of prompts."""
    attention: str | None = None
    """What attends while a GPU decodes, "gpu" or "cpu": that has the KV cache, and their results differ in bits. None:
    no GPU decodes, or it is not known yet."""

    def to_json(self) -> str:
        """The text of the file."""
        value = {
            "format": FORMAT,
            "version": VERSION,
            **self.identity._values(),
            "created": self.created,
            "sequences": self.sequences,
            "longest": self.longest,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
        }
        if self.attention is not None:
            value["attention"] = self.attention
        return json.dumps(value, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: bytes | str, path: Path) -> "JobFile":
        """Parse and check the text of the file at `path`; raises CorruptError naming it."""
        value = parse_json(text, path, CorruptError, _REMEDY)
        try:
            if value["format"] != FORMAT or value["version"] != VERSION:
                raise ValueError(f"format {value['format']!r}, version {value['version']!r}")
            identity = Identity(_as(str, value["input"]), _as(str, value["store"]), _as(dict, value["settings"]))
            # Jobs of earlier versions did not tell how many tokens are those of prompts.
            value.setdefault("prompt_tokens", _as(int, value["tokens"]) // 2)
            names = ("created", "sequences", "longest", "tokens", "prompt_tokens")
            attention = _as(str, value["attention"]) if "attention" in value else None
            found = cls(identity, *(_as(int, value[name]) for name in names))
            return replace(found, attention=attention)
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"{path}: expected a {FORMAT} file of version {VERSION} ({error}); {_REMEDY}") from None


def job_path(results: Path) -> Path:
    """The path of the job file that belongs to a result file."""
    return results.with_name(results.name + ".job")


def read_job(results: Path) -> JobFile | None:
    """The job that a result file belongs to; None where there is no such file yet."""
    path = job_path(results)
    try:
        return JobFile.from_json(read_whole(path, CorruptError, MOST_JSON_NBYTES, _REMEDY), path)
    except FileNotFoundError:
        return None


def write_job(results: Path, job: JobFile) -> None:
    """Write, durably, the job file of the result file at `results`: before that has its first result, and again when
    the plan tells what attends. Raises DiskFullError."""
    path = job_path(results)
    try:
        atomic_write(path, job.to_json())
    except DiskFullError:
        raise DiskFullError(f"{path}: the disk is full; free some space and run the same command again") from None


def check_same(results: Path, now: Identity, begun: Identity) -> None:
    """Raises ConfigError, naming what differs, unless a job begun as `begun` may be continued as `now`."""
    differences = now.differences(begun)
    if differences:
        raise ConfigError(
            f"{results}: its results are of another job: {'; '.join(differences)}. "
            "Run it as it was begun, or name another file with -o"
        )


def check_attention(results: Path, now: str, begun: str | None) -> None:
    """Raises ConfigError unless a job of which `begun` attends, if that is known, may be continued where `now` does."""
    if begun is None or now == begun:
        return
    place, way = ("on the GPU", "--kv gpu") if begun == "gpu" else ("in memory or on disk", "--kv cpu or disk")
    raise ConfigError(
        f"{results}: its results are of a job with the KV cache {place}, so that the {begun} attended, not the {now}, "
        f"whose results differ in bits. Run it with {way}, or auto, or name another file with -o"
    )


def store_fingerprint(folder: Path) -> str:
    """xxh3_128 over the files beside the blocks: the manifest, which has the blocks' checksums, the
    configuration and the tokenizer. Not over what plans keep there, which follows from these."""
    digest = xxhash.xxh3_128()
    files = (path for path in folder.iterdir() if not path.name.startswith(STORE_SHAPE_NAME) and path.is_file())
    for path in sorted(files):
        # In pieces, as any file that lies there counts, however large it is.
        digest.update(f"{path.name}\0{check_regular(path, StoreError)}\0".encode())
        with reading(path), path.open("rb") as file:
            while piece := file.read(_PIECE_NBYTES):
                digest.update(piece)
    return digest.hexdigest()


def _shown(value: Setting) -> str:
    return "unset" if value is None else str(value)


def _as(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected a {kind.__name__}, found {value!r}")
    return value
