"""Scrubbing: tests every checksum of a store, in parallel, at the speed of the disk, and goes on after damage.

In: a store's folder and manifest. Out: everything that is wrong, by file and chunk. `tiered verify` calls it.

Each thread takes the next chunk and reads it in pieces through a page-aligned buffer of its own, hashing each piece
while it is still in the processor's cache: memory is threads times one piece, whatever the store's size.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import xxhash

from tiered.errors import InterruptedRun, ReadError, StoreError
from tiered.io.arena import Arena, Slab
from tiered.io.transfer import PIECE_NBYTES, ByteCounter, Faults, Ladder, describe
from tiered.outcome import run_threads
from tiered.store import FileInfo, Manifest
from tiered.store.block import read_layout
from tiered.store.open import check_config_is_there

DEFAULT_THREADS: Final = 8

OnProgress = Callable[[int], None]
"""Called with the bytes read so far, a few times a second, in the caller's thread."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `chunk` and its byte range [start, stop) are None where the whole file is meant."""

    file: str
    problem: str
    is_corrupt: bool
    """The bytes are wrong or missing; False: the operating system could not read them."""
    chunk: int | None = None
    start: int | None = None
    stop: int | None = None
    expected: str | None = None
    found: str | None = None

    def __str__(self) -> str:
        if self.chunk is None:
            return self.problem
        return f"{self.file}: chunk {self.chunk} (bytes {self.start:,} to {self.stop:,}) {self.problem}"


@dataclass(frozen=True)
class ScrubReport:
    """What was read and what is wrong, in the order of the manifest."""

    files: int
    chunks: int
    bytes_read: int
    seconds: float
    read_mode: str | None
    refused: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def bytes_per_second(self) -> float:
        return self.bytes_read / self.seconds if self.seconds else 0.0

    @property
    def corrupt(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.is_corrupt)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "bytes_per_second": self.bytes_per_second}


def check_headers(folder: Path, manifest: Manifest) -> list[Finding]:
    """What is wrong with files before any data is read: missing, another size, no header, no block."""
    findings = []
    try:
        check_config_is_there(folder)
    except (StoreError, ReadError) as error:
        findings.append(_finding("config.json", error))
    for file in manifest.files:
        try:
            read_layout(folder, file)
        except (StoreError, ReadError) as error:
            findings.append(_finding(file.path, error))
    return findings


def _finding(file: str, error: StoreError | ReadError) -> Finding:
    return Finding(file, str(error), is_corrupt=isinstance(error, StoreError))


def scrub(
    folder: Path,
    manifest: Manifest,
    threads: int = DEFAULT_THREADS,
    on_progress: OnProgress | None = None,
    preadv: Faults = os.preadv,
) -> ScrubReport:
    """Test headers and every chunk of every file. KeyboardInterrupt ends it within one piece per thread."""
    began = time.perf_counter()
    findings = check_headers(folder, manifest)
    work = _Scrub(folder, manifest, preadv)
    work.run(threads, on_progress)
    # Whatever the threads' order was, a report reads like the manifest: by file, header first.
    order = {file.path: number for number, file in enumerate(manifest.files)}
    findings += work.findings
    findings.sort(key=lambda f: (order.get(f.file, -1), -1 if f.chunk is None else f.chunk))
    return ScrubReport(
        files=len(manifest.files),
        chunks=sum(len(file.chunks) for file in manifest.files),
        bytes_read=work.read_so_far.nbytes,
        seconds=time.perf_counter() - began,
        read_mode=None if work.ladder.mode is None else work.ladder.mode.value,
        refused=work.ladder.refused,
        findings=tuple(findings),
    )


class _Scrub:
    """The threads' shared state."""

    def __init__(self, folder: Path, manifest: Manifest, preadv: Faults) -> None:
        self._folder, self._preadv = folder, preadv
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self.findings: list[Finding] = []
        self.ladder, self.read_so_far = Ladder(), ByteCounter()
        self._chunks = self._readable_chunks(manifest)

    def run(self, threads: int, on_progress: OnProgress | None) -> None:
        with Arena(threads * PIECE_NBYTES) as arena:
            slabs = [arena.borrow(PIECE_NBYTES, "scrub") for _ in range(threads)]
            self._run_in(slabs, on_progress)
            for slab in slabs:
                arena.release(slab)
        if self._errors:
            raise self._errors[0]
        if on_progress is not None:
            on_progress(self.read_so_far.nbytes)

    def _run_in(self, slabs: Sequence[Slab], on_progress: OnProgress | None) -> None:
        """Run one thread per slab; when this returns or raises, no thread runs any more."""
        on_wait = None if on_progress is None else lambda: on_progress(self.read_so_far.nbytes)
        run_threads([partial(self._work, slab.view) for slab in slabs], self._stop, "tiered-scrub", on_wait)

    def _readable_chunks(self, manifest: Manifest) -> Iterator[tuple[FileInfo, int]]:
        """Chunks that lie entirely within the real size of their file; the header check reports the others."""
        for file in manifest.files:
            try:
                size = min((self._folder / file.path).stat().st_size, file.nbytes)
            except OSError:
                continue
            for number, chunk in enumerate(file.chunks):
                if chunk.stop <= size:
                    yield file, number

    def _next(self) -> tuple[FileInfo, int] | None:
        with self._lock:
            return None if self._stop.is_set() else next(self._chunks, None)

    def _work(self, memory: memoryview) -> None:
        try:
            while (item := self._next()) is not None:
                self._test(*item, memory)
        except InterruptedRun:
            return
        except BaseException as error:
            self._errors.append(error)
            self._stop.set()

    def _test(self, file: FileInfo, chunk: int, memory: memoryview) -> None:
        """Read one chunk and compare its checksum; what is wrong goes to the findings."""
        start, stop, expected = file.chunks[chunk].offset, file.chunks[chunk].stop, file.chunks[chunk].checksum
        try:
            found = self._hash(file, start, stop, memory)
        except OSError as error:
            problem = f"cannot be read: {describe(error)}"
            self._add(Finding(file.path, problem, False, chunk, start, stop, expected))
            return
        if found is None:
            problem = "ends early: the file was truncated just now"
            self._add(Finding(file.path, problem, True, chunk, start, stop, expected))
        elif found != expected:
            problem = f"is corrupt: expected xxh3 {expected}, found {found}"
            self._add(Finding(file.path, problem, True, chunk, start, stop, expected, found))

    def _hash(self, file: FileInfo, start: int, stop: int, memory: memoryview) -> str | None:
        """The checksum of bytes [start, stop), or None where the file ends before `stop`."""
        checksum = xxhash.xxh3_64()
        opened = self.ladder.open(self._folder / file.path)
        try:
            for position in range(start, stop, PIECE_NBYTES):
                piece = memory[: min(PIECE_NBYTES, stop - position)]
                if opened.transfer(self._preadv, position, piece, self._check, self.read_so_far) < piece.nbytes:
                    return None
                checksum.update(piece)
        finally:
            opened.close()
        return checksum.hexdigest()

    def _check(self) -> None:
        if self._stop.is_set():
            raise InterruptedRun("another thread has failed, or nobody waits for the report")

    def _add(self, finding: Finding) -> None:
        with self._lock:
            self.findings.append(finding)
