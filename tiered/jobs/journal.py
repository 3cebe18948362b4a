"""The result file of a job: appended to line by line, durable line by line, owned by one process at a time.

At whatever moment a process is killed, every line but the last is whole. Opening the file again cuts a torn last line
off and finds out from the ids of the others which lines of the input are done.
"""

import errno
import fcntl
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

from tiered.errors import ConfigError, CorruptError, DiskFullError
from tiered.files import errors_of
from tiered.jobs.identity import Identity, JobFile, check_attention, check_same, job_path, read_job, write_job
from tiered.jobs.input import LineSet
from tiered.jobs.results import line_of_id
from tiered.store.write import fsync_folder

_OPEN: Final = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
"""Without O_NONBLOCK, opening a pipe would wait for its other end."""
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Journal:
    """An open result file. A context manager: the file is locked from entering to leaving.

    Entering raises ConfigError where another process has it locked, or it belongs to no job. Then call `begin`, then
    `append`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = LineSet(0)
        """Lines of the input that have a result."""
        self.failed = 0
        """How many of these results are errors."""
        self.sequences = 0
        """How many choices all other results have together."""
        self._fd = -1
        self._end = 0

    def __enter__(self) -> Self:
        try:
            self._fd = os.open(self.path, _OPEN, 0o666)
        except OSError as error:
            raise ConfigError(f"-o {self.path}: cannot be written: {error.strerror}; name another file") from None
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise ConfigError(f"-o {self.path}: not a regular file, which results are kept in; name another one")
            self._lock()
            self.job = read_job(self.path)
            if self.job is None and os.fstat(self._fd).st_size:
                raise ConfigError(
                    f"{self.path}: exists without {job_path(self.path).name}, which would tell what job it belongs to; "
                    "name another file with -o"
                )
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._fd)

    def check(self, identity: Identity) -> None:
        """Raises ConfigError if the file belongs to another job than `identity`."""
        if self.job is not None:
            check_same(self.path, identity, self.job.identity)

    def begin(self, job: JobFile, lines: int) -> None:
        """Make the file belong to `job`, whose input has so many `lines`, and find out which of them are done.

        Raises ConfigError where it belongs to another job, CorruptError where it holds anything but this job's results.
        """
        self.check(job.identity)
        if self.job is None:
            write_job(self.path, job)
            self.job = job
        self.done = LineSet(lines)
        with errors_of(self.path):
            with open(self._fd, "rb", closefd=False) as file:
                file.seek(0)
                self._end = self._read(file, job.identity.key, lines)
            if os.fstat(self._fd).st_size > self._end:
                os.ftruncate(self._fd, self._end)
            # The file's name and the cut must be on the disk before anything is appended.
            os.fsync(self._fd)
        fsync_folder(self.path.parent)

    @property
    def attention(self) -> str | None:
        """What attends while a GPU decodes, "gpu" or "cpu", where there are results of it; None: that is open yet.
        Known when the job has begun; error results are of neither."""
        return self.job.attention if self.job is not None and self.sequences else None

    def attends(self, where: str) -> None:
        """What attends while a GPU decodes is `where`, "gpu" or "cpu"; from the first result on it stays so. Raises
        ConfigError where earlier results are of the other one."""
        assert self.job is not None, "begin first"
        check_attention(self.path, where, self.attention)
        if self.job.attention != where:
            self.job = replace(self.job, attention=where)
            write_job(self.path, self.job)

    def append(self, line: int, record: bytes, sequences: int) -> None:
        """Add the result of a line of the input, durably: after this call, nothing short of a broken disk loses it.

        `sequences` is its number of choices; 0: it is an error.

        Raises DiskFullError where there is no space; the file is then as it was before.
        """
        assert record.endswith(b"\n") and line not in self.done
        try:
            with errors_of(self.path):
                rest = memoryview(record)
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
                os.fdatasync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, self._end)
            if error.errno not in _FULL:
                raise
            raise DiskFullError(
                f"{self.path}: the disk is full; results so far are kept: "
                "free some space and run the same command again to go on"
            ) from error
        self._end += len(record)
        self._count(line, sequences)

    def _count(self, line: int, sequences: int) -> None:
        self.done.add(line)
        self.failed += sequences == 0
        self.sequences += sequences

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{self.path}: another process is writing to it; wait for it, or name another file with -o"
            ) from None

    def _read(self, file: BinaryIO, key: str, lines: int) -> int:
        """Mark what is done; returns where the last whole result ends."""
        end, bad, number = 0, "", 0
        for number, raw in enumerate(file, start=1):
            if bad:
                raise CorruptError(bad)
            if not raw.endswith(b"\n"):
                break
            found = _result(raw, key)
            if found is None or not 0 < found[0] <= lines or found[0] in self.done:
                # A power failure can leave a last line that ends as it should and has a hole in it.
                bad = (
                    f"{self.path}: line {number} is no result of the job in {job_path(self.path).name}, or not the "
                    "only one of its request; remove what was added to the file, or name another one with -o"
                )
                continue
            self._count(*found)
            end += len(raw)
        return end


def _result(raw: bytes, key: str) -> tuple[int, int] | None:
    """The input line that a result belongs to, and its number of choices; None where it is no result of job `key`."""
    try:
        value = json.loads(raw)
        line = line_of_id(str(value["id"]), key)
        choices = [] if value["error"] is not None else value["response"]["body"]["choices"]
        return None if line is None else (line, len(choices))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
