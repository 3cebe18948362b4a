"""Where a checkpoint's files are: in a local folder, or on the hub, from where they are fetched as blocks need them.

In: a folder or a hub id. Out: its files by name, which `index.py` looks through and `checkpoint.py` reads. For the hub,
huggingface_hub does the work, so HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what its documentation says.
"""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import huggingface_hub
import xxhash
from huggingface_hub import errors

from tiered.convert.folder import state_of
from tiered.convert.recipe import ConvertOptions
from tiered.errors import CheckpointError, ConfigError, ReadError
from tiered.files import check_regular, read_whole, reading

_SAMPLES: Final = 64
_SAMPLE_NBYTES: Final = 4096
_MODEL_FILE: Final = re.compile(r".*\.(safetensors|bin|gguf|json|jinja|model|txt)")
GGUF_PART: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
"""A part of a model in GGUF: its name, the part's number from 1 on, and how many there are."""
_CACHED_MODEL: Final = "models--"
"""How huggingface_hub's cache begins the name of a model's folder; "--" stands for the slash of its id."""
_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin")
# Base of what its HTTP client raises, whichever client that is.
_HTTPError: Final = errors.HTTPError  # type: ignore[attr-defined]


class Ledger(Protocol):
    """Remembers across attempts which files this conversion fetched."""

    @property
    def downloaded(self) -> frozenset[str]: ...

    def enter_download(self, name: str) -> None: ...


class WeightFiles(Protocol):
    """The files of one checkpoint, weights and others."""

    @property
    def kind(self) -> str:
        """Where the files are: "folder" or "hub"."""

    @property
    def name(self) -> str:
        """What the checkpoint is called."""

    @property
    def revision(self) -> str | None:
        """The commit on the hub; None for a folder."""

    @property
    def names(self) -> frozenset[str]:
        """The names of all files, on this machine or not."""

    def config_folder(self) -> Path:
        """The folder that holds config.json, if the checkpoint has one."""

    def is_here(self, name: str) -> bool:
        """Whether the file is on this machine, so that `path` fetches nothing."""

    def path(self, name: str) -> Path:
        """Where the file is, after fetching it where needed."""

    def read(self, name: str) -> bytes:
        """The contents of a small file."""

    def room_nbytes(self, names: Iterable[str]) -> Mapping[Path, int]:
        """Bytes of disk that fetching the missing ones of `names` takes, by the folder they are fetched to."""

    def release(self, name: str) -> None:
        """The conversion needs this file no more."""

    def fingerprint(self, names: Iterable[str]) -> str:
        """A digest of the named files' contents, made without reading them whole; copies have the same."""


@dataclass(frozen=True)
class Folder:
    """A local folder with a checkpoint."""

    path: Path
    only: str | None = None
    """A file of the checkpoint that is meant, where there may be several."""

    @property
    def name(self) -> str:
        """The model's name: the folder's, or in huggingface_hub's cache the repository's; or that of a file in GGUF."""
        if self.only is not None and self.only.endswith(".gguf"):
            return gguf_name(self.only)
        real = self.path.resolve()
        cached = _cached_repository(real)
        return real.name if cached is None else cached.name.removeprefix(_CACHED_MODEL).rpartition("--")[2]

    def open(self, options: ConvertOptions, ledger: Ledger) -> WeightFiles:
        """The folder's files; raises ConfigError for a store, and for options that are about downloads."""
        if state_of(self.path) in ("finished", "unfinished"):
            raise ConfigError(f"{self.path}: a tiered store; pass the checkpoint to convert")
        if options.revision is not None or options.delete_downloads:
            raise ConfigError(f"{self.path}: a local folder; --revision and --delete-downloads are for hub ids")
        return LocalFiles(self)


