"""A checkpoint's files on the hub: fetched one by one as blocks need them, and on request removed again.

huggingface_hub does the work, so HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what its documentation says.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

import huggingface_hub
import xxhash
from huggingface_hub import errors

from tiered.errors import CheckpointError, ConfigError, ReadError

# Base of what its HTTP client raises, whichever client that is.
_HTTPError: Final = errors.HTTPError  # type: ignore[attr-defined]
_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin")


class Ledger(Protocol):
    """Remembers across attempts which files this conversion fetched."""

    @property
    def downloaded(self) -> frozenset[str]: ...

    def enter_download(self, name: str) -> None: ...


class HubFiles:
    """The files of one revision of a repository, which is pinned to its commit when this is made."""

    kind = "hub"

    def __init__(self, repo_id: str, revision: str | None, ledger: Ledger, *, delete: bool) -> None:
        self._repo_id, self._ledger, self._delete = repo_id, ledger, delete
        with _explained(repo_id, revision):
            try:
                self._commit, self._sizes = _list_online(repo_id, revision)
            except errors.HfHubHTTPError:
                raise  # the hub has answered
            except (errors.OfflineModeIsEnabled, _HTTPError):
                self._commit, self._sizes = _list_cache(repo_id, revision)

    @property
    def name(self) -> str:
        return self._repo_id

    @property
    def revision(self) -> str | None:
        return self._commit

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._sizes)

    def nbytes(self, name: str) -> int | None:
        return self._sizes[name]

    def is_here(self, name: str) -> bool:
        return self._cached(name) is not None

    def path(self, name: str) -> Path:
        cached = self._cached(name)
        if cached is not None:
            return cached
        if name.endswith(_WEIGHT_SUFFIXES) and name not in self._ledger.downloaded:
            self._ledger.enter_download(name)  # first: a kill while downloading must not forget it
        with _explained(self._repo_id, self._commit):
            return Path(huggingface_hub.hf_hub_download(self._repo_id, name, revision=self._commit))

    def release(self, name: str) -> None:
        pointer = self._cached(name)
        if not self._delete or pointer is None or name not in self._ledger.downloaded:
            return
        snapshots, blob = pointer.parents[len(Path(name).parts)], _target(pointer)
        pointer.unlink()
        if blob is not None and all(_target(other) != blob for other in snapshots.rglob("*")):
            _delete_blob(blob)

    def fingerprint(self, names: Iterable[str]) -> str:
        return xxhash.xxh3_128_hexdigest("\0".join([self._repo_id, self._commit, *sorted(names)]).encode())

    def _cached(self, name: str) -> Path | None:
        found = huggingface_hub.try_to_load_from_cache(self._repo_id, name, revision=self._commit)
        return Path(found) if isinstance(found, str) else None


def cache_folder() -> Path:
    """Where huggingface_hub puts downloads."""
    return Path(huggingface_hub.constants.HF_HUB_CACHE)


def _target(link: Path) -> Path | None:
    """What `link` points to, one step on; None where it is no link."""
    return Path(os.path.normpath(link.parent / link.readlink())) if link.is_symlink() else None


def _delete_blob(blob: Path) -> None:
    """Delete a repository's blob, and where that is a link to what the whole cache shares, that as well, unless another
    repository has it too."""
    shared = _target(blob)
    blob.unlink(missing_ok=True)
    if shared is not None and all(_target(other) != shared for other in blob.parents[2].glob("*/blobs/*")):
        shared.unlink(missing_ok=True)


def _list_online(repo_id: str, revision: str | None) -> tuple[str, dict[str, int | None]]:
    info = huggingface_hub.HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    if "config.json" in sizes:
        # By the name of the revision, so that the cache knows what it means once the hub is out of reach.
        huggingface_hub.hf_hub_download(repo_id, "config.json", revision=revision)
    return str(info.sha), sizes


def _list_cache(repo_id: str, revision: str | None) -> tuple[str, dict[str, int | None]]:
    """Commit and files of what the cache holds; enough where an earlier download was complete."""
    config = Path(huggingface_hub.hf_hub_download(repo_id, "config.json", revision=revision, local_files_only=True))
    snapshot = config.parent
    return snapshot.name, {path.name: path.stat().st_size for path in snapshot.iterdir() if path.is_file()}


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
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
