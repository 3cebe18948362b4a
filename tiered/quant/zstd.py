"""zstd for tensors that compress: independent frames, so that threads decode one tensor in parallel.

`convert/` calls `compress` and `pays` and records the frames' sizes; a reader calls `decompress_frame` for
each frame (or `decompress_into` for all) after the bytes have arrived. The same input gives the same output
under one version of libzstd; decoding never depends on the version.

Group-quantized int4 codes are nearly incompressible (ratio 0.94) and stay raw.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import zstandard

from tiered.errors import ConfigError, StoreError
from tiered.units import MIB

Buffer = bytes | bytearray | memoryview

FRAME_NBYTES: Final = 2 * MIB  # large enough for the ratio, small enough to spread one tensor over threads
DECODE_BYTES_PER_SECOND: Final = 1.1e9  # output per core, measured on int8 codes; checksum included
WORST_RATIO: Final = 0.9  # above this the saving is within the variation of a disk's speed


@dataclass(frozen=True)
class CompressedTensor:
    """A tensor's bytes as consecutive zstd frames."""

    frames: tuple[int, ...]  # compressed size of each frame, in order
    payload: bytes  # the frames, end to end
    nbytes: int  # before compression
    frame_nbytes: int  # before compression, of every frame but the last

    @property
    def ratio(self) -> float:
        """Compressed by uncompressed size; 1.0 for no bytes at all."""
        return len(self.payload) / self.nbytes if self.nbytes else 1.0


def compress(data: Buffer, frame_nbytes: int = FRAME_NBYTES, level: int = 1) -> CompressedTensor:
    """Compress contiguous bytes in frames of `frame_nbytes`.

    Level 1 by default: weights hold no repetitions for higher levels to find, only skewed byte frequencies.
    """
    if frame_nbytes <= 0:
        raise ConfigError(f"zstd frame of {frame_nbytes} bytes: expected more than zero")
    view = memoryview(data).cast("B")
    # A checksum in each frame: without it a flipped bit can decode to wrong weights unnoticed.
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
    frames = [compressor.compress(view[start:stop]) for start, stop in _frame_bounds(len(view), frame_nbytes)]
    return CompressedTensor(tuple(map(len, frames)), b"".join(frames), len(view), frame_nbytes)


def decompress_into(
    payload: Buffer, frames: Sequence[int], frame_nbytes: int, out: memoryview, *, name: str = "tensor"
) -> None:
    """Fill `out` with the bytes that `compress` was given; `name` is what errors call them. Raises StoreError."""
    view, target = memoryview(payload).cast("B"), out.cast("B")
    bounds = list(_frame_bounds(len(target), frame_nbytes))
    if len(frames) != len(bounds) or sum(frames) != len(view):
        raise StoreError(
            f"{name}: expected {len(bounds)} zstd frames in {len(view):,} bytes, "
            f"found {len(frames)} in {sum(frames):,}; run 'tiered verify'"
        )
    offset = 0
    for size, (start, stop) in zip(frames, bounds, strict=True):
        decompress_frame(view[offset : offset + size], target[start:stop], name=name)
        offset += size


def decompress_frame(frame: Buffer, out: memoryview, *, name: str = "tensor") -> None:
    """Fill `out` from one frame; safe to call from many threads at once. Raises StoreError."""
    try:
        # The header is checked first: a damaged one may claim any size, which would be allocated.
        claimed = zstandard.get_frame_parameters(frame).content_size
        if claimed != len(out):
            raise StoreError(
                f"{name}: expected a zstd frame of {len(out):,} bytes, found one of {claimed:,}; run 'tiered verify'"
            )
        out[:] = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise StoreError(f"{name}: damaged zstd frame ({error}); run 'tiered verify'") from error


def pays(
    ratio: float,
    disk_bytes_per_second: float,
    cores: int,
    decode_bytes_per_second: float = DECODE_BYTES_PER_SECOND,
) -> bool:
    """Whether a tensor that compresses to `ratio` streams faster compressed: the reading that it saves must take
    longer than the decoding that it costs. Decoding takes `cores` that would otherwise compute."""
    return ratio < WORST_RATIO and disk_bytes_per_second < (1 - ratio) * decode_bytes_per_second * cores


def _frame_bounds(nbytes: int, frame_nbytes: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each frame in the uncompressed bytes."""
    for start in range(0, nbytes, frame_nbytes):
        yield start, min(start + frame_nbytes, nbytes)
