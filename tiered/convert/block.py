"""One block file: written from a source, or recognized as finished by an earlier attempt."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch
import xxhash

from tiered.convert.compression import Compression, Frames, is_candidate
from tiered.convert.recipe import BlockRecipe, TensorRecipe
from tiered.convert.source import WeightSource
from tiered.errors import StoreError
from tiered.files import errors_of
from tiered.quant.zstd import FRAME_NBYTES
from tiered.store import CHUNK_NBYTES, BlockWriter, FileInfo
from tiered.store.block import read_layout
from tiered.store.format import tensor_nbytes

Advance = Callable[[int], None]
"""Called with the number of bytes written to the store since the last call, counted before zstd."""

_HASH_READ_NBYTES: Final = 4 << 20


def write_block(
    folder: Path, block: BlockRecipe, source: WeightSource, compression: Compression, advance: Advance
) -> FileInfo:
    """Write the file of `block` in the store `folder`, tensor by tensor in panels of rows; returns its manifest entry.

    `source` must have `block` open.
    """
    candidates = {t.name for t in block.tensors if compression.mode != "none" and is_candidate(t, block.role)}
    largest = (tensor_nbytes(source.dtype(t), t.shape) for t in block.tensors if t.name in candidates)
    frames = sum(-(-nbytes // FRAME_NBYTES) for nbytes in largest)
    with BlockWriter(folder / block.path, folder, [tensor.name for tensor in block.tensors], frames) as writer:
        for tensor in block.tensors:
            rule = compression if tensor.name in candidates else None
            add = _add_plain if tensor.scheme is None else _add_packed
            add(writer, tensor, source, rule, advance)
        return writer.finish()


def finished_block(folder: Path, block: BlockRecipe) -> FileInfo | None:
    """The manifest entry of `block`, its checksums computed from the file.

    None where the file is missing, is not whole, or holds other tensors than the recipe says.
    """
    path = folder / block.path
    try:
        nbytes = path.stat().st_size
        layout = read_layout(folder, FileInfo(block.path, nbytes, ()))
    except (FileNotFoundError, StoreError):
        return None
    found = {name: (weight.shape, weight.scheme) for name, weight in layout.weights.items()}
    if found != {tensor.name: (tensor.shape, tensor.scheme) for tensor in block.tensors}:
        return None
    return FileInfo(block.path, nbytes, _checksums(path))


def _add_packed(
    writer: BlockWriter, tensor: TensorRecipe, source: WeightSource, rule: Compression | None, advance: Advance
) -> None:
    assert tensor.scheme is not None
    out, in_ = tensor.matrix
    name, shape = f"{tensor.name}.q", tensor.scheme.q_shape(out, in_)
    packed = source.packed(tensor)
    compressed = rule.attempt(packed.q, writer.folder) if rule is not None else None
    if compressed is None:
        if rule is not None:  # the attempt has consumed part of the codes
            packed = source.packed(tensor)
        writer.add(name, torch.uint8, shape, _counted(packed.q, advance))
    else:
        _add_compressed(writer, name, torch.uint8, shape, compressed, advance)
    scale = tensor.scheme.scale_shape(out, in_)
    writer.add(f"{tensor.name}.scale", torch.float16, scale, _counted(iter(packed.scale), advance))
    writer.add(f"{tensor.name}.zero", torch.uint8, scale, _counted(iter(packed.zero), advance))
    writer.add_scheme(tensor.name, tensor.scheme, tensor.shape)


def _add_plain(
    writer: BlockWriter, tensor: TensorRecipe, source: WeightSource, rule: Compression | None, advance: Advance
) -> None:
    dtype = source.dtype(tensor)
    compressed = rule.attempt(source.plain(tensor), writer.folder) if rule is not None else None
    if compressed is None:
        writer.add(tensor.name, dtype, tensor.shape, _counted(source.plain(tensor), advance))
    else:
        _add_compressed(writer, tensor.name, dtype, tensor.shape, compressed, advance)


def _add_compressed(
    writer: BlockWriter,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    compressed: Frames,
    advance: Advance,
) -> None:
    writer.add_compressed(name, dtype, shape, compressed.pieces(), compressed.sizes, FRAME_NBYTES)
    advance(compressed.nbytes)


def _counted(pieces: Iterator[memoryview], advance: Advance) -> Iterator[memoryview]:
    for piece in pieces:
        yield piece
        advance(piece.nbytes)


def _checksums(path: Path) -> tuple[str, ...]:
    digests = []
    with errors_of(path), path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        nbytes = path.stat().st_size
        for start in range(0, nbytes, CHUNK_NBYTES):
            hasher = xxhash.xxh3_64()
            for offset in range(start, min(start + CHUNK_NBYTES, nbytes), _HASH_READ_NBYTES):
                hasher.update(os.pread(file.fileno(), _HASH_READ_NBYTES, offset))
            digests.append(hasher.hexdigest())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return tuple(digests)
