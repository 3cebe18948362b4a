"""What lies in one block file: its units, the logical weights of each, and where these are once a unit is in memory."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Final

import torch

from tiered.errors import ConfigError, StoreError
from tiered.files import check_regular
from tiered.quant import PLANE_DTYPES, Scheme, folded
from tiered.store.file import FileInfo, UnitInfo
from tiered.store.format import (
    ALIGNMENT,
    CHUNK_NBYTES,
    DTYPES,
    TensorEntry,
    read_header,
    tensor_nbytes,
    whole_numbers,
)
from tiered.store.manifest import RANGE, VERSION, Weight
from tiered.store.rows import ROWS, RowLayout
from tiered.store.unit import Compressed, Unit
from tiered.units import PAGE, round_up

METADATA_KEY: Final = "tiered"
PAD_PREFIX: Final = "__pad"
PLANES_SUFFIX: Final = ".planes"
_ZSTD_SUFFIX: Final = ".zst"  # of stores of version 1
PARTS: Final = ("q", "scale", "zero")
"""Suffixes of the tensors that make a quantized weight, in the order in which they lie; not every scheme has zeros."""


@dataclass(frozen=True)
class BlockLayout:
    """The units of one block file, in the order of use, and what they are together.

    The memory of a block is that of its units, one behind the other.
    """

    file: FileInfo
    units: tuple[Unit, ...]

    @cached_property
    def weights(self) -> Mapping[str, Weight]:
        """Every weight of the block, by full name. Offsets count from the start of the memory of its unit.

        One that is stored in ranges of its rows is whole here: the parts of range k are called PART#k.
        """
        found: dict[str, Weight] = {}
        for unit in self.units:
            for weight in unit.weights.values():
                name = weight.whole_name
                if weight.whole is None:
                    found[name] = weight
                    continue
                number = weight.name.removeprefix(name)
                parts = {f"{part}{number}": entry for part, entry in weight.parts.items()}
                first = found.get(name)
                found[name] = Weight(name, weight.whole, weight.scheme, {**(first.parts if first else {}), **parts})
        return found

    @property
    def compressed(self) -> tuple[Compressed, ...]:
        """What of the block has to be decoded. Offsets count from the start of the memory of its unit."""
        return tuple(item for unit in self.units for item in unit.compressed)

    @cached_property
    def memory_nbytes(self) -> int:
        return sum(unit.memory_nbytes for unit in self.units)

    @cached_property
    def weight_count(self) -> int:
        """How many weights the block holds, quantized or not."""
        return sum(prod(weight.shape) for weight in self.weights.values())


@dataclass(frozen=True)
class WeightInfo:
    """What a block's metadata says of a weight that is quantized, or stored in ranges of its rows, or row by row."""

    shape: tuple[int, ...]
    scheme: Scheme | None
    ranges: int | None = None
    """How many; None where it is stored whole. A stack [experts, out, in] has one for each expert."""
    rows: RowLayout | None = None
    """How its rows lie, where each is a record of its own."""

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {"scheme": self.scheme.name if self.scheme is not None else None}
        value |= {"shape": list(self.shape)} | ({} if self.ranges is None else {"ranges": self.ranges})
        return value if self.rows is None else {**value, "rows": self.rows.name}

    @classmethod
    def from_json(cls, value: Any) -> "WeightInfo":
        """Raises KeyError, TypeError, ValueError or ConfigError."""
        scheme, ranges, row = value["scheme"], value.get("ranges"), value.get("rows")
        if ranges is not None:
            (ranges,) = whole_numbers([ranges])
        parsed, shape = None if scheme is None else Scheme.parse(scheme), whole_numbers(value["shape"])
        if ranges is None and parsed is None and row is None:
            raise ValueError("a weight that is neither quantized nor stored in ranges")
        if ranges is not None and len(shape) not in (2, 3):
            raise ValueError(f"ranges of a weight of shape {shape}")
        if row is not None and (ranges is not None or len(shape) != 2):
            raise ValueError(f"rows of a weight of shape {shape}, in {ranges} ranges")
        return cls(shape, parsed, ranges, None if row is None else RowLayout.parse(row, shape[1], parsed))


