"""Whether what a command is to write can be written, asked before it works."""

from collections.abc import Sequence
from pathlib import Path

from tiered.errors import ConfigError


def check_writable(option: str, path: Path, inputs: Sequence[str | Path] = (), makes_folder: bool = False) -> None:
    """Raise ConfigError, before any work, if the file of `option` could not be written after it, or is an input. Its
    folder is made where `makes_folder`, else it must be there."""
    there = path.exists()
    try:
        if makes_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        if there and any(Path(text).exists() and path.samefile(text) for text in inputs):
            raise ConfigError(f"{option} {path}: is a text to score, and would be overwritten; name another file")
        path.open("a").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written: {error.strerror}; name another file") from None
