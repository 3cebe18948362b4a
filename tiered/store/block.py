"""What lies in one block file: its logical weights, and where each is once the block is in memory.

A block's memory begins with the file as it is. Tensors that the file holds zstd-compressed are decoded behind it,
so `memory_nbytes` is the file's size plus those tensors' plain size.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import torch

from tiered.errors import ConfigError, StoreError
from tiered.files import check_regular
from tiered.quant import GroupScheme, decompress_into, folded
from tiered.store.format import (
    ALIGNMENT,
    DTYPE_NAMES,
    DTYPES,
    TensorEntry,
    read_header,
    tensor_nbytes,
    whole_numbers,
)
from tiered.store.manifest import FileInfo, Weight
from tiered.units import PAGE, round_up

METADATA_KEY: Final = "tiered"
PAD_PREFIX: Final = "__pad"
ZSTD_SUFFIX: Final = ".zst"


@dataclass(frozen=True)
class Compressed:
    """A tensor stored as independent zstd frames: bytes [source] of the file decode to bytes [target] of memory."""

    source: TensorEntry
    target: TensorEntry
    frames: tuple[int, ...]
    frame_nbytes: int

    def decode(self, memory: memoryview) -> None:
        """Decompress inside `memory`, the block's memory from its first byte; raises StoreError where it cannot."""
        payload = memory[self.source.offset : self.source.offset + self.source.nbytes]
        out = memory[self.target.offset : self.target.offset + self.target.nbytes]
        decompress_into(payload, self.frames, self.frame_nbytes, out, name=self.target.name)

    def to_json(self) -> dict[str, Any]:
        return {
            "dtype": DTYPE_NAMES[self.target.dtype],
            "shape": list(self.target.shape),
            "frames": list(self.frames),
            "frame_nbytes": self.frame_nbytes,
        }


@dataclass(frozen=True)
class Unit:
    """What moves: one extent of a block's file, and the weights in it.

    Its memory begins with the extent as it is in the file. Tensors that the extent holds compressed are decoded behind
    it. Offsets of `weights` and `compressed` count from the start of the unit's memory.
    """

    name: str
    """Unique in its block, and shown in traces and errors."""
    file: FileInfo
    offset: int
    """Where the extent starts in the file: a multiple of `PAGE`."""
    nbytes: int
    """Bytes of the extent: a multiple of `PAGE`."""
    chunks: range
    """Numbers of the file's chunks that lie in the extent: together they are the extent."""
    weights: Mapping[str, Weight]
    """By full name."""
    compressed: tuple[Compressed, ...]
    memory_nbytes: int
    kind: Literal["small", "dense"] = "dense"
    """"small": norms, biases and the like, which stay in memory for good; "dense": streamed in the order of use."""


@dataclass(frozen=True)
class BlockLayout:
    """The weights of one block file, by full name, and how its memory is laid out."""

    file: FileInfo
    weights: Mapping[str, Weight]
    compressed: tuple[Compressed, ...]
    memory_nbytes: int

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """What of the block moves, in the order of use."""
        file = self.file
        name = file.path.rpartition("/")[2].removesuffix(".safetensors")
        chunks = range(len(file.checksums))
        return (Unit(name, file, 0, file.nbytes, chunks, self.weights, self.compressed, self.memory_nbytes),)

    @property
    def weight_count(self) -> int:
        """How many weights the block holds, quantized or not."""
        return sum(int(torch.Size(weight.shape).numel()) for weight in self.weights.values())