@dataclass(frozen=True)
class HubId:
    """A repository on the hub."""

    repo_id: str

    @property
    def name(self) -> str:
        return self.repo_id.rsplit("/", 1)[-1]

    def open(self, options: ConvertOptions, ledger: Ledger) -> WeightFiles:
        """The files of the revision that `options` ask for; downloads of weights are entered in `ledger` first."""
        if options.md5 is not None:
            raise ConfigError(
                f"{self.repo_id}: a hub id; --md5 is for folders, the hub's files are tested as they come"
            )
        return HubFiles(self.repo_id, options.revision, ledger, delete=options.delete_downloads)


class LocalFiles:
    """The files directly inside one folder. They are only read, never changed."""

    kind = "folder"
    revision: str | None = None

    def __init__(self, place: Folder) -> None:
        self._folder, self.name = place.path, place.name
        with reading(place.path):
            # Folders with the name of a model's file are listed too, so that `path` refuses them with an error.
            found = [path for path in place.path.iterdir() if not path.is_dir() or _MODEL_FILE.fullmatch(path.name)]
        self.names = frozenset(path.name for path in found)
        self._found_good: set[str] = set()
        self._made: dict[str, bytes] = {}

    def leave_out_all_but(self, names: Collection[str]) -> None:
        """Have no files but `names`, and be called by the first: what lies beside them is another checkpoint's."""
        self.names &= frozenset(names)
        self.name = min(names)

    def make(self, name: str, content: bytes) -> None:
        """Have a file that the folder lacks."""
        self._made[name] = content
        self.names |= {name}

    def config_folder(self) -> Path:
        if "config.json" in self.names:
            self.path("config.json")  # checks that it is a regular file
        return self._folder

    def is_here(self, name: str) -> bool:
        return True

    def path(self, name: str) -> Path:
        path = self._folder / name
        if name not in self.names:
            raise CheckpointError(f"{path}: missing; the checkpoint's index lists it")
        if name not in self._found_good:  # asked for once per tensor, of which there may be thousands
            check_regular(path, CheckpointError)
            _check_link(path)
            self._found_good.add(name)
        return path

    def read(self, name: str) -> bytes:
        return self._made[name] if name in self._made else read_whole(self.path(name), CheckpointError)

    def room_nbytes(self, names: Iterable[str]) -> Mapping[Path, int]:
        return {}

    def release(self, name: str) -> None:
        """Does nothing: the user's own files stay."""

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


class HubFiles:
    """The files of one revision of a repository, which is pinned to its commit when this is made."""

    kind = "hub"

    def __init__(self, repo_id: str, revision: str | None, ledger: Ledger, *, delete: bool) -> None:
        self.name, self._ledger, self._delete = repo_id, ledger, delete
        with explained(repo_id, revision):
            try:
                self.revision, self._sizes = _list_online(repo_id, revision)
            except errors.HfHubHTTPError:
                raise  # the hub has answered
            except (errors.OfflineModeIsEnabled, _HTTPError):
                self.revision, self._sizes = _list_cache(repo_id, revision)
        self.names = frozenset(self._sizes)

    def config_folder(self) -> Path:
        return self.path("config.json").parent

    def is_here(self, name: str) -> bool:
        return self._cached(name) is not None

    def path(self, name: str) -> Path:
        cached = self._cached(name)
        if cached is not None:
            return cached
        if name.endswith(_WEIGHT_SUFFIXES) and name not in self._ledger.downloaded:
            self._ledger.enter_download(name)  # first: a kill while downloading must not forget it
        with explained(self.name, self.revision):
            return Path(huggingface_hub.hf_hub_download(self.name, name, revision=self.revision))

    def read(self, name: str) -> bytes:
        return read_whole(self.path(name), CheckpointError)

    def room_nbytes(self, names: Iterable[str]) -> Mapping[Path, int]:
        sizes = sorted((self._sizes[name] or 1 for name in set(names) if not self.is_here(name)), reverse=True)
        # Where files are deleted after use, at most three are here at once: two that one block straddles, and the one
        # that holds the first tensors outside the layers.
        nbytes = sum(sizes[:3] if self._delete else sizes)
        return {Path(huggingface_hub.constants.HF_HUB_CACHE): nbytes} if nbytes else {}

    def release(self, name: str) -> None:
        pointer = self._cached(name)
        if not self._delete or pointer is None or name not in self._ledger.downloaded:
            return
        snapshots, blob = pointer.parents[len(Path(name).parts)], _target(pointer)
        pointer.unlink()
        if blob is not None and all(_target(other) != blob for other in snapshots.rglob("*")):
            _delete_blob(blob)

    def fingerprint(self, names: Iterable[str]) -> str:
        return xxhash.xxh3_128_hexdigest("\0".join([self.name, self.revision, *sorted(names)]).encode())

    def _cached(self, name: str) -> Path | None:
        found = huggingface_hub.try_to_load_from_cache(self.name, name, revision=self.revision)
        return Path(found) if isinstance(found, str) else None


