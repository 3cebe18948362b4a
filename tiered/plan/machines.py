"""Machines by name: the profile of this one for a folder's disk, the files of configs/hardware, or any file like them.

In: a folder, a name or a path. Out: a `Hardware`, or an error that says what to run. A profile is kept in the user's
cache folder, one per machine and file system, as the disk is half of it. `bench/profile.py` measures one.
"""

import contextlib
import os
import platform
import re
from pathlib import Path
from typing import Final

import tomli_w

from tiered.configs_path import config_dir
from tiered.errors import ConfigError
from tiered.plan.hardware import Hardware
from tiered.plan.system import SYS, cpu

_MOST_NBYTES: Final = 1 << 20
"""Nobody describes a machine in more."""
_MACHINE_ID: Final = Path("/etc/machine-id")
_ID_LENGTH: Final = 8


def load_hardware(name_or_path: str) -> Hardware:
    """The machine of that name in configs/hardware, or of the file at that path: whatever has a slash or ends in .toml.

    Raises ConfigError for an unknown name, listing the known ones, and for a file that describes no machine.
    """
    if "/" in name_or_path or name_or_path.endswith(".toml"):
        return _load(Path(name_or_path))
    known = hardware_files()
    if name_or_path not in known:
        raise ConfigError(
            f"machine {name_or_path!r}: expected the path of a .toml file, or one of {', '.join(known) or 'none'}"
        )
    return _load(known[name_or_path])


def hardware_files() -> dict[str, Path]:
    """The files of configs/hardware by name, in alphabetical order."""
    return {path.stem: path for path in sorted((config_dir() / "hardware").glob("*.toml"))}


def find_profile(folder: Path) -> Hardware | None:
    """The profile of this machine for the file system of `folder` (or of a file); None where none has been measured.

    Raises ConfigError where the profile is damaged or of another format, and where there is no such folder.
    """
    path = profile_path(folder)
    if not path.exists():
        return None
    try:
        return _load(path)
    except ConfigError as error:
        raise ConfigError(f"{error}; measure it again: tiered profile --dir {folder}") from None


def profile_path(folder: Path) -> Path:
    """Where the profile for the file system of `folder` is kept, measured or not; ConfigError if there is no folder."""
    return profiles_folder() / f"{_slug(cpu().model)}-{_host_id()}-{_device_of(folder)}.toml"


def profiles_folder() -> Path:
    """tiered/profiles in the user's cache folder: $XDG_CACHE_HOME, else ~/.cache."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    # The specification: a path that is not absolute counts as none.
    base = Path(chosen) if chosen.startswith("/") else Path("~/.cache").expanduser()
    return base / "tiered/profiles"


def save_hardware(hardware: Hardware, path: Path) -> None:
    """Write `hardware` as TOML; whatever was at `path` stays until all is written. Raises OSError naming the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        part.write_text(tomli_w.dumps(hardware.to_tables()), encoding="utf-8")
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _load(path: Path) -> Hardware:
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: expected a file that describes a machine, found none")
        nbytes = path.stat().st_size
        if nbytes > _MOST_NBYTES:
            raise ConfigError(f"{path}: has {nbytes:,} bytes, expected a description of at most {_MOST_NBYTES:,}")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no text in UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return Hardware.from_toml(text, str(path))


def _host_id() -> str:
    """What tells this machine from others with the same processor."""
    try:
        found = _MACHINE_ID.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        found = platform.node()
    return _slug(found)[:_ID_LENGTH]


def _device_of(path: Path) -> str:
    """The device of the file system of `path`: "nvme0n1p2", or its number where no block device is below it."""
    try:
        device = path.stat().st_dev
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a store, or a folder on the disk that is meant") from error
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        return _slug((SYS / "dev/block" / number).readlink().name)
    return _slug(number)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.strip().lower()).strip("-") or "unknown"
