"""Checksums on the way in: a chunk is tested in the reader thread that completes it, before anyone computes on it."""

import threading
from collections import defaultdict
from enum import Enum
from pathlib import Path

from tiered.errors import StoreError
from tiered.store import FileInfo, RowLayout, hash_chunk
from tiered.trace import Tracer


class VerifyPolicy(Enum):
    """When a chunk's checksum is tested."""

    FIRST = "first"
    ALWAYS = "always"
    NEVER = "never"


class ChunkVerifier:
    """Remembers which chunks of which files have been found good."""

    def __init__(self, policy: VerifyPolicy, trace: Tracer, folder: Path = Path()) -> None:
        """`folder` is the store's, for errors to name."""
        self._policy, self._folder = policy, folder
        self._trace = trace
        self._good: defaultdict[str, set[int]] = defaultdict(set)
        self._lock = threading.Lock()

    def wants(self, file: FileInfo, chunk: int) -> bool:
        """Whether this chunk has to be tested when it is read now."""
        if self._policy is VerifyPolicy.NEVER:
            return False
        if self._policy is VerifyPolicy.ALWAYS:
            return True
        with self._lock:
            return chunk not in self._good[file.path]

    def check(self, file: FileInfo, chunk: int, data: memoryview) -> None:
        """Test `data`, the whole of one chunk; raises StoreError naming file and chunk."""
        with self._trace.span("verify", f"{file.path}#{chunk}", data.nbytes):
            found = hash_chunk(data)
        expected = file.chunks[chunk]
        if found != expected.checksum:
            raise StoreError(
                f"{self._folder / file.path}: chunk {chunk} (bytes {expected.offset:,} to {expected.stop:,}) is "
                f"corrupt: expected xxh3 {expected.checksum}, found {found}; see 'tiered verify', then convert the "
                "model again"
            )
        with self._lock:
            self._good[file.path].add(chunk)

    def check_row(self, file: FileInfo, layout: RowLayout, row: int, record: memoryview) -> None:
        """Test `record`, row number `row` of a table with a checksum in each row, unless nothing is to be tested;
        raises StoreError naming file and row. It is cheaper to test a row again than to know that it has been."""
        if self._policy is not VerifyPolicy.NEVER and not layout.is_good(record, row):
            raise StoreError(
                f"{self._folder / file.path}: row {row:,} is corrupt: its checksum does not fit its {len(record):,} "
                "bytes; see 'tiered verify', then convert the model again"
            )
