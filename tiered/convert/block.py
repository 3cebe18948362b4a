"""One block file: written from a source, or recognized as finished by an earlier attempt."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Final

import torch
import xxhash

from tiered.convert.blocks import BlockRecipe, RangeRecipe, TensorRecipe
from tiered.convert.compression import Compression, is_candidate
from tiered.convert.source import Weights, tensor_bytes
from tiered.errors import StoreError
from tiered.files import errors_of
from tiered.quant import QuantizedTensor, folded
from tiered.quant.planes import FRAME_NBYTES
from tiered.store import BlockWriter, FileInfo, RowLayout, UnitInfo, read_header
from tiered.store.block import BlockLayout, read_layout
from tiered.store.rows import ROWS

Advance = Callable[[int], None]
"""Called with the number of bytes written to the store since the last call, counted before compression."""

_HASH_READ_NBYTES: Final = 4 << 20


def write_block(
    folder: Path,
    block: BlockRecipe,
    source: Weights,
    compression: Compression,
    advance: Advance,
    writer_of: type[BlockWriter] = BlockWriter,
) -> FileInfo:
    """Write the file of `block` in the store `folder`, tensor by tensor in panels of rows; returns its manifest entry.

    `source` must have `block` open.
    """
    coded = block.tensors if compression.mode != "none" else ()
    candidates = {t.name for t in coded if is_candidate(t, block.role, source.dtype(t))}
    units = block.units(source.dtype)
    parts = [part for unit in units for part in unit.ranges]
    sizes = (prod(p.shape) * source.dtype(p.whole).itemsize for p in parts if p.whole.name in candidates)
    frames = sum(-(-nbytes // FRAME_NBYTES) for nbytes in sizes)
    counts = Counter(part.whole.name for part in parts)
    with writer_of(folder / block.path, folder, [part.name for part in parts], frames) as writer:
        for unit in units:
            writer.start_unit(unit.name, unit.kind)
            for part in unit.ranges:
                tensor = part.whole
                layout = tensor.row_layout(source.dtype(tensor))
                if layout is not None:
                    records = _counted(_records(layout, tensor, source), advance)
                    writer.add(f"{tensor.name}.{ROWS}", torch.uint8, (tensor.shape[0], layout.nbytes), records)
                elif tensor.scheme is None:
                    _add_plain(writer, part, source, compression if tensor.name in candidates else None, advance)
                else:
                    _add_packed(writer, part, source, advance)
                if part.number is not None or tensor.scheme is not None or layout is not None:
                    ranges = None if part.number is None else counts[tensor.name]
                    writer.add_weight(tensor.name, tensor.shape, tensor.scheme, ranges, layout)
        return writer.finish()


def finished_block(folder: Path, block: BlockRecipe) -> FileInfo | None:
    """The manifest entry of `block`, its checksums computed from the file.

    None where the file is missing, is not whole, or holds other tensors or units than the recipe says.
    """
    try:
        # Which units it has follows from the recipe and from where their first tensors lie.
        layout = _in_one_unit(folder, block)
        file = replace(layout.file, units=_units_of(block, layout))
        file.check_units()
        read_layout(folder, file)
    except (FileNotFoundError, StoreError, ValueError):
        return None
    return replace(file, checksums=_checksums(folder / block.path, file))


def is_block(folder: Path, block: BlockRecipe) -> bool:
    """Whether the file of `block` is one of this format version, whatever its units and tensors are."""
    try:
        _in_one_unit(folder, block)
    except (FileNotFoundError, StoreError, ValueError):
        return False
    return True


def _in_one_unit(folder: Path, block: BlockRecipe) -> BlockLayout:
    """The layout of the file of `block` as if it had one unit. Raises FileNotFoundError, StoreError and ValueError."""
    path = folder / block.path
    nbytes, (*_, data_start) = path.stat().st_size, read_header(path)
    whole = (UnitInfo("all", "dense", data_start, nbytes - data_start),)
    return read_layout(folder, FileInfo(block.path, nbytes, (), whole))


def _units_of(block: BlockRecipe, layout: BlockLayout) -> tuple[UnitInfo, ...]:
    """The units of `block` in a file whose tensors are in `layout` as if there were only one.

    Raises ValueError where they are not the tensors of `block`.
    """
    if not block.fits(layout):
        raise ValueError(f"{layout.file.path}: holds other tensors than {block.name}")
    first = {w.name: next(iter(w.parts.values())) for unit in layout.units for w in unit.weights.values()}
    dtypes = {name: weight.dtype for name, weight in layout.weights.items()}
    stored = layout.units[0].stored
    recipes = block.units(lambda tensor: dtypes[tensor.name])
    if not first.keys() == {*BlockRecipe.names(recipes)}:
        raise ValueError(f"{layout.file.path}: holds other ranges of weights than {block.name}")
    entries = [first[unit.ranges[0].name] for unit in recipes]
    starts = [layout.units[0].offset + stored[entry.name].offset for entry in entries]
    return tuple(
        UnitInfo(unit.name, unit.kind, start, stop - start)
        for unit, (start, stop) in zip(recipes, pairwise([*starts, layout.file.nbytes]), strict=True)
    )


def _records(layout: RowLayout, tensor: TensorRecipe, source: Weights) -> Iterator[memoryview]:
    """The records of a table's rows, some at a time."""
    for part in tensor.records(source.dtype(tensor)):
        if tensor.scheme is None:
            rows: torch.Tensor | QuantizedTensor = _joined(source.plain(part), layout.dtype, part.shape)
        else:
            packed, scheme = source.packed(part), tensor.scheme
            # In this order: scales and zeros are there when all codes have been made.
            q = _joined(packed.q, torch.uint8, scheme.q_shape(*part.shape))
            scale = _joined(packed.scale, scheme.scale_dtype, scheme.scale_shape(*part.shape))
            zero = _joined(packed.zero, torch.uint8, scheme.zero_shape(*part.shape))
            rows = QuantizedTensor(q, scale, zero)
        yield tensor_bytes(layout.pack(rows, part.start))


def _joined(pieces: Iterable[memoryview], dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """The tensor whose bytes come in `pieces`."""
    joined = bytearray()
    for piece in pieces:  # not `join`, which asks for all before it copies the first: their memory is used again
        joined += piece
    return torch.frombuffer(joined, dtype=dtype).view(*shape) if joined else torch.empty(shape, dtype=dtype)


def _add_packed(writer: BlockWriter, part: RangeRecipe, source: Weights, advance: Advance) -> None:
    scheme = part.whole.scheme
    assert scheme is not None
    packed = source.packed(part)
    streams = {"q": packed.q, "scale": packed.scale, "zero": packed.zero}
    for suffix, (dtype, shape) in scheme.parts(*folded(part.shape)).items():
        writer.add(f"{part.name}.{suffix}", dtype, shape, _counted(iter(streams[suffix]), advance))


def _add_plain(
    writer: BlockWriter, part: RangeRecipe, source: Weights, rule: Compression | None, advance: Advance
) -> None:
    dtype, is_coded, pieces = source.dtype(part.whole), False, _counted(source.plain(part), advance)
    if rule is not None:
        is_coded, pieces = rule.attempt(pieces, dtype)
    if is_coded:
        writer.add_planes(part.name, dtype, part.shape, pieces, FRAME_NBYTES)
    else:
        writer.add(part.name, dtype, part.shape, pieces)


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
