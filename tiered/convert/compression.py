"""Where coding the exponents of 16-bit weights pays: measured once for each conversion, decided for each tensor.

Only what is streamed in 16 bits is a candidate: embedding rows are read one by one and must be as they are in their
file, the outer tensors are read once, and codes of int4 and int8 do not shrink enough (docs/benchmarks/compression.md).
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Self

import torch

from tiered.convert.blocks import BlockRecipe, DtypeOf, TensorRecipe
from tiered.convert.source import PANEL_NBYTES, tensor_bytes
from tiered.files import errors_of
from tiered.kernels import decode_planes, encode_planes
from tiered.quant import PLANE_DTYPES
from tiered.quant.planes import FRAME_NBYTES
from tiered.store import PAGE
from tiered.units import MIB

WORST_RATIO: Final = 0.9
"""Above this the saving is within the variation of a disk's speed."""
_TRIAL_FRAMES: Final = 16
PROBE_NAME: Final = "bandwidth.part"
_PROBE_NBYTES: Final = 64 * MIB
_PROBE_READ_NBYTES: Final = 4 * MIB
_LEAST_VALUES: Final = 64 << 10
"""Tensors of fewer numbers are not worth the frames' table."""
COMPRESSING_NBYTES: Final = PANEL_NBYTES + 2 * _TRIAL_FRAMES * FRAME_NBYTES
"""Memory that compressing takes, however large the tensor: bytes being cut into frames, and the trial's."""


@dataclass(frozen=True)
class Compression:
    """The rule of one conversion; kept in its progress file, so that a resumed one decides the same."""

    mode: str  # auto, planes or none
    disk_bytes_per_second: float = 0.0  # of reads from the store's disk; measured for auto only
    decode_bytes_per_second: float = 0.0  # of decoded weights, by all cores; measured for auto only

    @classmethod
    def measure(
        cls, mode: str, blocks: tuple[BlockRecipe, ...], folder: Path, room_nbytes: int, dtype_of: DtypeOf
    ) -> Self:
        """The rule for a store in `folder`, which exists; what it depends on is measured, where it depends on it.

        Measuring writes at most `room_nbytes`, the size of the blocks to come, so it needs no space beyond theirs.
        """
        dtypes = (dtype_of(t) for block in blocks for t in block.tensors if is_candidate(t, block.role, dtype_of(t)))
        dtype = next(dtypes, None) if mode == "auto" else None
        if dtype is None:
            return cls("none" if mode == "auto" else mode)
        cores = len(os.sched_getaffinity(0))
        return cls(mode, round(read_bandwidth(folder, room_nbytes)), round(cores * decode_bandwidth(dtype)))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        rates = (float(value[name]) for name in ("disk_bytes_per_second", "decode_bytes_per_second"))
        return cls(str(value["mode"]), *rates)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def keeps(self, ratio: float) -> bool:
        """Whether a tensor that shrinks to `ratio` of its size is stored compressed: where that is decided by
        measuring, the reading that it saves must take longer than the decoding that it costs, which takes cores that
        would otherwise compute."""
        pays = self.disk_bytes_per_second < (1 - ratio) * self.decode_bytes_per_second
        return ratio < WORST_RATIO and (self.mode == "planes" or (self.mode == "auto" and pays))

    def attempt(self, pieces: Iterator[memoryview], dtype: torch.dtype) -> tuple[bool, Iterator[memoryview]]:
        """Whether the tensor whose bytes are `pieces`, of any sizes, is stored compressed; and its frames, or else its
        bytes. Decided by the first few MiB."""
        frames = in_pieces(pieces, FRAME_NBYTES)
        trial, encode = list(islice(frames, _TRIAL_FRAMES)), partial(encode_planes, dtype=dtype)
        coded = list(map(encode, trial))
        # Of no bytes at all there is nothing to save.
        nbytes = sum(map(len, trial))
        if not nbytes or not self.keeps(sum(map(len, coded)) / nbytes):
            return False, chain(trial, frames)
        return True, chain(coded, map(encode, frames))


def is_candidate(tensor: TensorRecipe, role: str, dtype: torch.dtype) -> bool:
    """Whether a tensor of a block of `role`, of `dtype` in the source, may be compressed at all."""
    is_large = tensor.numel >= _LEAST_VALUES and tensor.kind == "dense"
    return role in ("layer", "head") and is_large and tensor.scheme is None and dtype in PLANE_DTYPES


def decode_bandwidth(dtype: torch.dtype) -> float:
    """Bytes of weights per second that one core decodes: the best of a few tries."""
    values = torch.randn(16 * FRAME_NBYTES // 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    frames = list(map(partial(encode_planes, dtype=dtype), in_pieces(iter([tensor_bytes(values)]), FRAME_NBYTES)))
    joined, sizes, out = memoryview(b"".join(frames)), list(map(len, frames)), tensor_bytes(torch.empty_like(values))
    best = float("inf")
    for _ in range(5):
        start = perf_counter()
        decode_planes(joined, sizes, FRAME_NBYTES, out, dtype, "a trial")
        best = min(best, perf_counter() - start)
    return out.nbytes / best


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


def in_pieces(views: Iterator[memoryview], size: int) -> Iterator[memoryview]:
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
