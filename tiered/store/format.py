"""The safetensors container, as blocks and checkpoints use it: headers in and out, with every bound checked.

A file is 8 bytes of little-endian header length, a JSON header, and tensor data without holes. Blocks add three
rules so that a whole file can be read with O_DIRECT and used where it lands: data starts on a multiple of 4096
(the header is padded with spaces), tensors start on multiples of 64 and the file ends on a multiple of 4096
(explicit U8 tensors `__pad…` fill the gaps, because a safetensors file may not have holes).
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import xxhash

from tiered.errors import CorruptError, StoreError
from tiered.files import check_regular, reading
from tiered.units import PAGE, round_up

ALIGNMENT: Final = 64
"""Alignment of every tensor in a block: a cache line, and the widest vector register."""
CHUNK_NBYTES: Final = 16 << 20
"""Bytes covered by one checksum."""
MAX_HEADER_NBYTES: Final = 100 << 20
"""The format's own limit; a larger claim is a damaged or foreign file."""

DTYPES: Final[dict[str, torch.dtype]] = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
CHECKPOINT_DTYPES: Final[dict[str, torch.dtype]] = {
    **DTYPES,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
"""Dtypes that a checkpoint may hold, including those that are only refused by name or left out."""
DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file. `offset` counts from the start of the file, not of the data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def hash_chunk(data: Any) -> str:
    """The checksum of one chunk: xxh3, 64 bit, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(data)


def tensor_nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor."""
    # Not torch's numel: it wraps around at 2**64, and a damaged header may claim any shape.
    return math.prod(shape) * dtype.itemsize


def whole_numbers(value: Any) -> tuple[int, ...]:
    """The list `value` of a JSON header as sizes: integers from 0. Raises TypeError or ValueError."""
    # A plain loop: a store has some 100,000 of these short lists.
    if type(value) is not list:
        raise TypeError(f"expected a list of integers, found {value!r}")
    for n in value:
        if type(n) is not int:
            raise TypeError(f"expected a list of integers, found {value!r}")
        if n < 0:
            raise ValueError(f"expected no negative numbers, found {value!r}")
    return tuple(value)


def header_room_nbytes(names: Iterable[str], frames: int = 0) -> int:
    """Where the data of a block of the weights `names` starts: the most its header can take, a multiple of `PAGE`.

    The header names each weight up to four times (parts, pads, metadata), and the sizes of all `frames`.
    """
    return round_up(4096 + sum(4 * len(name.encode()) + 700 for name in names) + 12 * frames, PAGE)


def header_bytes(entries: Sequence[TensorEntry], metadata: Mapping[str, str], data_start: int) -> bytes:
    """The first `data_start` bytes of a block: header length, JSON, spaces.

    Offsets in `entries` count from the start of the file; the header stores them from the start of the data.
    """
    table: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    for entry in entries:
        begin = entry.offset - data_start
        table[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, begin + entry.nbytes],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    room = data_start - 8
    assert len(text) <= room, (len(text), room)
    return struct.pack("<Q", room) + text + b" " * (room - len(text))


def read_header(path: Path, error: type[CorruptError] = StoreError) -> tuple[list[TensorEntry], dict[str, str], int]:
    """The tensors of a safetensors file in file order, its metadata, and where its data starts.

    Every claim is checked against the file before it is believed. Raises `error`, which names the file, what it
    claims and what it has.
    """
    try:
        size = check_regular(path, error)
        with reading(path), path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_NBYTES, size - 8):
                claim = f"header claims {length:,} bytes" if length >= 0 else "no header"
                raise error(f"{path}: {claim}, file has {size:,}; not a whole safetensors file; {_remedy(error)}")
            raw = file.read(length)
    except FileNotFoundError:
        raise error(f"{path}: missing; {_remedy(error)}") from None
    return (*_parse_header(path, raw, length + 8, size, error), length + 8)


def checkpoint_header(path: Path) -> list[TensorEntry]:
    """The tensors of a checkpoint's safetensors file; raises CheckpointError."""
    from tiered.errors import CheckpointError

    return read_header(path, CheckpointError)[0]


def _parse_header(
    path: Path, raw: bytes, data_start: int, size: int, error: type[CorruptError]
) -> tuple[list[TensorEntry], dict[str, str]]:
    try:
        table = json.loads(raw)
        metadata = {str(k): str(v) for k, v in dict(table.pop("__metadata__", None) or {}).items()}
        dtypes = DTYPES if error is StoreError else CHECKPOINT_DTYPES
        entries = [_parse_entry(name, value, data_start, dtypes) for name, value in table.items()]
    except _UnknownDtypeError as reason:
        raise error(f"{path}: {reason}; {_remedy(error)}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as reason:
        raise error(f"{path}: damaged safetensors header ({reason}); {_remedy(error)}") from None
    # Empty tensors come before the other tensor that starts at the same byte.
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    position = data_start
    for entry in entries:
        expected = tensor_nbytes(entry.dtype, entry.shape)
        if entry.nbytes != expected:
            raise error(
                f"{path}: tensor {entry.name} of shape {entry.shape} takes {expected:,} bytes, "
                f"header claims {entry.nbytes:,}; {_remedy(error)}"
            )
        if entry.offset != position:
            raise error(
                f"{path}: tensor {entry.name} starts at byte {entry.offset:,}, expected {position:,}; {_remedy(error)}"
            )
        position += entry.nbytes
    if position != size:
        raise error(
            f"{path}: header claims {position:,} bytes, file has {size:,}; it is truncated or damaged, {_remedy(error)}"
        )
    return entries, metadata


class _UnknownDtypeError(Exception):
    """Says which tensor has what dtype."""


def _parse_entry(name: str, value: dict[str, Any], data_start: int, dtypes: Mapping[str, torch.dtype]) -> TensorEntry:
    dtype = dtypes.get(value["dtype"])
    if dtype is None:
        raise _UnknownDtypeError(
            f"tensor {name} has dtype {value['dtype']!r}; known are {', '.join(DTYPES)}: already quantized, or damaged"
        )
    begin, end = whole_numbers(value["data_offsets"])
    return TensorEntry(name, dtype, whole_numbers(value["shape"]), data_start + begin, end - begin)


def _remedy(error: type[CorruptError]) -> str:
    return "convert the model again" if error is StoreError else "download the file again"
