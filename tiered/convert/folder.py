"""The output folder: what state it is in, the progress file that lets a conversion resume, and what may be deleted.

missing or empty   a new conversion may begin
unfinished         conversion.json and no manifest: the same command resumes
finished           a manifest (conversion.json may still be there: killed between the last two steps)
foreign            anything else: never touched, not even with --force
"""

import fcntl
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from tiered.convert.blocks import BLOCK_FOLDER
from tiered.convert.compression import PROBE_NAME, Compression
from tiered.errors import ConfigError, StoreError
from tiered.files import read_json
from tiered.plan.shapes import STORE_SHAPE_NAME
from tiered.store import atomic_write
from tiered.store.beside import COPIED
from tiered.store.manifest import FORMAT, MANIFEST_NAME
from tiered.store.open import PROGRESS_NAME, UPGRADE_NAME

State = Literal["new", "unfinished", "finished", "foreign"]

_PROGRESS_FORMAT: Final = "tiered-conversion"
_PROGRESS_VERSION: Final = 1
_REMEDY: Final = "delete the folder or choose another with -o"


@dataclass(frozen=True)
class ProgressFile:
    """conversion.json: what an unfinished conversion was asked to do, and what a resumed one has to know."""

    settings: Mapping[str, Any]
    source: Mapping[str, Any] | None = None
    """None while the source is still being opened."""
    compression: Compression | None = None
    downloaded: tuple[str, ...] = ()
    """Files fetched by this conversion, which it may delete again."""
    discarding: bool = False
    """Blocks of an earlier conversion are being deleted: none of them may count as finished."""

    def save(self, folder: Path) -> "ProgressFile":
        """Write it durably; the folder is created where it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        value = {
            "format": _PROGRESS_FORMAT,
            "version": _PROGRESS_VERSION,
            "settings": dict(self.settings),
            "source": None if self.source is None else dict(self.source),
            "compression": None if self.compression is None else self.compression.to_json(),
            "downloaded": list(self.downloaded),
            "discarding": self.discarding,
        }
        atomic_write(folder / PROGRESS_NAME, json.dumps(value, indent=1) + "\n")
        return self

    @classmethod
    def load(cls, folder: Path) -> "ProgressFile | None":
        """The folder's progress file; None where there is none.

        Raises ConfigError where there is one that this version cannot have written.
        """
        path = folder / PROGRESS_NAME
        try:
            value = read_json(path, StoreError, _REMEDY)
            if (value["format"], value["version"]) != (_PROGRESS_FORMAT, _PROGRESS_VERSION):
                raise ValueError(f"format {value['format']!r} version {value['version']!r}")
            rule = value["compression"]
            return cls(
                dict(value["settings"]),
                None if value["source"] is None else dict(value["source"]),
                None if rule is None else Compression.from_json(rule),
                tuple(map(str, value["downloaded"])),
                bool(value["discarding"]),
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, StoreError) as error:
            reason = str(error).removesuffix(f"; {_REMEDY}")
            raise ConfigError(
                f"{path}: not a progress file that this version of tiered wrote ({reason}); {_REMEDY}"
            ) from None


def state_of(folder: Path) -> State:
    """What `folder` is to a conversion."""
    if not folder.exists():
        return "new"
    if not folder.is_dir():
        return "foreign"
    if is_store(folder):
        return "finished"
    if (folder / PROGRESS_NAME).exists():
        return "unfinished"
    # The first write of a conversion killed half-way leaves only this.
    left = {path.name for path in folder.iterdir()} - {PROGRESS_NAME + ".part"}
    return "foreign" if left else "new"


def check_usable(folder: Path, settings: Mapping[str, Any], force: bool) -> ProgressFile | None:
    """The progress to resume from, or None for a fresh start; raises ConfigError where neither is allowed.

    With `force` what is in the way is marked for deletion, but a conversion that the same command began is resumed.
    """
    state = state_of(folder)
    if not folder.exists():
        parent = next(path for path in folder.absolute().parents if path.exists())
        if not parent.is_dir():
            raise ConfigError(f"{folder}: {parent} is a file, expected a folder; choose another with -o")
    if state == "foreign":
        raise ConfigError(
            f"{folder}: neither empty nor a store nor an unfinished conversion, so nothing in it is touched: "
            "choose another folder with -o"
        )
    try:
        progress = ProgressFile.load(folder)
    except ConfigError:
        if not force:
            raise
        return ProgressFile(settings, discarding=True)
    reason = None
    if state == "finished" and (progress is None or progress.discarding or progress.source is None):
        reason = "already a finished store; replace it with --force, or choose another with -o"
    elif progress is not None and dict(progress.settings) != dict(settings):
        reason = (
            f"holds a conversion with other settings ({_difference(progress.settings, settings)}); "
            "repeat those to resume it, start over with --force, or choose another folder with -o"
        )
    if reason is not None and "tokenizer" in settings:
        # Nobody is to convert for hours again for the sake of a small file.
        reason += f"; a finished store gets a tokenizer by 'tiered convert {shlex.quote(str(folder))} --tokenizer PATH'"
    return progress if reason is None else _start_over(folder, progress, settings, reason, force)


def check_same_source(folder: Path, progress: ProgressFile, identity: Mapping[str, Any], force: bool) -> ProgressFile:
    """The progress to go on with. Where the conversion in `folder` was of another checkpoint, that is a new start with
    `force`, and a ConfigError without."""
    if progress.source is None or dict(progress.source) == dict(identity):
        return progress
    reason = (
        f"holds a conversion of another checkpoint ({_difference(progress.source, identity)}); "
        "start over with --force, or choose another folder with -o"
    )
    return _start_over(folder, progress, progress.settings, reason, force)


def _start_over(
    folder: Path, progress: ProgressFile | None, settings: Mapping[str, Any], reason: str, force: bool
) -> ProgressFile:
    if not force:
        raise ConfigError(f"{folder}: {reason}")
    # The earlier conversion's downloads stay recorded, so that they can still be deleted.
    return ProgressFile(settings, downloaded=() if progress is None else progress.downloaded, discarding=True)


def discard(folder: Path, progress: ProgressFile) -> ProgressFile:
    """Delete what an earlier conversion left in `folder`, and nothing else. After a kill the next attempt goes on."""
    progress = replace(progress, discarding=True).save(folder)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    for path in owned_files(folder):
        path.unlink()
    return replace(progress, discarding=False).save(folder)


def owned_files(folder: Path) -> Iterator[Path]:
    """The files in `folder` that a conversion wrote, besides manifest and progress file."""
    blocks = folder / BLOCK_FOLDER
    if blocks.is_dir():
        yield from sorted(p for p in blocks.iterdir() if p.name.endswith((".safetensors", ".safetensors.part")))
    for name in COPIED:
        yield from (path for path in (folder / name, folder / f"{name}.part") if path.is_file())
    yield from (folder / name for name in (PROBE_NAME, UPGRADE_NAME) if (folder / name).is_file())
    # With what a process that was killed left half-written.
    yield from (path for path in sorted(folder.glob(f"{STORE_SHAPE_NAME}*")) if path.is_file())


def remove_stray_parts(folder: Path) -> None:
    """Delete what killed attempts left half-written."""
    for path in owned_files(folder):
        if path.name.endswith(".part"):
            path.unlink()
    for name in (MANIFEST_NAME, PROGRESS_NAME, UPGRADE_NAME):
        (folder / f"{name}.part").unlink(missing_ok=True)


def remove_strays(folder: Path, keep: frozenset[str]) -> None:
    """Delete what is half-written, blocks that are not in `keep` (paths within the folder), and what an unfinished
    upgrade has left."""
    remove_stray_parts(folder)
    (folder / UPGRADE_NAME).unlink(missing_ok=True)
    for path in owned_files(folder):
        if path.parent.name == BLOCK_FOLDER and path.relative_to(folder).as_posix() not in keep:
            path.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other conversions out of `folder`, which exists; the lock ends with the process."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder}: another conversion is writing to it; wait for it or stop it") from None
        yield
    finally:
        os.close(fd)


def is_store(folder: Path) -> bool:
    """Whether `folder` holds a finished store, of whatever version."""
    try:
        value = read_json(folder / MANIFEST_NAME, StoreError, _REMEDY)
    except (FileNotFoundError, StoreError):
        return False
    return isinstance(value, dict) and value.get("format") == FORMAT


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(f"{key} {before.get(key)!r} there, {now.get(key)!r} now" for key in keys)
