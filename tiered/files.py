"""Reading files that somebody else wrote: what they must be before they are opened, and errors that name them.

In: paths in a checkpoint's or a store's folder. Out: their bytes, or an error that names the file. A pipe would keep
the reader waiting and a device would never end, so only regular files are opened.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tiered.errors import CorruptError, ReadError, shortened

MOST_NBYTES: Final = 512 << 20
"""Largest file that is read whole; the largest in use, tokenizers and indexes, have some 40 MB."""
MOST_JSON_NBYTES: Final = 64 << 20
"""Largest JSON that we parse, as that takes many times its size; a huge model's manifest or index has a few MB."""
_KINDS: Final = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: Path, error: type[CorruptError]) -> int:
    """The size of the regular file at `path`, which may be a link to one.

    Raises FileNotFoundError where there is nothing at `path`, `error` where there is something else (or a link to
    nothing), and ReadError where the operating system cannot tell.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise error(
                f"{path}: a link to {path.readlink()}, which does not exist; put the file itself there"
            ) from None
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except OSError as reason:
        if reason.errno == errno.ELOOP:
            raise error(f"{path}: a link that leads back to itself; put the file itself there") from None
        raise ReadError(f"{path}: cannot be read: {reason.strerror}") from reason
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS if test(found.st_mode)), "something else")
        raise error(f"{path}: {kind}, expected a file; put the file itself there")
    return found.st_size


def read_whole(
    path: Path, error: type[CorruptError], most_nbytes: int = MOST_NBYTES, remedy: str = "download the file again"
) -> bytes:
    """The bytes of the regular file at `path`; raises as `check_regular`, and `error`, which ends with `remedy`, where
    it has more than `most_nbytes`."""
    nbytes = check_regular(path, error)
    if nbytes > most_nbytes:
        raise error(f"{path}: has {nbytes:,} bytes, expected at most {most_nbytes:,}; {remedy}")
    with reading(path):
        # Without O_NONBLOCK, opening a path that has become a pipe meanwhile would wait for the pipe's other end.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            return file.read(most_nbytes)


def read_json(path: Path, error: type[CorruptError], remedy: str) -> Any:
    """The value in the JSON file at `path`; raises as `read_whole`, and `error`, which ends with `remedy`, where it is
    not JSON in UTF-8."""
    return parse_json(read_whole(path, error, MOST_JSON_NBYTES, remedy), path, error, remedy)


def parse_json(raw: bytes | str, path: Path, error: type[CorruptError], remedy: str) -> Any:
    """The value in `raw`, the contents of `path`; raises as `read_json`."""
    try:
        return json.loads(raw if isinstance(raw, str) else raw.decode("utf-8"))
    except UnicodeDecodeError as reason:
        raise error(f"{path}: not text ({reason.reason} at byte {reason.start}, expected UTF-8); {remedy}") from None
    # ValueError: a number of thousands of digits; RecursionError: brackets that nest without end.
    except (ValueError, RecursionError) as reason:
        raise error(f"{path}: not valid JSON ({shortened(reason)}); {remedy}") from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses while `path` is read into a ReadError that names it.

    A FileNotFoundError is raised unchanged.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ReadError(f"{path}: cannot be read: {error.strerror or error}") from error


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Add `path` to errors of the operating system that name no file, as the error of a failed write."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