def gguf_name(file: str) -> str:
    """What the model in `file` is called: the file without its number among parts and its ending."""
    match = GGUF_PART.fullmatch(file)
    return match[1] if match else file.removesuffix(".gguf")


def _cached_repository(real: Path) -> Path | None:
    """The folder of the hub's cache (models--OWNER--NAME) of which `real` is a snapshot or within one."""
    for snapshots in real.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith(_CACHED_MODEL):
            return snapshots.parent
    return None


def _check_link(path: Path) -> None:
    """Raise CheckpointError where `path` is a link out of its folder, other than into the blobs of the hub's cache.

    A store may be given to others: a model folder from elsewhere must not get the user's own files copied into it.
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


def _target(link: Path) -> Path | None:
    """What `link` points to, one step on; None where it is no link."""
    return Path(os.path.normpath(link.parent / link.readlink())) if link.is_symlink() else None


def _delete_blob(blob: Path) -> None:
    """Delete a repository's blob. Where it is a link to a blob that the whole cache shares, delete that as well, unless
    another repository links to it."""
    shared = _target(blob)
    blob.unlink(missing_ok=True)
    if shared is not None and all(_target(other) != shared for other in blob.parents[2].glob("*/blobs/*")):
        shared.unlink(missing_ok=True)


def _list_online(repo_id: str, revision: str | None) -> tuple[str, dict[str, int | None]]:
    info = huggingface_hub.HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    if "config.json" in sizes:
        # By the name of the revision, so that the cache can resolve this name when the hub is out of reach.
        huggingface_hub.hf_hub_download(repo_id, "config.json", revision=revision)
    return str(info.sha), sizes


def _list_cache(repo_id: str, revision: str | None) -> tuple[str, dict[str, int | None]]:
    """Commit and files of what the cache holds; enough where an earlier download was complete."""
    config = Path(huggingface_hub.hf_hub_download(repo_id, "config.json", revision=revision, local_files_only=True))
    snapshot = config.parent
    return snapshot.name, {path.name: path.stat().st_size for path in snapshot.iterdir() if path.is_file()}


@contextmanager
def explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the library's exceptions into ours."""
    try:
        yield
    except errors.GatedRepoError:
        raise ConfigError(
            f"{repo_id}: its owners grant access on request; accept the conditions on its page, "
            "then set HF_TOKEN to a token of that account"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"{repo_id}: no such folder, and no such repository on the hub (or a private one: set HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise ConfigError(f"{repo_id}: has no revision {revision!r}; pass a branch, tag or commit of it") from None
    except errors.HFValidationError as error:
        raise ConfigError(f"{repo_id}: not a hub id ({error})") from None
    except errors.LocalEntryNotFoundError as error:
        raise ReadError(
            f"{repo_id}: the hub cannot be reached (or HF_HUB_OFFLINE is set) and a file is not in the cache; "
            f"run the same command again once it can ({error})"
        ) from error
    except errors.EntryNotFoundError as error:
        raise CheckpointError(f"{repo_id}: lacks a file the conversion needs ({error})") from error
    except (errors.OfflineModeIsEnabled, _HTTPError) as error:
        raise ReadError(f"{repo_id}: downloading failed ({error}); run the same command again to resume") from error