def block_metadata(schemes: Mapping[str, tuple[GroupScheme, Sequence[int]]], compressed: Sequence[Compressed]) -> str:
    """The JSON that makes a block file self-describing: schemes of quantized weights, frames of compressed tensors."""
    value = {
        "weights": {name: {"scheme": scheme.name, "shape": list(shape)} for name, (scheme, shape) in schemes.items()},
        "zstd": {item.target.name: item.to_json() for item in compressed},
    }
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def read_layout(folder: Path, file: FileInfo) -> BlockLayout:
    """Read and check the header of `file` in the store at `folder`.

    Raises StoreError where the file is missing, has another size than the manifest says, or is no block.
    """
    path = folder / file.path
    try:
        found = check_regular(path, StoreError)
    except (FileNotFoundError, ValueError):
        # ValueError: a damaged manifest may hold a name that no file can have.
        raise StoreError(f"{path}: missing; the store is incomplete, convert the model again") from None
    if found != file.nbytes:
        raise StoreError(
            f"{path}: expected {file.nbytes:,} bytes, found {found:,}; it is truncated or not this store's, "
            "convert the model again"
        )
    entries, metadata, data_start = read_header(path)
    try:
        described = json.loads(metadata[METADATA_KEY])
        zstd, schemes = dict(described["zstd"]), dict(described["weights"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{path}: not a block of a tiered store (metadata: {error}); convert the model again"
        ) from None
    if data_start % PAGE:
        raise StoreError(
            f"{path}: data starts at byte {data_start}, expected a multiple of {PAGE}; convert the model again"
        )
    try:
        compressed, memory_nbytes = _place_compressed(entries, zstd, file.nbytes)
        stored = {e.name: e for e in entries if not e.name.startswith(PAD_PREFIX)}
        for item in compressed:
            del stored[item.source.name]
            stored[item.target.name] = item.target
        weights = _group(stored, schemes)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise StoreError(f"{path}: its metadata does not fit its tensors ({error}); convert the model again") from None
    misaligned = [name for name, entry in stored.items() if entry.offset % ALIGNMENT]
    if misaligned:
        raise StoreError(
            f"{path}: tensor {misaligned[0]} is not aligned to {ALIGNMENT} bytes; not written by tiered, "
            "convert the model again"
        )
    return BlockLayout(file, weights, compressed, memory_nbytes)


def _place_compressed(
    entries: Sequence[TensorEntry], zstd: Mapping[str, Any], file_nbytes: int
) -> tuple[tuple[Compressed, ...], int]:
    by_name = {entry.name: entry for entry in entries}
    placed, position = [], file_nbytes
    for name, value in zstd.items():
        dtype, shape = DTYPES[value["dtype"]], whole_numbers(value["shape"])
        target = TensorEntry(name, dtype, shape, position, tensor_nbytes(dtype, shape))
        source = by_name[name + ZSTD_SUFFIX]
        frames, (frame_nbytes,) = whole_numbers(value["frames"]), whole_numbers([value["frame_nbytes"]])
        if sum(frames) != source.nbytes:
            raise ValueError(f"{name}: frames of {sum(frames):,} bytes in a tensor of {source.nbytes:,}")
        if not (len(frames) - 1) * frame_nbytes < target.nbytes <= len(frames) * frame_nbytes:
            raise ValueError(f"{name}: {len(frames)} frames of {frame_nbytes:,} bytes for {target.nbytes:,} bytes")
        placed.append(Compressed(source, target, frames, frame_nbytes))
        position = round_up(position + target.nbytes, ALIGNMENT)
    return tuple(placed), round_up(position, PAGE)


def _group(stored: Mapping[str, TensorEntry], schemes: Mapping[str, Any]) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    parts_of: set[str] = set()
    for name, value in schemes.items():
        scheme, shape = GroupScheme.parse(value["scheme"]), whole_numbers(value["shape"])
        out, in_ = folded(shape)
        parts = {part: stored[f"{name}.{part}"] for part in ("q", "scale", "zero")}
        expected = {"q": scheme.q_shape(out, in_), "scale": scheme.scale_shape(out, in_)}
        expected["zero"] = expected["scale"]
        for part, entry in parts.items():
            dtype = torch.float16 if part == "scale" else torch.uint8
            if entry.shape != tuple(expected[part]) or entry.dtype != dtype:
                raise ValueError(f"{entry.name}: shape {entry.shape} {entry.dtype}, expected {expected[part]} {dtype}")
            parts_of.add(entry.name)
        weights[name] = Weight(name, shape, scheme, parts)
    for name, entry in stored.items():
        if name not in parts_of:
            weights[name] = Weight(name, entry.shape, None, {"": entry})
    return weights