def block_metadata(weights: Mapping[str, WeightInfo], compressed: Sequence[Compressed]) -> str:
    """The JSON that makes a block file self-describing: what weights its tensors make, frames of compressed ones."""
    value = {
        "version": VERSION,
        "weights": {name: info.to_json() for name, info in weights.items()},
        "planes": {item.target.name: item.to_json() for item in compressed},
    }
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def read_layout(folder: Path, file: FileInfo, version: int = VERSION) -> BlockLayout:
    """Read and check the header of `file` in the store at `folder`, which must be a block of format `version`.

    Raises StoreError where the file is missing, has another size than the manifest says, or is no block, or where its
    tensors do not lie in its units.
    """
    path = folder / file.path
    try:
        nbytes = check_regular(path, StoreError)
    except (FileNotFoundError, ValueError):
        # ValueError: a damaged manifest may hold a name that no file can have.
        raise StoreError(f"{path}: missing; the store is incomplete, convert the model again") from None
    if nbytes != file.nbytes:
        raise StoreError(
            f"{path}: expected {file.nbytes:,} bytes, found {nbytes:,}; it is truncated or not this store's, "
            "convert the model again"
        )
    entries, metadata, data_start = read_header(path)
    try:
        described = json.loads(metadata[METADATA_KEY])
        found = described.get("version", 1)
        infos = {name: WeightInfo.from_json(value) for name, value in described["weights"].items()}
        zstd, planes = dict(described.get("zstd", {})), dict(described.get("planes", {}))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, ConfigError) as error:
        raise StoreError(
            f"{path}: not a block of a tiered store (metadata: {error}); convert the model again"
        ) from None
    if found != version:
        raise StoreError(f"{path}: a block of format version {found!r}, expected {version}; convert the model again")
    if zstd and version != 1:
        raise StoreError(
            f"{path}: compressed with zstd by a version of tiered that was never released, expected coded exponents; "
            "convert the model again"
        )
    # The one unit that stands for a block of version 1 includes the header.
    if data_start % PAGE or (version != 1 and data_start != file.header_nbytes):
        raise StoreError(
            f"{path}: data starts at byte {data_start}, expected {file.header_nbytes}, a multiple of {PAGE}; "
            "convert the model again"
        )
    try:
        parts = _split(entries, file.units)
        chunks = file.unit_chunks()
        units = tuple(
            _unit(file, unit, next(chunks), part, zstd or planes, infos)
            for unit, part in zip(file.units, parts, strict=True)
        )
        _check_found("tensor", zstd or planes, (item.target.name for unit in units for item in unit.compressed))
        _check_weights(infos, [weight for unit in units for weight in unit.weights.values()])
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise StoreError(f"{path}: its metadata does not fit its tensors ({error}); convert the model again") from None
    for entry in entries:
        if entry.offset % ALIGNMENT and not entry.name.startswith(PAD_PREFIX):
            raise StoreError(
                f"{path}: tensor {entry.name} is not aligned to {ALIGNMENT} bytes; not written by tiered, "
                "convert the model again"
            )
    return BlockLayout(file, units)


def _split(entries: Sequence[TensorEntry], units: Sequence[UnitInfo]) -> Iterator[list[TensorEntry]]:
    """For each unit, the tensors within it, pads left out; offsets count from the unit's start."""
    number = 0
    for unit in units:
        inside = []
        start, stop, is_last = unit.offset, unit.stop, unit is units[-1]
        while number < len(entries) and (entries[number].offset < stop or is_last):
            entry = entries[number]
            offset = entry.offset - start
            if offset < 0 or entry.offset + entry.nbytes > stop:
                raise ValueError(f"{entry.name} does not lie within one unit")
            if not entry.name.startswith(PAD_PREFIX):
                inside.append(TensorEntry(entry.name, entry.dtype, entry.shape, offset, entry.nbytes))
            number += 1
        yield inside
    if number < len(entries):
        raise ValueError(f"{entries[number].name} does not lie within one unit")


def _unit(
    file: FileInfo,
    info: UnitInfo,
    chunks: range,
    entries: Sequence[TensorEntry],
    coded: Mapping[str, Any],
    infos: Mapping[str, WeightInfo],
) -> Unit:
    """The unit of `entries`, whose offsets count from its start. `coded` and `infos` describe those of all units."""
    stored: dict[str, TensorEntry] = {}
    compressed: list[Compressed] = []
    copied: list[tuple[TensorEntry, TensorEntry]] = []
    has_coded, position = any(_plain_name(entry) in coded for entry in entries), 0
    for entry in entries:
        name = _plain_name(entry)
        if name is not None and name in coded:
            item = _compressed(name, coded[name], entry, position)
            compressed.append(item)
            target = item.target
        else:
            target = replace(entry, offset=position) if has_coded else entry
            copied.append((entry, target))
        stored[target.name] = target
        position = round_up(target.offset + target.nbytes, ALIGNMENT)
    weights = {weight.name: weight for weight in _weights(stored, infos)}
    if not compressed:
        return Unit(info.name, file, info.offset, info.nbytes, chunks, weights, (), (), info.nbytes, info.kind)
    if info.kind != "dense":
        raise ValueError(f"unit {info.name} is {info.kind} and has compressed tensors")
    nbytes = round_up(position, PAGE)
    moved = tuple(compressed), tuple(copied)
    return Unit(info.name, file, info.offset, info.nbytes, chunks, weights, *moved, nbytes, info.kind)


def _plain_name(entry: TensorEntry) -> str | None:
    """The name of the tensor that `entry` is the frames of; None where it cannot be one's."""
    ends = [end for end in (PLANES_SUFFIX, _ZSTD_SUFFIX) if entry.name.endswith(end)]
    return entry.name.removesuffix(ends[0]) if ends else None


