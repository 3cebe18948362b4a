"""One block file: written from a source, or recognized as finished by an earlier attempt."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch
import xxhash

from tiered.convert.blocks import BlockRecipe, TensorRecipe
from tiered.convert.compression import Compression, is_candidate
from tiered.convert.source import Weights
from tiered.errors import StoreError
from tiered.files import errors_of
from tiered.quant.planes import FRAME_NBYTES
from tiered.store import BlockWriter, FileInfo, UnitInfo, read_header
from tiered.store.block import BlockLayout, read_layout

Advance = Callable[[int], None]
"""Called with the number of bytes written to the store since the last call, counted before compression."""

_HASH_READ_NBYTES: Final = 4 << 20


def write_block(
    folder: Path, block: BlockRecipe, source: Weights, compression: Compression, advance: Advance
) -> FileInfo:
    """Write the file of `block` in the store `folder`, tensor by tensor in panels of rows; returns its manifest entry.

    `source` must have `block` open.
    """
    tensors = block.tensors if compression.mode != "none" else ()
    candidates = {t.name: t for t in tensors if is_candidate(t, block.role, source.dtype(t))}
    frames = sum(-(-t.nbytes(source.dtype(t)) // FRAME_NBYTES) for t in candidates.values())
    with BlockWriter(folder / block.path, folder, [tensor.name for tensor in block.tensors], frames) as writer:
        for unit in block.units(source.dtype):
            writer.start_unit(unit.name, unit.kind)
            for tensor in unit.tensors:
                if tensor.scheme is None:
                    rule = compression if tensor.name in candidates else None
                    _add_plain(writer, tensor, source, rule, advance)
                else:
                    _add_packed(writer, tensor, source, advance)
        return writer.finish()


def finished_block(folder: Path, block: BlockRecipe) -> FileInfo | None:
    """The manifest entry of `block`, its checksums computed from the file.

    None where the file is missing, is not whole, or holds other tensors or units than the recipe says.
    """
    path = folder / block.path
    try:
        nbytes, (*_, data_start) = path.stat().st_size, read_header(path)
        # Which units it has follows from the recipe and from where their first tensors lie.
        whole = (UnitInfo("all", "dense", data_start, nbytes - data_start),)
        layout = read_layout(folder, FileInfo(block.path, nbytes, (), whole))
        file = replace(layout.file, units=_units_of(block, layout))
        file.check_units()
        read_layout(folder, file)
    except (FileNotFoundError, StoreError, ValueError):
        return None
    return replace(file, checksums=_checksums(path, file))


def _units_of(block: BlockRecipe, layout: BlockLayout) -> tuple[UnitInfo, ...]:
    """The units of `block` in a file whose tensors are in `layout` as if there were only one.

    Raises ValueError where they are not the tensors of `block`.
    """
    if not block.fits(layout):
        raise ValueError(f"{layout.file.path}: holds other tensors than {block.name}")
    first = {name: next(iter(weight.parts.values())) for name, weight in layout.weights.items()}
    stored = layout.units[0].stored
    recipes = block.units(lambda tensor: first[tensor.name].dtype)
    entries = [first[unit.tensors[0].name] for unit in recipes]
    starts = [layout.units[0].offset + stored[entry.name].offset for entry in entries]
    return tuple(
        UnitInfo(unit.name, unit.kind, start, stop - start)
        for unit, (start, stop) in zip(recipes, pairwise([*starts, layout.file.nbytes]), strict=True)
    )


def _add_packed(writer: BlockWriter, tensor: TensorRecipe, source: Weights, advance: Advance) -> None:
    assert tensor.scheme is not None
    out, in_ = tensor.matrix
    packed = source.packed(tensor)
    scale = tensor.scheme.scale_shape(out, in_)
    q = tensor.scheme.q_shape(out, in_)
    writer.add(f"{tensor.name}.q", torch.uint8, q, _counted(packed.q, advance))
    writer.add(f"{tensor.name}.scale", torch.float16, scale, _counted(iter(packed.scale), advance))
    writer.add(f"{tensor.name}.zero", torch.uint8, scale, _counted(iter(packed.zero), advance))
    writer.add_scheme(tensor.name, tensor.scheme, tensor.shape)


def _add_plain(
    writer: BlockWriter, tensor: TensorRecipe, source: Weights, rule: Compression | None, advance: Advance
) -> None:
    dtype, is_coded, pieces = source.dtype(tensor), False, _counted(source.plain(tensor), advance)
    if rule is not None:
        is_coded, pieces = rule.attempt(pieces, dtype)
    if is_coded:
        writer.add_planes(tensor.name, dtype, tensor.shape, pieces, FRAME_NBYTES)
    else:
        writer.add(tensor.name, dtype, tensor.shape, pieces)


def _counted(pieces: Iterator[memoryview], advance: Advance) -> Iterator[memoryview]:
    for piece in pieces:
        yield piece
        advance(piece.nbytes)


def _checksums(path: Path, file: FileInfo) -> tuple[str, ...]:
    digests = []
    with errors_of(path), path.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for start, nbytes in file.extents():
            hasher = xxhash.xxh3_64()
            for offset in range(start, start + nbytes, _HASH_READ_NBYTES):
                hasher.update(os.pread(opened.fileno(), min(_HASH_READ_NBYTES, start + nbytes - offset), offset))
            digests.append(hasher.hexdigest())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return tuple(digests)
