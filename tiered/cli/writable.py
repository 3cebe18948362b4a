"""Whether what a command is to write can be written, asked before it works."""

from collections.abc import Sequence
from pathlib import Path

from tiered.errors import ConfigError


def check_writable(option: str, path: Path, inputs: Sequence[str | Path] = ()) -> None:
    """Raise ConfigError, before any work, if the file of `option` could not be written after it, or is an input."""
    there = path.exists()
    try:
        if there and any(Path(text).exists() and path.samefile(text) for text in inputs):
            raise ConfigError(f"{option} {path}: is a text to score, and would be overwritten; name another file")
        path.open("a").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written: {error.strerror}; name another file") from None
