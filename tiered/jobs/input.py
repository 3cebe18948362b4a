"""The input of a job: read line by line as it is needed, known as a whole by its fingerprint.

`scan_input` goes through the file once before anything runs: it hashes all of it and finds the lines whose custom_id
an earlier line has. That takes 8 bytes per line while it lasts, and a bit per line afterwards.
"""

import os
import stat
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt
import xxhash

from tiered.errors import ConfigError
from tiered.files import errors_of
from tiered.jobs.request import Problem, custom_id_of, parse_object
from tiered.units import MIB

LONGEST_LINE_NBYTES: Final = 8 * MIB
"""Longer lines are refused; parsing one takes many times its size."""

Hash = Callable[[bytes], int]
OnBytes = Callable[[bytes], None]


@dataclass(frozen=True)
class Line:
    """One line as it lies in the file."""

    number: int
    """Counted from 1, blank lines included."""
    offset: int
    raw: bytes
    is_too_long: bool = False
    """Whether `raw` is only the beginning of the line."""

    @property
    def is_blank(self) -> bool:
        return not self.is_too_long and not self.raw.strip()


class LineSet:
    """A set of line numbers up to `most`, at a bit per line."""

    def __init__(self, most: int) -> None:
        self._bits = bytearray((most >> 3) + 1)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, line: int) -> bool:
        return bool(self._bits[line >> 3] >> (line & 7) & 1)

    def add(self, line: int) -> None:
        self._count += line not in self
        self._bits[line >> 3] |= 1 << (line & 7)


@dataclass(frozen=True)
class Input:
    """A file of requests as it was when the job began."""

    path: Path
    nbytes: int
    fingerprint: str
    """xxh3_128 of all bytes, in hexadecimal."""
    lines: int
    requests: int
    """Lines that are not blank."""
    duplicates: LineSet
    """Lines whose custom_id an earlier line has."""

    def read(self) -> Iterator[Line]:
        """The lines that are not blank, each read when it is asked for. Lines appended since are left out."""
        with open_input(self.path) as file, errors_of(self.path):
            yield from (line for line in read_lines(file, self.nbytes) if not line.is_blank)


def open_input(path: Path) -> BinaryIO:
    """Open a file of requests; raises ConfigError where it is no regular file or cannot be read."""
    if str(path) == "-":
        raise ConfigError("-i -: a job needs a regular file to be started again; write standard input to one first")
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its other end.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"-i {path}: cannot be read: {error.strerror}; pass a file of requests") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(
            f"-i {path}: not a regular file, which a job needs to be started again; write it to one first"
        )
    return os.fdopen(fd, "rb")


def read_lines(file: BinaryIO, nbytes: int, on_bytes: OnBytes = lambda _: None) -> Iterator[Line]:
    """All lines in the next `nbytes` bytes of `file`, blank ones too. `on_bytes` is called with every byte."""
    offset = number = 0
    while offset < nbytes:
        raw = file.readline(min(LONGEST_LINE_NBYTES + 1, nbytes - offset))
        if not raw:
            return
        on_bytes(raw)
        number, start, offset = number + 1, offset, offset + len(raw)
        is_too_long = len(raw) > LONGEST_LINE_NBYTES
        piece = raw
        while is_too_long and not piece.endswith(b"\n") and offset < nbytes:
            piece = file.readline(min(MIB, nbytes - offset))
            if not piece:
                break
            on_bytes(piece)
            offset += len(piece)
        yield Line(number, start, raw[:100] if is_too_long else raw, is_too_long)


def scan_input(
    path: Path, on_progress: Callable[[int, int], None] = lambda done, total: None, hash_id: Hash | None = None
) -> Input:
    """Read all of the file at `path`; `on_progress` is called now and then with the bytes done and the bytes in all.

    Raises ConfigError where it cannot be read. `hash_id` stands in for the 64-bit hash in tests.
    """
    hash_id = hash_id or xxhash.xxh3_64_intdigest
    digest, hashes, lines, requests = xxhash.xxh3_128(), array("Q"), 0, 0
    with open_input(path) as file, errors_of(path):
        nbytes = os.fstat(file.fileno()).st_size
        for line in read_lines(file, nbytes, digest.update):
            lines, requests = line.number, requests + (not line.is_blank)
            if (custom_id := _custom_id(line)) is not None:
                hashes.append(hash_id(custom_id.encode()))
            if lines % 1000 == 0:
                on_progress(line.offset, nbytes)
        repeated = _repeated(hashes)
        del hashes  # which is most of the memory that a line takes
        duplicates = LineSet(lines)
        if len(repeated):
            for number in _duplicates(path, nbytes, repeated, hash_id):
                duplicates.add(number)
    return Input(path, nbytes, digest.hexdigest(), lines, requests, duplicates)


def _custom_id(line: Line) -> str | None:
    if line.is_blank or line.is_too_long:
        return None
    value = parse_object(line.raw, line.number)
    return None if isinstance(value, Problem) else custom_id_of(value)


def _repeated(hashes: "array[int]") -> npt.NDArray[np.uint64]:
    """The hashes that occur more than once, ascending. Sorts `hashes` in place."""
    if not hashes:
        return np.empty(0, np.uint64)
    values = np.frombuffer(hashes, np.uint64)
    values.sort()
    again = values[1:] == values[:-1]
    # Of equal neighbours, the second one stands for all.
    again[1:] &= ~again[:-1].copy()
    repeated: npt.NDArray[np.uint64] = values[1:][again]
    return repeated


def _duplicates(path: Path, nbytes: int, repeated: npt.NDArray[np.uint64], hash_id: Hash) -> Iterator[int]:
    """Numbers of the lines whose custom_id, not only its hash, an earlier line has."""
    first = np.full(len(repeated), -1, np.int64)
    """Offset of the first line with each hash."""
    others: set[str] = set()
    """Other custom_ids with one of these hashes; by chance there is next to none."""
    with open_input(path) as file, open_input(path) as again, errors_of(path):
        # A custom_id that very many lines have is not read again for each of them.
        custom_id_at = lru_cache(maxsize=64)(partial(_custom_id_at, again))
        for line in read_lines(file, nbytes):
            custom_id = _custom_id(line)
            if custom_id is None:
                continue
            found = np.uint64(hash_id(custom_id.encode()))
            place = int(np.searchsorted(repeated, found))
            if place == len(repeated) or repeated[place] != found:
                continue
            if first[place] < 0:
                first[place] = line.offset
            elif custom_id == custom_id_at(int(first[place])) or custom_id in others:
                yield line.number
            else:
                others.add(custom_id)


def _custom_id_at(file: BinaryIO, offset: int) -> str | None:
    file.seek(offset)
    # A byte-order mark is removed from the first line only.
    return _custom_id(Line(1 if offset == 0 else 2, offset, file.readline(LONGEST_LINE_NBYTES + 1)))
