"""One block file: written from a source, or recognized as finished by an earlier attempt."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Final

import torch
import xxhash

from tiered.convert.blocks import BlockRecipe, RangeRecipe
from tiered.convert.compression import Compression, is_candidate
from tiered.convert.source import Frames, Weights
from tiered.errors import StoreError
from tiered.files import errors_of
from tiered.quant import folded
from tiered.quant.zstd import FRAME_NBYTES
from tiered.store import BlockWriter, FileInfo, UnitInfo, read_header
from tiered.store.block import BlockLayout, read_layout

Advance = Callable[[int], None]
"""Called with the number of bytes written to the store since the last call, counted before zstd."""

_HASH_READ_NBYTES: Final = 4 << 20


def write_block(
    folder: Path, block: BlockRecipe, source: Weights, compression: Compression, advance: Advance
) -> FileInfo:
    """Write the file of `block` in the store `folder`, tensor by tensor in panels of rows; returns its manifest entry.

    `source` must have `block` open.
    """
    candidates = {t.name for t in block.tensors if compression.mode != "none" and is_candidate(t, block.role)}
    units = block.units(source.dtype)
    parts = [part for unit in units for part in unit.ranges]
    frames = sum(_frames(part, source.dtype(part.whole)) for part in parts if part.whole.name in candidates)
    counts = Counter(part.whole.name for part in parts)
    with BlockWriter(folder / block.path, folder, [part.name for part in parts], frames) as writer:
        for unit in units:
            writer.start_unit(unit.name, unit.kind)
            for part in unit.ranges:
                tensor = part.whole
                rule = compression if tensor.name in candidates and not compression.is_done else None
                add = _add_plain if tensor.scheme is None else _add_packed
                add(writer, part, source, rule, advance)
                if part.number is not None or tensor.scheme is not None:
                    ranges = None if part.number is None else counts[tensor.name]
                    writer.add_weight(tensor.name, tensor.shape, tensor.scheme, ranges)
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
    first = {w.name: next(iter(w.parts.values())) for unit in layout.units for w in unit.weights.values()}
    dtypes = {name: next(iter(weight.parts.values())).dtype for name, weight in layout.weights.items()}
    compressed = {item.target.name: item.source for item in layout.compressed}
    recipes = block.units(lambda tensor: dtypes[tensor.name])
    if not first.keys() == {*BlockRecipe.names(recipes)}:
        raise ValueError(f"{layout.file.path}: holds other ranges of weights than {block.name}")
    entries = [first[unit.ranges[0].name] for unit in recipes]
    starts = [layout.units[0].offset + compressed.get(entry.name, entry).offset for entry in entries]
    return tuple(
        UnitInfo(unit.name, unit.kind, start, stop - start)
        for unit, (start, stop) in zip(recipes, pairwise([*starts, layout.file.nbytes]), strict=True)
    )


def _add_packed(
    writer: BlockWriter, part: RangeRecipe, source: Weights, rule: Compression | None, advance: Advance
) -> None:
    scheme = part.whole.scheme
    assert scheme is not None
    out, in_ = folded(part.shape)
    packed = source.packed(part)
    codes = _compressed(packed.q, rule, writer.folder)
    if codes is None:  # the attempt has consumed part of them
        packed = source.packed(part)
        codes = packed.q
    _add(writer, f"{part.name}.q", torch.uint8, scheme.q_shape(out, in_), codes, advance)
    scale = scheme.scale_shape(out, in_)
    writer.add(f"{part.name}.scale", torch.float16, scale, _counted(iter(packed.scale), advance))
    writer.add(f"{part.name}.zero", torch.uint8, scale, _counted(iter(packed.zero), advance))


def _add_plain(
    writer: BlockWriter, part: RangeRecipe, source: Weights, rule: Compression | None, advance: Advance
) -> None:
    values = _compressed(source.plain(part), rule, writer.folder)
    if values is None:
        values = source.plain(part)
    _add(writer, part.name, source.dtype(part.whole), part.shape, values, advance)


def _compressed(
    values: Iterator[memoryview] | Frames, rule: Compression | None, folder: Path
) -> Iterator[memoryview] | Frames | None:
    """`values` in the form in which they are stored; None where trying has shown that they stay as they were."""
    return values if rule is None or isinstance(values, Frames) else rule.attempt(values, folder)


def _add(
    writer: BlockWriter,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    values: Iterator[memoryview] | Frames,
    advance: Advance,
) -> None:
    if isinstance(values, Frames):
        writer.add_compressed(name, dtype, shape, values.pieces, values.sizes, values.frame_nbytes)
        advance(values.nbytes)
    else:
        writer.add(name, dtype, shape, _counted(values, advance))


def _counted(pieces: Iterator[memoryview], advance: Advance) -> Iterator[memoryview]:
    for piece in pieces:
        yield piece
        advance(piece.nbytes)


def _frames(part: RangeRecipe, dtype: torch.dtype) -> int:
    """Frames that the compressed part of `part` may have: its codes, or where it is not quantized all of it."""
    return -(-prod(part.shape) * (dtype.itemsize if part.whole.scheme is None else 1) // FRAME_NBYTES)


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