def _compressed(name: str, value: Any, source: TensorEntry, position: int) -> Compressed:
    """The tensor `name`, described by `value`, stored as `source`, to be decoded at `position` of the memory."""
    dtype, shape = DTYPES[value["dtype"]], whole_numbers(value["shape"])
    target = TensorEntry(name, dtype, shape, position, tensor_nbytes(dtype, shape))
    frames, (frame_nbytes,) = whole_numbers(value["frames"]), whole_numbers([value["frame_nbytes"]])
    if sum(frames) != source.nbytes:
        raise ValueError(f"{name}: frames of {sum(frames):,} bytes in a tensor of {source.nbytes:,}")
    if not (len(frames) - 1) * frame_nbytes < target.nbytes <= len(frames) * frame_nbytes:
        raise ValueError(f"{name}: {len(frames)} frames of {frame_nbytes:,} bytes for {target.nbytes:,} bytes")
    if frame_nbytes > CHUNK_NBYTES:
        raise ValueError(f"{name}: frames of {frame_nbytes:,} bytes, expected at most {CHUNK_NBYTES:,}")
    if source.name.endswith(PLANES_SUFFIX):
        if dtype not in PLANE_DTYPES or frame_nbytes % 2:
            raise ValueError(f"{name}: frames of {frame_nbytes:,} bytes of {dtype}, expected whole 16-bit floats")
        # Half of each value is stored as it is: what is claimed beyond would be memory for nothing.
        if target.nbytes > 2 * source.nbytes:
            raise ValueError(f"{name}: {target.nbytes:,} bytes coded in {source.nbytes:,}, expected at least half")
    return Compressed(source, target, frames, frame_nbytes)


def _weights(stored: Mapping[str, TensorEntry], infos: Mapping[str, WeightInfo]) -> Iterator[Weight]:
    """The weights, or ranges of their rows, that the tensors `stored` of a unit make, in their order."""
    for tensor, entry in stored.items():
        name, _, part = tensor.rpartition(".")
        info = infos.get(name.partition(RANGE)[0])
        if part == ROWS and info is not None and info.rows is not None:
            _check_parts({ROWS: entry}, {ROWS: (torch.uint8, (info.shape[0], info.rows.nbytes))})
            yield Weight(name, info.shape, info.scheme, {ROWS: entry}, rows=info.rows)
        elif part in PARTS and info is not None and info.scheme is not None:
            if part == PARTS[0]:
                shape = info.shape if info.ranges is None else (entry.shape[0], info.shape[-1])
                expected = info.scheme.parts(*folded(shape))
                parts = {part: stored[f"{name}.{part}"] for part in expected}
                _check_parts(parts, expected)
                yield Weight(name, shape, info.scheme, parts, None if info.ranges is None else info.shape)
        else:
            info = infos.get(tensor.partition(RANGE)[0])
            is_range = info is not None and info.scheme is None
            yield Weight(tensor, entry.shape, None, {"": entry}, info.shape if info and is_range else None)


def _check_parts(parts: Mapping[str, TensorEntry], expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    for part, entry in parts.items():
        dtype, shape = expected[part]
        if entry.shape != shape or entry.dtype != dtype:
            raise ValueError(f"{entry.name}: shape {entry.shape} {entry.dtype}, expected {shape} {dtype}")


def _check_weights(infos: Mapping[str, WeightInfo], found: Sequence[Weight]) -> None:
    """Raise ValueError unless `found` are all that `infos` describe: ranges in order, which together have all rows."""
    ranges: dict[str, list[Weight]] = {}
    for weight in found:
        ranges.setdefault(weight.whole_name, []).append(weight)
    _check_found("weight", infos, iter(ranges))
    for name, info in infos.items():
        if any((weight.scheme, weight.rows) != (info.scheme, info.rows) for weight in ranges[name]):
            raise ValueError(f"{name} is not stored as {info.scheme.name if info.scheme else 'plain ranges'}")
        if info.ranges is None:
            continue
        names, rows = [weight.name for weight in ranges[name]], [weight.shape[0] for weight in ranges[name]]
        if names != [f"{name}{RANGE}{number}" for number in range(info.ranges)]:
            raise ValueError(f"{name}: has ranges {', '.join(names[:3])}…, expected {info.ranges} in order")
        if any(weight.shape[1:] != info.shape[-1:] for weight in ranges[name]) or sum(rows) != folded(info.shape)[0]:
            raise ValueError(f"{name}: its ranges have {sum(rows)} rows, expected those of {info.shape}")
        if len({part.dtype for weight in ranges[name] for key, part in weight.parts.items() if not key}) > 1:
            raise ValueError(f"{name}: its ranges differ in dtype")
        if len(info.shape) == 3 and {*rows} != {info.shape[1]}:
            raise ValueError(f"{name}: its ranges are not its {info.shape[0]} experts")


def _check_found(what: str, described: Mapping[str, Any], found: Iterator[str]) -> None:
    """Raise ValueError where the metadata describes a `what` that is not among those `found`."""
    missing = described.keys() - set(found)
    if missing:
        raise ValueError(f"there is no {what} {min(missing)}")
