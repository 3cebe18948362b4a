"""The checksums of a checkpoint's files, against a list of them as `md5sum` writes it."""

import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from tiered.convert.workers import worker_count
from tiered.errors import CheckpointError, ConfigError, CorruptError, some
from tiered.files import MOST_JSON_NBYTES, read_whole, reading

_LINE: Final = re.compile(r"(?P<md5>[0-9a-fA-F]{32})\s+\*?(?P<path>\S.*)")


def check_md5(listed: Path, files: Mapping[str, Path]) -> None:
    """Test `files` by the list `listed`; raises CheckpointError, which names those that differ, and ConfigError where
    the list lacks one of them, or is none."""
    try:
        text = read_whole(listed, CorruptError, MOST_JSON_NBYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        raise ConfigError(f"{listed}: no such file; expected a list of checksums, as md5sum writes it") from None
    matches = filter(None, (_LINE.fullmatch(line.strip()) for line in text.splitlines()))
    expected = {Path(match["path"]).name: match["md5"].lower() for match in matches}
    unlisted = sorted(files.keys() - expected.keys())
    if unlisted:
        raise ConfigError(
            f"{listed}: has no checksum of {some(unlisted)}; expected a line for each weight file, MD5 and name"
        )
    with ThreadPoolExecutor(worker_count()) as pool:
        found = dict(zip(files, pool.map(_md5, files.values()), strict=True))
    wrong = sorted(name for name, md5 in found.items() if md5 != expected[name])
    if wrong:
        raise CheckpointError(
            f"{some([str(files[name]) for name in wrong])}: {len(wrong)} of {len(files)} files have another MD5 than "
            f"{listed} says; download them again"
        )


def _md5(path: Path) -> str:
    with reading(path), path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
