"""Where zstd pays: measured once for each conversion, decided for each tensor.

Only what is streamed and not int4 is a candidate: embedding rows are read one by one and must be uncompressed in
their file, the outer tensors are read once, and group int4 codes do not shrink.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Self

import torch

from tiered.convert.blocks import BlockRecipe, TensorRecipe
from tiered.convert.source import PANEL_NBYTES, Frames
from tiered.files import errors_of
from tiered.quant import compress, pays
from tiered.quant.zstd import FRAME_NBYTES, WORST_RATIO
from tiered.store import PAGE
from tiered.units import MIB

_TRIAL_NBYTES: Final = 4 * FRAME_NBYTES
PROBE_NAME: Final = "bandwidth.part"
_PROBE_NBYTES: Final = 64 * MIB
_PROBE_READ_NBYTES: Final = 4 * MIB
_LEAST_VALUES: Final = 64 << 10
"""Tensors of fewer numbers are not worth the frames' table."""
_HELD_NBYTES: Final = 8 * MIB
"""Most compressed bytes of a tensor that wait in memory; where there are more, all of them wait in a file."""
COMPRESSING_NBYTES: Final = _HELD_NBYTES + PANEL_NBYTES + 3 * FRAME_NBYTES
"""Memory that compressing takes, however large the tensor: frames that wait, and bytes being cut into frames."""


@dataclass(frozen=True)
class Compression:
    """The rule of one conversion; kept in its progress file, so that a resumed one decides the same."""

    mode: str  # auto, zstd or none
    disk_bytes_per_second: float = 0.0  # of reads from the store's disk; measured for auto only
    cores: int = 1  # that would decode; counted for auto only
    is_done: bool = False  # the source has compressed what is to be, by the same rule

    @classmethod
    def measure(cls, mode: str, blocks: tuple[BlockRecipe, ...], folder: Path, room_nbytes: int) -> Self:
        """The rule for a store in `folder`, which exists; the disk is measured only where the rule depends on it.

        Measuring writes at most `room_nbytes`, the size of the blocks to come, so it needs no space beyond theirs.
        """
        if mode == "auto" and any(is_candidate(t, block.role) for block in blocks for t in block.tensors):
            return cls(mode, round(read_bandwidth(folder, room_nbytes)), len(os.sched_getaffinity(0)))
        return cls("none" if mode == "auto" else mode)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(str(value["mode"]), float(value["disk_bytes_per_second"]), int(value["cores"]))

    def to_json(self) -> dict[str, Any]:
        return {"mode": self.mode, "disk_bytes_per_second": self.disk_bytes_per_second, "cores": self.cores}

    def keeps(self, ratio: float) -> bool:
        """Whether a tensor that shrinks to `ratio` of its size is stored compressed."""
        if self.mode == "auto":
            return pays(ratio, self.disk_bytes_per_second, self.cores)
        return self.mode == "zstd" and ratio < WORST_RATIO

    def attempt(self, pieces: Iterator[memoryview], folder: Path) -> Frames | None:
        """The tensor whose bytes are `pieces`, of any sizes, as zstd frames, or None where compressing it does not pay.

        Gives up early where the first few MiB do not shrink enough. Frames that are too many to wait in memory wait
        in an unnamed file in `folder`.
        """
        sizes: list[int] = []
        nbytes = 0
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(tempfile.SpooledTemporaryFile(_HELD_NBYTES, dir=str(folder)))
            for frame in _in_pieces(pieces, FRAME_NBYTES):
                packed = compress(frame)
                sizes.extend(packed.frames)
                file.write(packed.payload)
                nbytes += packed.nbytes
                if nbytes == _TRIAL_NBYTES and not self.keeps(sum(sizes) / nbytes):
                    return None
            # Of no bytes at all there is nothing to save.
            if not self.keeps(sum(sizes) / nbytes if nbytes else 1.0):
                return None
            stack.pop_all()
            return Frames(tuple(sizes), nbytes, _waiting(file))


def is_candidate(tensor: TensorRecipe, role: str) -> bool:
    """Whether a tensor of a block of `role` may be compressed at all."""
    if role not in ("layer", "head") or tensor.numel < _LEAST_VALUES:
        return False
    return tensor.scheme is None or tensor.scheme.bits == 8


def waiting_nbytes(block: BlockRecipe, dtype_of: Callable[[TensorRecipe], torch.dtype]) -> int:
    """Most bytes of disk that frames of `block` take while they wait, besides the block file itself."""
    sizes = [
        tensor.numel * (1 if tensor.scheme is not None else dtype_of(tensor).itemsize)
        for tensor in block.tensors
        if is_candidate(tensor, block.role)
    ]
    return max((nbytes for nbytes in sizes if nbytes > _HELD_NBYTES), default=0)


def read_bandwidth(folder: Path, most_nbytes: int = _PROBE_NBYTES) -> float:
    """Bytes per second that the disk under `folder` reads past the page cache, from a file written for the purpose.

    The file has at most `most_nbytes` and is deleted before this returns.
    """
    path = folder / PROBE_NAME
    noise = os.urandom(min(_PROBE_READ_NBYTES, most_nbytes // PAGE * PAGE))
    try:
        with errors_of(path), path.open("wb") as file:
            for _ in range(min(_PROBE_NBYTES, most_nbytes) // len(noise)):
                file.write(noise)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return _timed_read(path)
    finally:
        path.unlink(missing_ok=True)


def _timed_read(path: Path) -> float:
    import mmap

    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # no O_DIRECT here; the pages were dropped above
        fd = os.open(path, os.O_RDONLY)
    try:
        with errors_of(path), mmap.mmap(-1, _PROBE_READ_NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as buffer:
            start = perf_counter()
            done = 0
            while (count := os.preadv(fd, [buffer], done)) > 0:
                done += count
            return done / (perf_counter() - start)
    finally:
        os.close(fd)


def _waiting(file: tempfile.SpooledTemporaryFile[bytes]) -> Iterator[memoryview]:
    """The bytes of `file`, which is dropped at its end."""
    with file:
        file.seek(0)
        while piece := file.read(FRAME_NBYTES):
            yield memoryview(piece)


def _in_pieces(views: Iterator[memoryview], size: int) -> Iterator[memoryview]:
    """The bytes of `views` in pieces of `size` bytes, of which the last may be shorter."""
    pending = bytearray()
    for view in views:
        pending += view
        whole = len(pending) // size * size
        for start in range(0, whole, size):
            yield memoryview(bytes(pending[start : start + size]))
        del pending[:whole]
    if pending:
        yield memoryview(bytes(pending))
